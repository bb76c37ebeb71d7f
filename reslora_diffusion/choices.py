"""Values of options that command lines know without torch."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` does not wait for it
    import torch


GUIDANCE = 2.5  # of images by the embedded pipeline, in the demo and on the page


class Precision(StrEnum):
    """The precision of a written file."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self]


class Target(StrEnum):
    """The program whose format a file is converted to."""

    DIFFUSERS = "diffusers"
    KOHYA = "kohya"
    PEFT = "peft"


class Modules(StrEnum):
    """The layers of which a LoRA is extracted."""

    TRANSFORMER = "transformer"
    ALL = "all"
