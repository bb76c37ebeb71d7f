"""What must hold at each door through which strangers' files come in: `pass_through`. `fuzz_doors` lists the doors.

Whatever stands in the files, a reader ends within SECONDS of the processor and MEMORY, with a value or with an error of
the product's own kind, whose message is printable and short.
"""

import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

from reslora_diffusion.utils.problems import BadInput
from strangers import Files

SECONDS = 2.0  # of the processor
MEMORY = 200 * 2**20
HANGS = 30  # seconds until an example is broken off
LONGEST_MESSAGE = 20_000


class Door(NamedTuple):
    """A kind of files, and what reads them; `refusals` are the errors that it may raise."""

    files: st.SearchStrategy[Files]
    read: Callable[[Path], object]
    refusals: tuple[type[Exception], ...] = (BadInput,)
    slow: bool = False  # a few tenths of a second an example


class TooMuch(AssertionError):
    """A reader took more time or memory than any file may cost."""


def peak() -> int:
    """The most memory of this process since `forget_peak`, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return peak()


@contextmanager
def budget() -> Iterator[None]:
    """Inside, one reader reads one folder."""

    def hang(*given: object) -> None:
        raise TooMuch(f"it takes more than {HANGS} seconds")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANGS)
    memory, begin = forget_peak(), time.process_time()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    seconds, more = time.process_time() - begin, peak() - memory
    if seconds > SECONDS:
        raise TooMuch(f"it took {seconds:.1f} seconds")
    if more > MEMORY:
        raise TooMuch(f"it took {more >> 20} MiB")


def put(files: Files, folder: Path) -> Path:
    """The files in a folder of their own."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pass_through(door: Door, files: Files, folder: Path) -> bool:
    """True once the files were read or refused as they must be; raises what must not happen. What takes too much is
    tried again: it may have imported a library."""
    try:
        return attempt(door, files, folder)
    except TooMuch:
        return attempt(door, files, folder)


def attempt(door: Door, files: Files, folder: Path) -> bool:
    place = put(files, folder)
    with budget(), redirect_stdout(None):
        try:
            shown = door.read(place)
        except door.refusals as error:
            shown = str(error)
            assert shown, "an error without a message"
    if isinstance(shown, str):
        odd = {c for c in shown if not c.isprintable() and c not in "\n\t"}
        assert not odd, f"characters that a terminal obeys: {odd}"
        assert len(shown) <= LONGEST_MESSAGE, f"a message of {len(shown)} characters"
        shown.encode()
    return True
