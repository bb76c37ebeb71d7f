"""The dimensions of a search around the values that a command has.

learning_rate    a sixteenth to sixteen times the command's, on a logarithmic scale
lora_alpha       the same for alpha / rank: an eighth to thirty-two times
rank             half, once, twice and four times the command's
method           lora and the shortcuts
lr_scheduler     constant, linear, cosine; each falls to its end within a trial
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..rules import Shortcut

if TYPE_CHECKING:
    import optuna

Point = dict[str, Any]  # values by dimension; lora_alpha stands for alpha / rank
RANGES = {"learning_rate": (1 / 16, 16), "lora_alpha": (1 / 8, 32)}  # factors on the command's value
METHODS = ("lora", *(f"reslora-{shortcut}" for shortcut in Shortcut if shortcut is not Shortcut.NONE))
SCHEDULERS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Space:
    """`start` has the command's own value of every dimension; `searched` are the names of those that vary; `names` are
    options that a trainer calls otherwise."""

    start: Mapping[str, Any]
    searched: Sequence[str]
    names: Mapping[str, str] = field(default_factory=dict)

    def choices(self, name: str) -> list[Any]:
        """The values of a dimension without order, the command's own first."""
        own = self.start[name]
        offered = {
            "rank": [max(1, own // 2), own * 2, own * 4] if name == "rank" else [],
            "method": METHODS,
            "lr_scheduler": SCHEDULERS,
        }[name]
        return list(dict.fromkeys([own, *offered]))

    def suggest(self, trial: "optuna.Trial") -> Point:
        """A point for a trial; what is not searched stays as the command has it."""
        point = dict(self.start)
        for name in self.searched:
            if name in RANGES:
                low, high = (self.start[name] * factor for factor in RANGES[name])
                point[name] = trial.suggest_float(name, low, high, log=True)
            else:
                point[name] = trial.suggest_categorical(name, self.choices(name))
        return point

    def first_points(self) -> Iterator[Point]:
        """The command itself, then one step along each number: the rest is the sampler's."""
        own = {name: self.start[name] for name in self.searched}
        yield own
        for name, factor in (("learning_rate", 4), ("lora_alpha", 8), ("learning_rate", 1 / 4)):
            if name in self.searched:
                yield own | {name: self.start[name] * factor}

    def options(self, point: Point) -> dict[str, Any]:
        """Options of the trainers for a point: those of what is searched, and alpha where the rank changes."""
        named: dict[str, Any] = {name: point[name] for name in self.searched}
        if "lora_alpha" in named or "rank" in named:
            named["lora_alpha"] = significant(point["lora_alpha"] * point["rank"])
        if "learning_rate" in named:
            named["learning_rate"] = significant(named["learning_rate"])
        if "method" in named:  # checked by the caller: options of ResLoRA alone go with none of it
            method, _, shortcut = named["method"].partition("-")
            named |= {"method": method, "shortcut": shortcut or None}
        return {self.names.get(name, name): value for name, value in named.items()}


def significant(value: float) -> float:
    """Three digits: what is trained is what `run.yaml` says."""
    return float(f"{value:.3g}")
