"""Numbers from the result files of one plan: `analyse(plan, folder)`. `report` puts them into words.

    Entry       a method at its best setting, or a control: its final runs, and how they compare with the reference
    Analysis    all entries of a plan, its trials, and how much of the plan has been run

Differences at equal time are read from the curves: the loss that a run had when the reference's run of the same seed,
by processor time spent in training steps, was at its end. Its learning rate had not decayed to the end by then, so a
run that is planned for that time may do better than this.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import results, stages
from .plan import Plan
from .search import Setting, best_of, is_interior, key
from .statistics import Comparison, compare, holm

Runs = list[dict[str, Any]]  # contents of result files


class Progress(NamedTuple):
    """Runs that are there, and runs that the plan asks for."""

    trials: int
    trials_wanted: int
    final: int
    final_wanted: int

    @property
    def complete(self) -> bool:
        return self.trials >= self.trials_wanted and self.final >= self.final_wanted


class Moment(NamedTuple):
    """The first step of a mean curve at a loss, and the mean processor time of the training steps up to it."""

    step: int
    seconds: float


@dataclass(frozen=True)
class Entry:
    """A method at its best setting, or a control. Comparisons are None for the reference itself."""

    name: str
    setting: Setting
    runs: Runs
    comparison: Comparison | None = None
    p: float = float("nan")  # corrected
    equal_time: Comparison | None = None
    p_equal_time: float = float("nan")  # corrected
    robustness: Mapping[float, Mapping[int, float]] = field(default_factory=dict)  # factor on the rate: seed: loss
    interior: Mapping[str, bool] = field(default_factory=dict)

    @property
    def losses(self) -> dict[int, float]:
        return losses_of(self.runs)

    def values(self, name: str) -> list[float]:
        """A figure of every run that has it."""
        return [run["result"][name] for run in self.runs if run["result"].get(name) is not None]

    def changes(self, factor: float) -> list[float]:
        """Return how much the loss changes with the learning rate times a factor, in each seed that was run at both."""
        found = self.robustness.get(factor, {})
        return [loss - self.losses[seed] for seed, loss in found.items() if seed in self.losses]

    @property
    def gaps(self) -> list[float]:
        """The loss by exporting in each run: that of the export minus that as trained."""
        found = [run["result"] for run in self.runs if not run["result"]["diverged"]]
        return [result["loss"] - result["loss_as_trained"] for result in found]

    @property
    def training_seconds(self) -> list[float]:
        return [curve[-1]["training_cpu_seconds"] for curve in self.curves if curve]

    @property
    def curves(self) -> list[list[dict[str, float]]]:
        return [run["result"].get("curve", []) for run in self.runs]

    def reached(self, loss: float) -> Moment | None:
        """The first measured step at which the mean loss over the seeds was `loss` or less."""
        for points in zip(*self.curves, strict=False):
            if np.mean([point["loss"] for point in points]) <= loss:
                return Moment(points[0]["step"], float(np.mean([p["training_cpu_seconds"] for p in points])))
        return None


@dataclass(frozen=True)
class Analysis:
    """One plan's results."""

    plan: Plan
    trials: dict[str, list[tuple[Setting, float]]]
    entries: dict[str, Entry]
    progress: Progress
    everything: Runs

    @property
    def reference(self) -> Entry | None:
        return self.entries.get(self.plan.reference)

    @property
    def is_tuned(self) -> bool:
        return self.plan.search.trials > 1

    @property
    def methods(self) -> dict[str, Entry]:
        """Entries that are methods of the plan, without its controls."""
        return {name: entry for name, entry in self.entries.items() if name in self.plan.methods}

    @property
    def cpu_hours(self) -> float:
        return sum(run["result"]["cpu_seconds"] for run in self.everything) / 3600


def losses_of(runs: Runs) -> dict[int, float]:
    return {run["seed"]: run["result"]["loss"] for run in runs}


