"""The plan of a run, made by `checks.check` from options that are sound."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.buckets import Size
from ..data.concepts import Concept

if TYPE_CHECKING:  # it imports torch
    from ..models.meta_pipeline import MetaPipeline


@dataclass(frozen=True)
class Plan:
    """The data, the base and the length of a run."""

    concepts: list[Concept]
    buckets: list[Size]
    max_train_steps: int
    steps_per_epoch: int
    base: "MetaPipeline"
