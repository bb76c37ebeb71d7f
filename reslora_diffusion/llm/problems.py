"""One way to say that the input is bad: every problem in one message, exit code 2."""

from collections.abc import Iterable

EXIT_CODE = 2


class BadInput(ValueError):
    """What the user gave cannot be used. Carries every problem found; each names what was got and what was wanted."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 problem:" if count == 1 else f"{count} problems:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


def refuse(problems: Iterable[str]) -> None:
    """Raise `BadInput` if there is any problem."""
    if problems := list(problems):
        raise BadInput(problems)


def listing(names: Iterable[object], shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
