"""What a schedule is: hooks around a training step, and flags that say what they changed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Flag, auto
from typing import Any

from ...core.attach import AdaptedModel


class Change(Flag):
    """What a schedule has changed, for a training loop to act upon; false if nothing."""

    NOTHING = 0
    PARAMETERS = auto()  # others are trained than before, or the same from another place
    OPTIMIZER_STATE = auto()
    LEARNING_RATE = auto()


class Schedule:
    """Does nothing at any hook; schedules override what they need. Steps count from 0, in optimizer steps.

    What a schedule draws must be a function of (seed, step), so that processes and resumed runs agree.
    """

    conflicts: frozenset[str] = frozenset()  # names of shortcuts, options and methods that it does not go with

    def start(self, adapters: Sequence[AdaptedModel], total_steps: int) -> None:
        """Training of these adapters is about to begin, or to go on (`load_state_dict` comes after)."""

    def before_step(self, step: int) -> None:
        """Step `step` is about to begin."""

    def after_backward(self, step: int) -> None:
        """All gradients of step `step` are there; the optimizer has not used them yet."""

    def after_step(self, steps: int) -> Change:
        """`steps` steps are done. Returns what was changed."""
        return Change.NOTHING

    def evaluation(self) -> AbstractContextManager:
        """Inside, the adapters compute what would be exported, as far as the schedule decides that."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold besides parameters and moments; JSON's types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> Change:
        """Inverse of `state_dict`, on fresh adapters; their parameters' values are loaded afterwards.

        Returns:
            What was changed on the way, as of `after_step`.
        """
        return Change.NOTHING
