"""Commands that say everything that is wrong at once: unknown options, bad values, and files that cannot be used.

    @app.command(cls=checking(readable, known_rank))
    def resize(source, rank, ...): ...

click stops at the first fault that it finds, and what a command finds in its files comes only after that.
"""

from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import typer
from typer.core import TyperCommand

from .utils.problems import BadInput

UsageError: Any = typer.BadParameter.__mro__[1]  # of the click inside typer, which has no public name
Check = Callable[..., None]  # of parameters by their names; raises ValueError or OSError


class CheckingCommand(TyperCommand):
    """Parses its words as far as they can be, and then asks `checks` that have all their parameters."""

    checks: Sequence[Check] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or set(args) & set(ctx.help_option_names):
            return super().parse_args(ctx, args)
        faults: list[Exception] = []
        opts, rest = self.known_words(ctx, list(args), faults)
        sound = set()
        for param in sorted(self.get_params(ctx), key=lambda param: not param.is_eager):
            try:
                _, rest = param.handle_parse_result(ctx, opts, rest)
                sound.add(param.name)
            except UsageError as error:
                faults.append(error)
        if rest and not ctx.allow_extra_args:
            faults.append(UsageError(f"Got unexpected extra argument(s) ({' '.join(map(str, rest))})", ctx))
        faults += failures(self.checks, {name: ctx.params[name] for name in sound & ctx.params.keys()})
        if faults:
            raise all_of(faults)
        ctx.args = rest
        return rest

    def known_words(self, ctx: Any, words: list[str], faults: list[Exception]) -> tuple[dict[str, Any], list[str]]:
        """Parse words by click without the options that it does not know, which are added to `faults`. The word behind
        such an option is its value, where there is one argument too many."""
        behind: list[int] = []
        while True:
            try:
                opts, rest, _ = self.make_parser(ctx).parse_args(args=list(words))
            except UsageError as error:
                faults.append(error)
                name = getattr(error, "option_name", None)
                place = next((n for n, word in enumerate(words) if word.partition("=")[0] == name), None)
                if place is None:
                    raise all_of(faults) from error
                del words[place]
                behind = [n - (n > place) for n in behind]
                if place < len(words) and not words[place].startswith("-"):
                    behind.append(place)
                continue
            if not (rest and behind):
                return opts, rest
            del words[behind.pop()]


def all_of(faults: Sequence[Exception]) -> Exception:
    """One exception of all: a fault that is alone as it is."""
    texts = list(dict.fromkeys(message_of(fault) for fault in faults))
    return faults[0] if len(texts) == 1 else BadInput(texts)


def checking(*checks: Check) -> type[CheckingCommand]:
    """The class of a command with these checks."""
    return type("CheckingCommand", (CheckingCommand,), {"checks": checks})


def failures(checks: Sequence[Check], given: dict[str, Any]) -> Iterator[Exception]:
    """Yield the errors of those checks whose parameters are all given."""
    for check in checks:
        wanted = signature(check).parameters
        if wanted.keys() <= given.keys():
            try:
                check(**{name: given[name] for name in wanted})
            except (ValueError, OSError) as error:
                yield error


def message_of(fault: Exception) -> str:
    """The text of a fault, indented as one of several."""
    text = fault.format_message() if isinstance(fault, UsageError) else str(fault)
    return str(text).replace("\n", "\n    ")
