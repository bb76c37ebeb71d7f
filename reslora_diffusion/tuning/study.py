"""The search: trials one after the other until the share of the training's time is spent.

Optuna proposes points (TPE), stops trials that fall behind at equal steps (successive halving), and stores everything.
So a search can be interrupted and continued, and the same command in a second process, on another device, joins in.

A trial counts with its last loss, or with its least where the training that follows exports its best step
(`Trainee.keeping_best`). It is chosen on one half of the held-out draws; the other half says what it gains over the
command as it was given.
"""

import gc
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import numpy as np
import optuna
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState

from ..utils.documents import parse_json
from ..utils.problems import BadInput, Stopped, is_out_of_memory
from .settings import EVALUATIONS, Settings
from .space import Space

STUDY = "reslora-tune"
FILE = "study.jsonl"
SQLITE = "sqlite:///"
MADE_BY_ANOTHER = ("already exists", "UNIQUE constraint")  # what data bases say of tables that are being made
LONGEST_LINE = 2**20
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
Report = Callable[[int, np.ndarray], bool]  # step and losses [draws] so far; answers whether to stop
Progress = Callable[[Mapping[str, Any]], None]


class Spent(NamedTuple):
    """Seconds that a trial took: in each step of training, and in all, measuring included."""

    step: float
    total: float


class Trainee(Protocol):
    """The job that is tuned: it trains a short while at a point and measures on held-out data."""

    @property
    def steps(self) -> int:
        """Steps of the whole training."""

    @property
    def start(self) -> Mapping[str, Any]:
        """The command's own point."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """The identity of trials, which are a function of it, in JSON's types."""

    @property
    def given(self) -> Mapping[str, Any]:
        """Options of the command, as a configuration file has them."""

    @property
    def keeping_best(self) -> Mapping[str, Any]:
        """Options by which the training measures often and exports its best step; none if it exports its last."""

    @property
    def names(self) -> Mapping[str, str]:
        """Options of this trainer that have another name than their dimension."""

    def train(self, options: Mapping[str, Any], steps: int, evaluate_at: Sequence[int], report: Report) -> Spent:
        """Train with these options, call `report` after the steps `evaluate_at`, stop when it says so or when the loss
        is not finite."""


@dataclass(frozen=True)
class Budget:
    """Seconds spent in training and measuring trials, and seconds that may be."""

    spent: float
    allowed: float
    longest: float  # a trial's
    running: int = 0  # trials of other processes

    @property
    def is_spent(self) -> bool:
        return self.spent + self.longest * (1 + self.running) > self.allowed


