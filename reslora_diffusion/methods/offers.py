"""Schedules and optimizers for a form, in the words that `--schedule` and `--optimizer` take. Known without torch."""

from collections.abc import Iterable
from typing import NamedTuple

from ..choices import PAIR_OPTIMIZERS
from .schedules.settings import SCHEDULES, conflicts_of

OPTIMIZERS = {
    "rite": "steps that do not depend on how B A is split (LoRA-RITE)",
    "pro": "gradients nearest to that of the whole matrix (LoRA-Pro)",
    "scaled_adamw": "AdamW on preconditioned gradients (Riemannian)",
    "reflora": "AdamW on the gradients that balanced factors would have (RefLoRA)",
}


class Offer(NamedTuple):
    """A choice: what the option takes, what it means, and why it does not go with the rest of a run, if so."""

    value: str
    summary: str
    reasons: tuple[str, ...] = ()


def offered_schedules(features: Iterable[str] = ()) -> list[Offer]:
    """Schedules with their defaults. `features`: what the run has besides, by the names in `conflicts`."""
    features = tuple(features)
    return [Offer(name, kind.summary, tuple(conflicts_of(kind(), features))) for name, kind in SCHEDULES.items()]


def offered_optimizers() -> list[Offer]:
    """Optimizers of pairs."""
    return [Offer(name, OPTIMIZERS[name]) for name in PAIR_OPTIMIZERS]