def by_setting(runs: Runs, stage: str) -> dict[str, dict[tuple, Runs]]:
    """Runs of a stage: by method (or control), by setting."""
    found: dict[str, dict[tuple, Runs]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["stage"] == stage:
            found[run["method"]][key(run["setting"])].append(run)
    return found


def at_time(curve: Sequence[Mapping[str, float]], seconds: float) -> float:
    """Loss of a curve after so much training time, between two measured points by a line; NaN before the first."""
    times, losses = ([point[name] for point in curve] for name in ("training_cpu_seconds", "loss"))
    return float(np.interp(seconds, times, losses, left=np.nan)) if curve else float("nan")


def losses_at_equal_time(runs: Runs, reference: Runs) -> dict[int, float]:
    """Per seed, the loss at the time at which the reference's run had ended."""
    ends = {
        run["seed"]: run["result"]["curve"][-1]["training_cpu_seconds"]
        for run in reference
        if run["result"].get("curve")
    }
    return {
        run["seed"]: at_time(run["result"].get("curve", []), ends[run["seed"]]) for run in runs if run["seed"] in ends
    }


def analyse(plan: Plan, folder: Path) -> Analysis:
    """Raises `ValueError` for result files of another format."""
    everything = list(results.all_of(folder, plan))
    trials = stages.tuning_so_far(plan, folder)
    best = {word: best_of(trials[word]) for word in plan.methods if word in trials}
    final, controls, other_rates = (by_setting(everything, stage) for stage in ("final", "controls", "robustness"))
    found = {word: Entry(word, setting, final[word].get(key(setting), [])) for word, setting in best.items()}
    for name, control in plan.controls.items():
        if control.of in best:
            setting = stages.changed(best[control.of], control)
            found[name] = Entry(name, setting, controls[name].get(key(setting), []))
    entries = {name: entry for name, entry in found.items() if entry.runs}
    if plan.reference in entries:
        entries = compared(entries, plan.reference)
    for word in entries:
        if word in plan.methods:
            around = robustness(plan, other_rates[word], best[word])
            entries[word] = replace(entries[word], robustness=around, interior=is_interior(trials[word]))
    return Analysis(plan, trials, entries, progress_of(plan, trials, entries), everything)


def compared(entries: dict[str, Entry], reference: str) -> dict[str, Entry]:
    """Entries with their comparisons; p values are corrected over all entries, the controls among them."""
    own = entries[reference]
    others = {name: entry for name, entry in entries.items() if name != reference}
    steps = {name: compare(entry.losses, own.losses) for name, entry in others.items()}
    times = {name: compare(losses_at_equal_time(entry.runs, own.runs), own.losses) for name, entry in others.items()}
    p, p_times = (holm({name: c.p for name, c in found.items()}) for found in (steps, times))
    return {
        name: entry
        if name == reference
        else replace(entry, comparison=steps[name], p=p[name], equal_time=times[name], p_equal_time=p_times[name])
        for name, entry in entries.items()
    }


def robustness(plan: Plan, runs: Mapping[tuple, Runs], setting: Setting) -> dict[float, dict[int, float]]:
    """Losses at the best learning rate times each factor, by seed."""
    others = {f: setting | {"learning_rate": setting["learning_rate"] * f} for f in plan.final.robustness}
    return {factor: losses_of(runs.get(key(other), [])) for factor, other in others.items()}


def progress_of(plan: Plan, trials: Mapping[str, Sequence[Any]], entries: Mapping[str, Entry]) -> Progress:
    """Final runs of a setting that is no longer the best one are not counted."""
    seeds, methods = len(plan.final.seeds), len(plan.methods)
    at_other_rates = len(plan.final.robustness) * min(seeds, plan.final.robustness_seeds) * methods
    done = (len(entry.runs) + sum(map(len, entry.robustness.values())) for entry in entries.values())
    return Progress(
        trials=sum(min(len(found), plan.search.trials) for found in trials.values()),
        trials_wanted=plan.search.trials * methods,
        final=sum(done),
        final_wanted=seeds * (methods + len(plan.controls)) + at_other_rates,
    )
