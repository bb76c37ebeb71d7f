"""Ctrl-C and SIGTERM, on Windows also CTRL_BREAK, as a question that the training loop asks between two steps."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

import torch
from accelerate import Accelerator

from .utils.processes import stop_signals
from .utils.stopping import asked_to_stop, started_by_a_launcher

ECHO = 2.0  # seconds in which a launcher passes on what the terminal has told its processes too


class Interruption:
    """While open, the first signal is kept for `requested`; the second acts as it did before. Under a launcher, one
    that follows within `ECHO` seconds is the same Ctrl-C.

    >>> with Interruption(accelerator) as interruption:
    ...     for step in steps:
    ...         ...
    ...         if interruption.requested():
    ...             break
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = False
        self.echo_until = 0.0

    def __enter__(self) -> Self:
        heard = threading.current_thread() is threading.main_thread()  # Python gives signals to no other
        self.before = {number: signal.getsignal(number) for number in stop_signals() if heard}
        for number in self.before:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() > self.echo_until:
                self.__exit__(None, None, None)
                signal.raise_signal(number)
            return
        self.received = True
        self.echo_until = time.monotonic() + ECHO if started_by_a_launcher() else 0.0
        asked_to_stop.set()
        # Not print: the signal may have come in the middle of one.
        os.write(
            2, f"\n{signal.Signals(number).name}: finishing this step, then saving (again to quit at once)\n".encode()
        )

    def requested(self) -> bool:
        """Return whether a signal reached any process, so that all of them leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return self.received
        received = torch.tensor(float(self.received), device=self.accelerator.device)
        return self.accelerator.reduce(received, reduction="sum").item() > 0