def open_study(settings: Settings, folder: Path, identity: Mapping[str, Any]) -> optuna.Study:
    """The study in its storage, made if it is not there.

    Raises:
        BadInput: the storage cannot be read, or holds a study of another command.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    where = settings.storage or str(folder / FILE)
    try:
        study = made_or_loaded(where)
        known = study.user_attrs.get("identity")
    except Exception as error:  # each kind of storage has errors of its own
        raise BadInput([f"--storage {where}: cannot be used: {str(error).splitlines()[0]}"]) from error
    if known is None:
        study.set_user_attr("identity", dict(identity))
    elif differing := sorted(name for name in {*known, *identity} if known.get(name) != identity.get(name)):
        told = ", ".join(f"{name} was {known.get(name)!r} and is {identity.get(name)!r}" for name in differing[:5])
        raise BadInput([f"--storage {where}: holds the study of another command ({told}); wanted another --folder"])
    return study


def made_or_loaded(where: str) -> optuna.Study:
    """One process of this machine at a time makes a data base: Optuna cannot make tables that another is making. Where
    a server has the data base, it is tried again."""
    for patience in (1, 3, None):
        try:
            with lock_of(where):
                return optuna.create_study(
                    storage=storage_of(where),
                    study_name=STUDY,
                    load_if_exists=True,
                    sampler=optuna.samplers.TPESampler(n_startup_trials=5, multivariate=True, seed=os.getpid()),
                    pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
                )
        except Exception as error:
            if patience is None or not any(words in str(error) for words in MADE_BY_ANOTHER):
                raise
            time.sleep(patience)
    raise AssertionError("the last try returns or raises")


def lock_of(where: str) -> AbstractContextManager[Any]:
    """Held while an SQLite file may be made; a journal has a lock of its own."""
    if not where.startswith(SQLITE):
        return nullcontext()
    return FileLock(f"{where.removeprefix(SQLITE)}.lock")


def storage_of(where: str) -> Any:
    """An address as Optuna takes it, or a journal file."""
    if "://" in where:
        return where
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = Path(where)
    if path.is_file() and (first := path.open("rb").readline(LONGEST_LINE)) and not is_journal(first):
        raise ValueError("it is no journal of Optuna's")  # which would write to any file
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def is_journal(line: bytes) -> bool:
    """Return whether a file whose first line this is holds what Optuna writes."""
    try:
        entry = parse_json(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and "op_code" in entry


def search(trainee: Trainee, settings: Settings, study: optuna.Study, progress: Progress = lambda facts: None) -> None:
    """Run trials until the time is spent, or until there are `settings.trials`."""
    space = Space(trainee.start, settings.search, trainee.names)
    if not study.get_trials(deepcopy=False):
        for point in space.first_points():
            study.enqueue_trial(point, skip_if_exists=True)
    free_abandoned(study)
    while True:
        trials = study.get_trials(deepcopy=False, states=DONE)
        others = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        measured, queued = (any(is_command(point_of(t), space) for t in those) for those in (trials, waiting))
        if measured or not queued:  # else the command's trial was cut off, and gains are over that
            if trials and budget_of(trials, settings, trainee.steps, others).is_spent:
                return
            if settings.trials and len(trials) >= settings.trials:
                return
        trial = study.ask()
        trial.set_user_attr("process", [socket.gethostname(), os.getpid()])
        run_trial(trainee, settings, study, trial, space, progress)


def run_trial(
    trainee: Trainee, settings: Settings, study: optuna.Study, trial: optuna.Trial, space: Space, progress: Progress
) -> None:
    """One trial, reported to the study however it ends."""
    steps = settings.steps_of_a_trial(trainee.steps)
    evaluate_at = [round(steps * n / EVALUATIONS) for n in range(1, EVALUATIONS + 1)]
    options = space.options(space.suggest(trial))
    measured: list[tuple[int, np.ndarray]] = []

    def report(step: int, losses: np.ndarray) -> bool:
        measured.append((step, losses))
        chosen_by = float(losses[::2].mean())
        progress({"trial": trial.number, "step": step, "steps": steps, "loss": chosen_by, "options": options})
        if not np.isfinite(losses).all():
            return True
        trial.report(chosen_by, len(measured))
        return not is_command(trial.params, space) and step < steps and trial.should_prune()

    started = time.monotonic()
    try:
        spent = trainee.train(options, steps, evaluate_at, report)
    except BaseException as error:
        with suppress(Exception):
            study.tell(trial, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
        if is_out_of_memory(error):
            advice = "search another --search, or train with less"
            raise Stopped(f"out of memory in trial {trial.number} ({options}); the study is kept; {advice}") from error
        raise
    finally:
        gc.collect()  # a trainer is part of cycles, and the next trial needs the memory of its model
    finite = [(step, losses) for step, losses in measured if np.isfinite(losses).all()]
    whole = bool(measured) and measured[-1][0] == steps and len(finite) == len(measured)
    counted = finite if trainee.keeping_best else finite[-1:] if whole else []
    if counted:
        step, losses = min(counted, key=lambda pair: pair[1][::2].mean())
        trial.set_user_attr("best_step", step)
        trial.set_user_attr("losses", [float(loss) for loss in losses])
    trial.set_user_attr("options", options)
    trial.set_user_attr("step_seconds", spent.step)
    trial.set_user_attr("seconds", spent.total)
    trial.set_user_attr("wall_seconds", time.monotonic() - started)
    if whole:
        study.tell(trial, float(losses[::2].mean()))
    else:
        study.tell(trial, state=TrialState.PRUNED)


def is_command(point: Mapping[str, Any], space: Space) -> bool:
    """Return whether a trial's point is that of the command as it was given."""
    return all(point.get(name) == space.start[name] for name in space.searched)


def point_of(trial: FrozenTrial) -> Mapping[str, Any]:
    """Return what a trial tries, or will."""
    return trial.params or trial.system_attrs.get("fixed_params", {})


def free_abandoned(study: optuna.Study) -> None:
    """Trials of processes of this machine that are no more: their points are tried again. Called before this process
    has any, so one that has its number was of another, as in a container that is started again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, process = trial.user_attrs.get("process", [None, 0])
        if host == socket.gethostname() and (process == os.getpid() or not is_alive(process)):
            with suppress(Exception):  # another process was faster
                study.tell(trial.number, state=TrialState.FAIL)
                study.enqueue_trial(dict(point_of(trial)))


def is_alive(process: int) -> bool:
    """Return whether it runs; one that has ended and that its parent has not asked about does not."""
    import psutil

    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def budget_of(trials: Sequence[FrozenTrial], settings: Settings, steps: int, running: int = 0) -> Budget:
    """Time is counted in what trials took to train and to measure; loading the model comes on top."""
    times = [trial.user_attrs["seconds"] for trial in trials]
    whole = steps * median(trial.user_attrs["step_seconds"] for trial in trials)
    return Budget(sum(times), settings.share * whole, max(times), running)
