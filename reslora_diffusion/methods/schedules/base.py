"""The interface of schedules: hooks around a training step, and flags that say what they changed."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Flag, auto
from typing import Any

import torch
from torch import Tensor

from ...core.attach import AdaptedModel
from ...core.functional import LoraFactors

Factor = Callable[[int], float]  # on the learning rate, as a function of the steps that are done


class Change(Flag):
    """Flags for the training loop: what a schedule has changed; false if nothing."""

    NOTHING = 0
    PARAMETERS = auto()  # others are trained than before, or the same from another place
    OPTIMIZER_STATE = auto()
    LEARNING_RATE = auto()


class Schedule:
    """Does nothing at any hook; schedules override what they need. Steps count from 0, in optimizer steps.

    What a schedule draws must be a function of (seed, step), so that processes and resumed runs agree.
    """

    leaves_lora = True  # False: training ends with a smaller model, and no LoRA of the base can be exported
    saved_with_adapter = False  # whether the files of the adapter, as PEFT writes them, hold `tensors` too
    conflicts: Mapping[str, str] = {}  # shortcut, option or method -> the reason why the two do not go together

    def start(
        self, adapters: Sequence[AdaptedModel], total_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Training of these adapters is about to begin, or to go on (`load_state_dict` comes after).

        Args:
            optimizer: of the adapters' parameters; schedules that change those, or restart it, want it.
        """

    def before_step(self, step: int) -> None:
        """Step `step` is about to begin."""

    def after_backward(self, step: int) -> None:
        """All gradients of step `step` are there; the optimizer has not used them yet."""

    def after_step(self, steps: int) -> Change:
        """`steps` steps are done. Returns what was changed."""
        return Change.NOTHING

    def learning_rate(self, factor: Factor) -> Factor:
        """The factor on the learning rate, given the run's own `factor`."""
        return factor

    def evaluation(self) -> AbstractContextManager:
        """Inside, the adapters compute what would be exported, as far as the schedule decides that."""
        return nullcontext()

    def exported(self, factors: dict[str, LoraFactors], adapter: int = 0) -> dict[str, LoraFactors]:
        """The factors to export, given the plain LoRA that an adapter, by its number, merges into."""
        return factors

    def finish(self) -> None:
        """Training is over; what is evaluated and exported comes next."""

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint besides tensors, in JSON's types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> Change:
        """Inverse of `state_dict`, on fresh adapters; their parameters' values are loaded afterwards.

        Returns:
            What was changed on the way, as of `after_step`.

        Raises:
            ValueError: the state is that of another schedule.
        """
        return Change.NOTHING

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint besides parameters and moments."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`, after `load_state_dict`."""


def follow_learning_rate(schedule: Schedule, lr_scheduler: Any) -> None:
    """Let a schedule have its way with the learning rate of a `torch.optim.lr_scheduler.LambdaLR`.

    Raises:
        ValueError: the schedule changes it, and it is another kind of scheduler, which is no function of the step.
    """
    if type(schedule).learning_rate is Schedule.learning_rate:
        return
    factors = getattr(lr_scheduler, "lr_lambdas", None)
    if factors is None:
        raise ValueError(
            f"{type(lr_scheduler).__name__} cannot be restarted by a schedule; wanted one that is a function of the "
            "step: linear, cosine, polynomial, constant"
        )
    lr_scheduler.lr_lambdas = [schedule.learning_rate(factor) for factor in factors]
