"""Programs end on bad input with one message that names every problem, and have an exit code for each kind of end."""

import difflib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from .processes import stop_signals
from .stopping import watch_parent

EXIT_CODE = 2
QUIT_CODE = 130  # as shells say of Ctrl-C
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)

# What libraries raise on data that nobody foresaw. Whatever it is, the fault is the file's.
BAD_DATA = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError)


class BadInput(ValueError):
    """Raised for input that cannot be used. It carries every problem; each names what was got and what was wanted.

    `found` are lines on what was looked at and may be in order. All of it is printable, whoever wrote it.
    """

    def __init__(self, problems: Iterable[str], found: Iterable[str] = ()) -> None:
        self.problems, self.found = [printable_lines(problem) for problem in problems], list(found)
        count = len(self.problems)
        head = "1 problem:" if count == 1 else f"{count} problems:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class Unusable(BadInput):
    """A file of somebody else cannot be read: one message that begins with its name."""

    def __init__(self, path: object, problems: Iterable[str]) -> None:
        super().__init__(problems)
        self.path = path
        lines = "\n".join(
            [f"{printable(path, None)} cannot be used:", *(f"  - {problem}" for problem in self.problems)]
        )
        self.args = (lines,)

    @classmethod
    def saying(cls, path: object, message: str) -> "Unusable":
        """One whose message says the file's name by itself."""
        error = cls(path, [message])
        error.args = (message,)
        return error


class Stopped(RuntimeError):
    """Training cannot go on; says what is kept."""


class Interrupted(Exception):
    """A signal stopped a run where nothing is lost; says how to continue."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of a device or of the machine ran out, which each library reports differently."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool({"MemoryError", "OutOfMemoryError"} & names) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters of it; the error's type where it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


@contextmanager
def enough_memory_or(advice: Callable[[], str]) -> Iterator[None]:
    """Inside, nothing has been trained yet; an error of memory becomes `Stopped`, with advice."""
    failure = None
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure = first_line(error)
    if failure:  # outside of `except`, where the frames of the error hold its memory
        raise Stopped(f"out of memory before the first step ({failure}); {advice()}")


def refuse(problems: Iterable[str]) -> None:
    """Raise `BadInput` if there is any problem."""
    if problems := list(problems):
        raise BadInput(problems)


LONGEST_NAME = 200  # characters of a name in a message


def printable(text: object, limit: int | None = 200) -> str:
    """One line without control characters, which could move a terminal's cursor, recolour it or look like a line of
    ours, and without what no encoding can write (lone surrogates)."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return line if limit is None or len(line) <= limit else f"{line[: limit - 1]}…"


def shortened(value: object, limit: int = 80) -> str:
    """A value that may be a stranger's, as Python writes it."""
    return printable(repr(value), limit)


def printable_lines(text: object) -> str:
    """Several lines, each of which is made `printable`."""
    return "\n".join(printable(line, None) for line in str(text).split("\n"))


def listing(names: Iterable[object], shown: int = 5) -> str:
    """The first few names, which may be a stranger's, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(printable(name, LONGEST_NAME) for name in names[:shown]) + more


def nearest(name: object, known: Iterable[object]) -> str:
    """The end of a message on an unknown name: the known one that is most like it, or nothing."""
    found = difflib.get_close_matches(str(name), map(str, known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def is_first_process() -> bool:
    """Return whether this is the one of several processes that prints for all of them."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def say(lines: Iterable[str]) -> None:
    """Print what all processes found, once."""
    if is_first_process():
        for line in lines:
            print(line, flush=True)


@contextmanager
def nothing_to_lose() -> Iterator[None]:
    """Inside, Ctrl-C ends a run that has not begun."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("before the first step") from None


def run_program(program: Callable[[], object]) -> int:
    """The exit code of a program: 0, also after a signal; 2 for bad input, 1 for a run that had to stop, 130 if
    it was quit; all said in plain words. SIGTERM is raised as Ctrl-C is."""
    if threading.current_thread() is threading.main_thread():
        for number in stop_signals()[1:]:
            signal.signal(number, signal.default_int_handler)
        watch_parent()
    for stream in (sys.stdout, sys.stderr):  # a pipe on Windows knows few characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    found: list[str] = []
    try:
        program()
    except Interrupted as error:
        code, message = 0, f"stopped {error}"
    except BadInput as error:
        code, message, found = EXIT_CODE, str(error), error.found
    except Stopped as error:
        code, message = 1, f"stopped: {error}"
    except KeyboardInterrupt:
        code, message = QUIT_CODE, "quit at once"
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        code, message = 1, f"stopped: {error}"
    else:
        return 0
    if is_first_process():
        print("\n".join(found), end="\n" if found else "", flush=True)
        print(printable_lines(message), file=sys.stderr)
    return code
