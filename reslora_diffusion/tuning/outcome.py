"""A search has found settings: these, what they are expected to gain, and the files that say so.

run.yaml     the command's options with the best point; `--config run.yaml` trains with it
tune.json    every trial, the expected gain, what the search took
tune.png     loss over learning rate, coloured by alpha / rank
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from ..utils.files import write_text
from ..utils.problems import Stopped
from .settings import FACTS, PLOT, RUN, Settings
from .space import Space
from .study import DONE, Budget, Trainee, budget_of, is_command

LEVEL = 0.95


@dataclass(frozen=True)
class Gain:
    """The loss with the command as given less that with the settings found, on held-out draws that chose nothing, with
    the 95 % interval over those draws. Another seed of the training adds to it. All is infinite if the command
    diverged."""

    loss_before: float
    loss_after: float
    gain: float
    low: float
    high: float
    draws: int

    @property
    def is_shown(self) -> bool:
        return self.low > 0


@dataclass(frozen=True)
class Outcome:
    """`options` are those to train with: the command's own where no gain is shown."""

    options: dict[str, Any]
    best: dict[str, Any]
    gain: Gain
    best_step: int
    trial_steps: int
    trials: int
    stopped_early: int
    budget: Budget
    training_seconds: float
    folder: Path
    command: str

    def __str__(self) -> str:
        point = ", ".join(f"{name} {value}" for name, value in self.best.items() if value is not None)
        gain, trials = self.gain, "1 trial" if self.trials == 1 else f"{self.trials} trials"
        before = f"{gain.loss_before:.4g}: gain {gain.gain:.2g} ({gain.low:.2g} to {gain.high:.2g}; 95 %, over "
        before += f"{gain.draws} draws that chose nothing, one seed of training)"
        lines = [
            f"{trials} of {self.trial_steps} steps, {self.stopped_early} of them stopped early: "
            f"{self.budget.spent:.0f} s, {100 * self.budget.spent / self.training_seconds:.0f} % of the training's "
            f"{self.training_seconds:.0f} s",
            f"best: {point}",
            f"held-out loss after {self.best_step} steps {gain.loss_after:.4g}, with the options as given "
            f"{before if math.isfinite(gain.loss_before) else 'it diverged'}",
        ]
        if self.trials < 3:
            lines.append(f"{trials} say little: the time is too short for more; wanted a larger --share")
        if not gain.is_shown:
            lines.append("no gain is shown, so the options stay as they were given")
        if self.best_step < self.trial_steps:
            lines.append("its loss rose towards the end of the trial: fewer steps may do, and --keep_best finds them")
        return "\n".join([*lines, f"to train with it: {self.command}"])

    def to_dict(self) -> dict[str, Any]:
        facts = {name: value for name, value in vars(self).items() if name not in ("folder", "gain", "budget")}
        gain = {name: finite(value) for name, value in asdict(self.gain).items()}
        return facts | {"gain": gain | {"is_shown": self.gain.is_shown}, "budget": asdict(self.budget)}


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def loss_of(trial: FrozenTrial) -> float:
    """The loss on the half of the draws that chooses; infinite for a trial that diverged at once."""
    losses = trial.user_attrs.get("losses")
    return float(np.mean(losses[::2])) if losses else math.inf


def gain_of(before: Sequence[float], after: Sequence[float]) -> Gain:
    """Paired over the draws of the other half."""
    from scipy import stats

    old, new = np.array(before)[1::2], np.array(after)[1::2]
    if not np.isfinite(old).all():
        return Gain(math.inf, float(new.mean()), math.inf, math.inf, math.inf, len(new))
    differences = old - new
    mean, error = float(differences.mean()), float(stats.sem(differences))
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(differences) - 1)) * error
    return Gain(float(old.mean()), float(new.mean()), mean, mean - reach, mean + reach, len(differences))


def conclude(trainee: Trainee, settings: Settings, study: optuna.Study, folder: Path, program: str) -> Outcome:
    """Write the files and return what they say.

    Raises:
        Stopped: every trial diverged, or another process is still at the one that the others are compared with.
    """
    trials = study.get_trials(deepcopy=False, states=DONE)
    space = Space(trainee.start, settings.search, trainee.names)
    command = next((trial for trial in trials if is_command(trial.params, space)), None)
    if command is None:
        raise Stopped(
            "the trial of the options as given, with which the others are compared, is not finished; another process "
            "is at it, or has ended on another machine: --folder of a new search has it again"
        )
    best = min(trials, key=loss_of)
    if math.isinf(loss_of(best)):
        raise Stopped("every trial diverged; wanted a lower --learning_rate")
    own = command.user_attrs.get("losses") or [math.inf] * len(best.user_attrs["losses"])
    gain = gain_of(own, best.user_attrs["losses"])
    found = best.user_attrs["options"] if gain.is_shown else {}
    options = {**trainee.given, **found, **trainee.keeping_best}
    outcome = Outcome(
        options={name: value for name, value in options.items() if value is not None},
        best=best.user_attrs["options"],
        gain=gain,
        best_step=best.user_attrs["best_step"],
        trial_steps=settings.steps_of_a_trial(trainee.steps),
        trials=len(trials),
        stopped_early=sum(trial.state is TrialState.PRUNED for trial in trials),
        budget=budget_of(trials, settings, trainee.steps),
        training_seconds=budget_of(trials, settings, trainee.steps).allowed / settings.share,
        folder=folder,
        command=f"reslora {program} --config {folder / RUN}",
    )
    write_text(folder / RUN, yaml.safe_dump(outcome.options, sort_keys=False, allow_unicode=True))
    rows = [
        {"number": t.number, "state": t.state.name, "loss": finite(loss_of(t)), "point": t.params, **t.user_attrs}
        for t in trials
    ]
    facts = outcome.to_dict() | {"settings": asdict(settings), "all_trials": rows}
    write_text(folder / FACTS, json.dumps(facts, indent=1, default=str) + "\n")
    plot(trials, command.number, trainee.start, folder / PLOT)
    return outcome


def plot(trials: Sequence[FrozenTrial], command: int, start: Mapping[str, Any], path: Path) -> None:
    """Loss over learning rate, one point a trial, coloured by alpha / rank."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    def place(trial: FrozenTrial, name: str) -> float:
        return float(trial.params.get(name, start[name]))

    shown = [trial for trial in trials if math.isfinite(loss_of(trial))]
    own = [trial for trial in shown if trial.number == command]
    stopped = [trial for trial in shown if trial.state is TrialState.PRUNED and trial not in own]
    whole = [trial for trial in shown if trial not in own and trial not in stopped]
    alphas = [place(trial, "lora_alpha") for trial in shown]
    norm = LogNorm(min(alphas) / 1.2, max(alphas) * 1.2)
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for marker, size, label, some in (
        ("o", 30, "whole trials", whole),
        ("v", 30, "stopped early", stopped),
        ("s", 60, "the command as given", own),
    ):
        points = axis.scatter(
            [place(trial, "learning_rate") for trial in some],
            [loss_of(trial) for trial in some],
            c=[place(trial, "lora_alpha") for trial in some],
            norm=norm,
            cmap="viridis",
            marker=marker,
            s=size,
            label=label if some else None,
        )
    best = min(shown, key=loss_of)
    rings: dict[str, Any] = {"s": 200, "facecolors": "none", "edgecolors": "tab:red", "label": "best"}
    axis.scatter(place(best, "learning_rate"), loss_of(best), **rings)
    figure.colorbar(points, ax=axis, label="alpha / rank")
    axis.set(xscale="log", xlabel="learning rate", ylabel="held-out loss")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
