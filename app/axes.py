"""Settings of denoising, and which of them rows or columns may go through."""

from dataclasses import dataclass
from enum import StrEnum

from .foreign import is_number, shortened


class Scheduler(StrEnum):
    """Solvers that leave the noise of the first step as the only noise, so that cells of a row stay comparable."""

    AS_SAVED = "as saved"
    DDIM = "DDIM"
    EULER = "Euler"
    DPM = "DPM++ 2M"
    UNIPC = "UniPC"


class Axis(StrEnum):
    """Settings of the sampler that can be swept along the rows or the columns."""

    STEPS = "steps"
    GUIDANCE = "guidance"
    SCHEDULER = "scheduler"


@dataclass(frozen=True)
class Setting:
    """One value of a swept setting; it replaces what the request says for all images."""

    axis: Axis
    value: int | float | Scheduler

    @property
    def label(self) -> str:
        return {
            Axis.STEPS: f"{self.value} step{'s' * (self.value != 1)}",
            Axis.GUIDANCE: f"guidance {self.value}".removesuffix(".0"),
            Axis.SCHEDULER: str(self.value),
        }[self.axis]


@dataclass(frozen=True)
class Sampling:
    """The settings that denoise one image."""

    num_inference_steps: int
    guidance_scale: float
    scheduler: Scheduler


def setting_of(axis: str, value: object) -> Setting:
    """
    Raises:
        ValueError: the axis is unknown, or the value is none of it.
    """
    axis = Axis(axis)
    if axis is Axis.SCHEDULER:
        return Setting(axis, Scheduler(value))
    if not is_number(value) or (axis is Axis.STEPS and value != int(value)):
        raise ValueError(f"got {shortened(str(value))!r} for {axis}")
    return Setting(axis, int(value) if axis is Axis.STEPS else float(value))


def is_setting(axis: object, value: object) -> bool:
    try:
        setting_of(axis, value)
    except ValueError:
        return False
    return True
