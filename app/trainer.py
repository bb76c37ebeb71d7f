"""Trainings started from the page: the command line's own script, in a process of its own, with a configuration file.

    <root>/<name>/config.yaml    every option that is not a default; --config of the script takes it as it is
    <root>/<name>/images/        what was handed in
    <root>/<name>/train.log      what the script said
    <root>/<name>/process.json   which process it is, the digest of its owner's key, and whether it was stopped
    <root>/<name>/tune/          a search before it, if one was asked for
    <root>/<name>/...            what the script writes: metrics, samples, checkpoints, the adapter

One training runs at a time. It belongs to the browser that started it, which finds it again from any of its windows and
after a restart of the server: what is known of a training stands in its folder. When the server ends, what runs is
asked to save. A training that ended early goes on from its newest checkpoint.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import psutil
import yaml
from PIL import Image

from reslora_diffusion.programs import beside
from reslora_diffusion.tuning.settings import FOLDER, PLOT, RUN
from reslora_diffusion.utils.files import write_text
from reslora_diffusion.utils.names import file_name_from
from reslora_diffusion.utils.processes import ask_to_stop, start_apart

from .foreign import parsed_json
from .request import joined
from .runs import ADAPTER, METRICS, find_adapters, read_rows
from .training import IMAGES, PAIR, TrainLimits, TrainRequest, options_of, request_problems

SCRIPT = beside("train_scripts") / "train_dreambooth_reslora.py"
SEARCH = "reslora_diffusion.tuning.beforehand"
CONFIG, LOG, PROCESS = "config.yaml", "train.log", "process.json"
LOG_LINES = 14
SAVING_SECONDS = 60  # a training that is asked to stop gets this long when the server ends
RESUME = ("--resume_from_checkpoint", "latest")
ONE = "A training is running on this machine; one at a time. Stop it, or wait for its end."


@dataclass(frozen=True)
class Record:
    """The process of a training, as its folder names it. One of this number that began at another time is another."""

    owner: str  # digest of the key
    pid: int
    began: float  # seconds, as psutil gives them
    stopped: bool = False
    code: int | None = None  # what it ended with; None while it runs, and where no server saw its end

    @property
    def process(self) -> psutil.Process | None:
        """None if it has ended."""
        try:
            process = psutil.Process(self.pid)
            ended = process.create_time() != self.began or process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return None if ended else process


@dataclass
class Training:
    """A process of the script, and what its folder says about it."""

    folder: Path
    record: Record
    process: subprocess.Popen | None = None  # where this server started it
    first_seen: tuple[int, float] | None = field(default=None, repr=False)  # (step, time) when a step was first read

    @classmethod
    def read(cls, folder: Path) -> "Training | None":
        """None where the folder has no record that can be read."""
        try:
            return cls(folder, Record(**parsed_json((folder / PROCESS).read_bytes())))
        except (OSError, ValueError, TypeError):
            return None

    def note(self, **changes: object) -> None:
        self.record = replace(self.record, **changes)
        write_text(self.folder / PROCESS, json.dumps(asdict(self.record)))

    @property
    def running(self) -> bool:
        if self.process is None:
            return self.record.process is not None
        code = self.process.poll()
        if code is not None and self.record.code is None:
            self.note(code=code)
        return code is None

    @property
    def stopped(self) -> bool:
        return self.record.stopped

    @property
    def finished(self) -> bool:
        """It did all its steps. Where no server saw its end, an exported file of each run says so."""
        if self.running or self.stopped:
            return False
        return self.record.code == 0 if self.record.code is not None else self.exported

    @property
    def exported(self) -> bool:
        folders = [self.folder / name for name in PAIR] if self.is_pair else [self.folder]
        return all((folder / ADAPTER).is_file() for folder in folders)

    @property
    def failed(self) -> bool:
        return not (self.running or self.stopped or self.finished)

    @property
    def killed_by(self) -> str | None:
        """The signal that ended it, such as SIGKILL where memory ran out; None if it ended by itself."""
        code = self.record.code
        return signal.Signals(-code).name if code is not None and code < 0 else None

    @cached_property
    def options(self) -> dict:
        """The options of its configuration; none where that cannot be read."""
        try:
            found = yaml.safe_load((self.folder / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            found = None
        return found if isinstance(found, dict) else {}

    @property
    def is_pair(self) -> bool:
        return "compare" in self.options

    @property
    def total_steps(self) -> int:
        """Steps of all its runs together."""
        return int(self.options.get("max_train_steps", 0)) * (len(PAIR) if self.is_pair else 1)

    @property
    def is_searching(self) -> bool:
        """It looks for a learning rate and an alpha before it trains."""
        search = self.folder / FOLDER
        return self.running and search.is_dir() and not (search / RUN).is_file()

    @property
    def plot_of_search(self) -> Path | None:
        path = self.folder / FOLDER / PLOT
        return path if path.is_file() else None

    def runs(self) -> list[Path]:
        """Folders of its runs that have begun: its own, or one for each of a pair."""
        if not self.is_pair:
            return [self.folder]
        return [folder for name in PAIR if ((folder := self.folder / name) / METRICS).is_file()]

    def step(self) -> int:
        """Steps done in all runs."""
        step = sum(steps_done(folder) for folder in self.runs())
        if step and self.first_seen is None:
            self.first_seen = (step, time.monotonic())
        return step

    def seconds_left(self, step: int) -> float | None:
        """Seconds left at the pace since the first step that was logged."""
        if self.first_seen is None or step <= self.first_seen[0]:
            return None
        pace = (time.monotonic() - self.first_seen[1]) / (step - self.first_seen[0])
        return pace * (self.total_steps - step)

    def log(self) -> list[str]:
        """The last lines; a progress bar counts as one, however often it was drawn."""
        path = self.folder / LOG
        text = path.read_bytes()[-16_384:].decode(errors="replace") if path.is_file() else ""
        text = text.replace(f"{self.folder.parent}{os.sep}", "")
        lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
        return [line for line in lines if line][-LOG_LINES:]

    def adapters(self) -> list[Path]:
        """The exported file of each run, or the newest checkpoint's where training was stopped before its end."""
        return [file for folder in self.runs() if (file := newest_adapter(folder))]

    def stop(self) -> None:
        """Ask it to finish its step and save; asked again, it ends at once."""
        if self.running and (process := self.record.process):
            self.note(stopped=True)
            ask_to_stop(process)

    def wait(self, seconds: float) -> None:
        """Wait for its end, and kill it after so long."""
        try:
            self.process.wait(seconds) if self.process else psutil.Process(self.record.pid).wait(seconds)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            psutil.Process(self.record.pid).kill()
        except psutil.NoSuchProcess:
            pass


