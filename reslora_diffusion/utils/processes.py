"""Programs that are started beside this one, and how each platform asks them to end.

    start_apart(command)       starts one that Ctrl-C in this terminal does not reach
    ask_to_stop(process)       asks it to save and end
    with passing_on(stop):     inside, whoever asks this program to stop calls `stop` instead

POSIX     a session of its own; SIGTERM
Windows   a process group of its own; CTRL_BREAK, which arrives as SIGBREAK. SIGTERM ends a program there at once, and
          Ctrl-C is switched off in a new group.
"""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

WINDOWS = sys.platform == "win32"
# The names are there on Windows alone.
CTRL_BREAK: int = getattr(signal, "CTRL_BREAK_EVENT", 1)
NEW_GROUP: int = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0x200)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals by which this platform asks a program to end."""
    found = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
    return tuple(found)


def start_apart(command: Sequence[str], **settings: Any) -> subprocess.Popen:
    """`subprocess.Popen(command, **settings)`, out of reach of this terminal's Ctrl-C."""
    apart: dict[str, Any] = {"creationflags": NEW_GROUP} if WINDOWS else {"start_new_session": True}
    return subprocess.Popen(command, **apart, **settings)


def ask_to_stop(process: Any) -> None:
    """Ask a `subprocess.Popen` of `start_apart`, or a `psutil.Process`, to stop."""
    process.send_signal(CTRL_BREAK if WINDOWS else signal.SIGTERM)


@contextmanager
def passing_on(stop: Callable[[], object]) -> Iterator[None]:
    """Inside, a signal that asks this program to end calls `stop`, and the program goes on."""
    before = {number: signal.signal(number, lambda *_: stop()) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
