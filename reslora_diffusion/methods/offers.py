"""Schedules and optimizers for a form, in the words that `--schedule` and `--optimizer` take. Known without torch."""

from collections.abc import Iterable
from typing import NamedTuple

from .pair_optimizers import CONFLICTS, PAIR_OPTIMIZERS
from .schedules.settings import SCHEDULES, conflicts_of


class Offer(NamedTuple):
    """A choice: what the option takes, what it means, and why it does not go with the rest of a run, if so."""

    value: str
    summary: str
    reasons: tuple[str, ...] = ()


def offered_schedules(features: Iterable[str] = ()) -> list[Offer]:
    """Schedules with their defaults. `features`: what the run has besides, by the names in `conflicts`."""
    features = tuple(features)
    return [Offer(name, kind.summary, tuple(conflicts_of(kind(), features))) for name, kind in SCHEDULES.items()]


def offered_optimizers(features: Iterable[str] = ()) -> list[Offer]:
    """Optimizers of pairs, likewise."""
    reasons = tuple(CONFLICTS[name] for name in features if name in CONFLICTS)
    return [Offer(name, summary, reasons) for name, summary in PAIR_OPTIMIZERS.items()]