def steps_done(folder: Path) -> int:
    """The last step in a run's metrics; 0 where they cannot be read, which is said where the run is read."""
    try:
        return max((row["step"] for row in read_rows(folder / METRICS) if "loss" in row), default=0)
    except ValueError:
        return 0


def newest_adapter(folder: Path) -> Path | None:
    if (folder / ADAPTER).is_file():
        return folder / ADAPTER
    files = find_adapters((folder,)).values()
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


class Trainer:
    """Starts trainings below one folder, one at a time, and finds those that it or an earlier server started."""

    def __init__(self, root: Path, base: str, resolution: int, script: Path = SCRIPT):
        self.root, self.base, self.resolution, self.script = root, base, resolution, script
        self.limits = TrainLimits()
        self.lock = threading.RLock()
        self.known: dict[Path, Training] = {}  # by folder

    def all(self) -> list[Training]:
        """The newest first."""
        with self.lock:
            for path in self.root.glob(f"*/{PROCESS}"):
                if path.parent not in self.known and (training := Training.read(path.parent)):
                    self.known[path.parent] = training
            self.known = {folder: training for folder, training in self.known.items() if folder.is_dir()}
            return sorted(self.known.values(), key=lambda training: -training.record.began)

    def of(self, owner: str) -> list[Training]:
        """Trainings that this owner started, the newest first."""
        return [training for training in self.all() if owner and training.record.owner == digest(owner)]

    @property
    def running(self) -> Training | None:
        return next((training for training in self.all() if training.running), None)

    def start(
        self,
        request: TrainRequest,
        images: Sequence[Image.Image],
        owner: str,
        base: str | None = None,
        resolution: int | None = None,
    ) -> Training:
        """Start a training.

        Args:
            base, resolution: of another base than the trainer's.

        Raises:
            ValueError: before anything is written, with everything that is wrong.
        """
        if found := request_problems(request, len(images), self.limits):
            raise ValueError(joined("Nothing was started", found))
        with self.lock:
            if self.running:
                raise ValueError(ONE)
            folder = self.new_folder(request)
            (folder / IMAGES).mkdir()
            for number, image in enumerate(images):
                image.save(folder / IMAGES / f"{number}.png")
            self.write_config(request, folder, base, resolution)
            if request.tune:
                (folder / FOLDER).mkdir()
            return self.launch(folder, digest(owner))

    def resume(self, training: Training) -> Training:
        """Go on from the newest checkpoint, or anew where there is none.

        Raises:
            ValueError: another training runs, or this one has done all its steps.
        """
        with self.lock:
            if self.running:
                raise ValueError(ONE)
            if training.finished:
                raise ValueError(f"{training.folder.name} has done all its steps.")
            return self.launch(training.folder, training.record.owner, RESUME)

    def launch(self, folder: Path, owner: str, more: Sequence[str] = ()) -> Training:
        program = [str(self.script), "--config"]
        if (folder / FOLDER).is_dir():
            program = ["-m", SEARCH, str(self.script)]
        command = [sys.executable, "-u", *program, str(folder / CONFIG), *more]
        with (folder / LOG).open("ab") as log:
            process = start_apart(  # Ctrl-C reaches the server, which then asks
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
            )
        training = Training(folder, Record(owner, process.pid, psutil.Process(process.pid).create_time()), process)
        training.note()
        self.known[folder] = training
        return training

    def write_config(
        self, request: TrainRequest, folder: Path, base: str | None = None, resolution: int | None = None
    ) -> Path:
        """The file that this training is started with."""
        options = options_of(request, base or self.base, resolution or self.resolution, folder)
        text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=1000)
        path = folder / CONFIG
        path.write_text(f"# reslora train --config {CONFIG}\n{text}", encoding="utf-8")
        return path

    def new_folder(self, request: TrainRequest) -> Path:
        subject = re.sub(r"^an? \w+ of (an? )?", "", request.instance_prompt)
        wanted = slug(request.name) or slug(f"{subject} {request.method}")
        for number in range(1, 10_000):
            folder = self.root / (wanted if number == 1 else f"{wanted}-{number}")
            if not folder.exists():
                folder.mkdir(parents=True)
                return folder
        raise ValueError(f"there are 9,999 trainings called {wanted}; choose another name")

    def close(self) -> None:
        """End what runs, giving it time to save."""
        if running := self.running:
            running.stop()
            running.wait(SAVING_SECONDS)


def digest(key: str) -> str:
    """An owner's key is known to their browser alone."""
    return sha256(key.encode()).hexdigest()[:32]


def slug(text: str) -> str:
    """A folder's name by the rule for files, short and in small letters; empty where nothing is left of it.

    >>> slug("../A Sticker of sks!"), slug("☃")
    ('a-sticker-of-sks', '')
    """
    return file_name_from(file_name_from(text.lower(), "")[:60], "")
