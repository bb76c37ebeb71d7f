"""Training from the page: the command line's own script, in a process of its own, with a configuration file.

    <root>/<name>/config.yaml    every option that is not a default; --config of the script takes it as it is
    <root>/<name>/images/      what was handed in
    <root>/<name>/train.log      what the script said
    <root>/<name>/...            what the script writes: metrics, samples, checkpoints, the adapter

One training runs at a time. It belongs to the browser that started it and outlives the page's sessions, so that a
reload finds it again; when the server ends it is asked to save what it has.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import yaml
from PIL import Image

from reslora_diffusion.methods.offers import offered_optimizers, offered_schedules
from reslora_diffusion.programs import beside
from reslora_diffusion.utils.names import file_name_from

from .request import CompareRequest, joined
from .runs import ADAPTER, METRICS, find_adapters, read_rows

SCRIPT = beside("train_scripts") / "train_dreambooth_reslora.py"
CONFIG, LOG, IMAGES = "config.yaml", "train.log", "images"
LOG_LINES = 14
SAVING_SECONDS = 60  # a training that is asked to stop gets this long when the server ends
SAMPLES_PER_RUN = 8
PLAIN_OPTIMIZER, NO_SCHEDULE = "adamw", "none"
OF_MODELS = ("prune",)  # schedules that leave a smaller model, and no adapter that could be compared
PAIR = ("lora", "reslora-block")  # contenders of --compare, trained one after the other on the same draws


class Method(StrEnum):
    LORA = "LoRA"
    INPUT = "ResLoRA, input"
    BLOCK = "ResLoRA, block"
    MIDDLE = "ResLoRA, middle"
    PAIR = "LoRA, then ResLoRA"

    @property
    def options(self) -> dict[str, str | list[str]]:
        if self is Method.PAIR:
            return {"compare": list(PAIR)}
        if self is Method.LORA:
            return {"method": "lora"}
        return {"method": "reslora", "shortcut": self.name.lower()}


@dataclass(frozen=True)
class TrainLimits:
    images: int = 64
    steps: int = 10_000
    rank: int = 128
    batch_size: int = 32
    prompt_characters: int = 300
    validation_prompts: int = 4
    class_images: int = 200


@dataclass(frozen=True)
class TrainRequest:
    """What the page asks; the names are the script's."""

    instance_prompt: str
    method: Method = Method.BLOCK
    max_train_steps: int = 800
    rank: int = 16
    learning_rate: float = 1e-3
    train_batch_size: int = 4
    train_text_encoder: bool = True
    validation_prompt: tuple[str, ...] = ()
    class_prompt: str = ""
    num_class_images: int = 40
    seed: int = 0
    name: str = ""
    optimizer: str = PLAIN_OPTIMIZER
    schedule: str = NO_SCHEDULE
    use_dora: bool = False

    @property
    def features(self) -> list[str]:
        """What it has, by the names of the methods' `conflicts`."""
        shortcuts = ["none", "block"] if self.method is Method.PAIR else [self.method.options.get("shortcut", "none")]
        return [*shortcuts, self.optimizer, *(["dora"] if self.use_dora else [])]


def request_problems(request: TrainRequest, images: int, limits: TrainLimits) -> list[str]:
    """Everything that is wrong with a request, in words."""
    found = []
    if not 1 <= images <= limits.images:
        found.append(f"{images} images of the subject; wanted 1 to {limits.images}")
    if not request.instance_prompt:
        found.append("there is no prompt for the images")
    for prompt in (request.instance_prompt, request.class_prompt, *request.validation_prompt):
        if len(prompt) > limits.prompt_characters:
            found.append(f"a prompt has {len(prompt):,} characters; at most {limits.prompt_characters} are taken")
    if len(request.validation_prompt) > limits.validation_prompts:
        found.append(f"{len(request.validation_prompt)} sample prompts; at most {limits.validation_prompts}")
    ranges = (
        ("steps", request.max_train_steps, limits.steps),
        ("rank", request.rank, limits.rank),
        ("batch size", request.train_batch_size, limits.batch_size),
        ("class images", request.num_class_images, limits.class_images),
    )
    found += [f"{name} lies between 1 and {most}; got {v}" for name, v, most in ranges if not 1 <= v <= most]
    schedules = {offer.value: offer.reasons for offer in offered_schedules(request.features)}
    if request.schedule != NO_SCHEDULE:
        unknown = (f"{request.schedule}: there is none of this name",)
        found += [f"schedule {why}" for why in schedules.get(request.schedule, unknown)]
    if request.optimizer not in (PLAIN_OPTIMIZER, *(offer.value for offer in offered_optimizers())):
        found.append(f"there is no optimizer {request.optimizer}")
    if not 0 < request.learning_rate <= 1:
        found.append(f"the learning rate lies between 0 and 1; got {request.learning_rate:g}")
    if not 0 <= request.seed < 2**32:
        found.append(f"the seed is a whole number from 0 to {2**32 - 1}; got {request.seed}")
    return found


def options_of(request: TrainRequest, base: str, resolution: int, folder: Path) -> dict:
    """The script's options by name, those alone that differ from its defaults or that a reader wants to see."""
    r = request
    options = {
        "pretrained_model_name_or_path": base,
        "resolution": resolution,
        "instance_data_dir": str(folder / IMAGES),
        "instance_prompt": r.instance_prompt,
        **r.method.options,
        "rank": r.rank,
        "learning_rate": r.learning_rate,
        "max_train_steps": r.max_train_steps,
        "train_batch_size": r.train_batch_size,
        "train_text_encoder": r.train_text_encoder,
        "seed": r.seed,
        "report_to": "none",
        "output_dir": str(folder),
    }
    if r.optimizer != PLAIN_OPTIMIZER:
        options["optimizer"] = r.optimizer
    if r.schedule != NO_SCHEDULE:
        options["schedule"] = r.schedule
    if r.use_dora:
        options["use_dora"] = True
    if r.validation_prompt:
        options |= {
            "validation_prompt": list(r.validation_prompt),
            "num_validation_images": 2,
            "validation_guidance_scale": CompareRequest.guidance_scale,
            "validation_steps": max(1, r.max_train_steps // SAMPLES_PER_RUN),
        }
    if r.class_prompt:
        options |= {
            "with_prior_preservation": True,
            "class_prompt": r.class_prompt,
            "class_data_dir": str(folder / "class_images"),
            "num_class_images": r.num_class_images,
        }
    return options


@dataclass
class Training:
    """A process of the script, and what its folder says about it."""

    folder: Path
    request: TrainRequest
    owner: str
    process: subprocess.Popen
    stopped: bool = False
    first_seen: tuple[int, float] | None = field(default=None, repr=False)  # (step, time) when a step was first read

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def failed(self) -> bool:
        return not self.running and self.process.returncode != 0 and not self.stopped

    @property
    def killed_by(self) -> str | None:
        """The signal that ended it, such as SIGKILL where memory ran out; None if it ended by itself."""
        code = self.process.poll()
        return signal.Signals(-code).name if code is not None and code < 0 else None

    @property
    def total_steps(self) -> int:
        """Steps of all its runs together."""
        return self.request.max_train_steps * (len(PAIR) if self.request.method is Method.PAIR else 1)

    def runs(self) -> list[Path]:
        """Folders of its runs that have begun: its own, or one for each of a pair."""
        if self.request.method is not Method.PAIR:
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
        if self.running:
            self.stopped = True
            self.process.send_signal(signal.SIGTERM)


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
    """Starts trainings below one folder, one at a time."""

    def __init__(self, root: Path, base: str, resolution: int, script: Path = SCRIPT):
        self.root, self.base, self.resolution, self.script = root, base, resolution, script
        self.limits = TrainLimits()
        self.last: Training | None = None
        self.lock = threading.Lock()

    def of(self, owner: str) -> Training | None:
        """The newest training, if this owner started it."""
        return self.last if self.last and owner and self.last.owner == owner else None

    def start(
        self,
        request: TrainRequest,
        images: Sequence[Image.Image],
        owner: str,
        base: str | None = None,
        resolution: int | None = None,
    ) -> Training:
        """
        Args:
            base, resolution: of another base than the trainer's.

        Raises:
            ValueError: before anything is written, with everything that is wrong.
        """
        if found := request_problems(request, len(images), self.limits):
            raise ValueError(joined("Nothing was started", found))
        with self.lock:
            if self.last and self.last.running:
                raise ValueError("A training is running on this machine; one at a time. Stop it, or wait for its end.")
            folder = self.new_folder(request)
            (folder / IMAGES).mkdir()
            for number, image in enumerate(images):
                image.save(folder / IMAGES / f"{number}.png")
            self.write_config(request, folder, base, resolution)
            command = [sys.executable, "-u", str(self.script), "--config", str(folder / CONFIG)]
            with (folder / LOG).open("wb") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches the server, which then asks
                    env=os.environ | {"HF_HUB_OFFLINE": "1"},
                )
            self.last = Training(folder, request, owner, process)
            return self.last

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
        if self.last and self.last.running:
            self.last.stop()
            try:
                self.last.process.wait(SAVING_SECONDS)
            except subprocess.TimeoutExpired:
                self.last.process.kill()
                self.last.process.wait()


def slug(text: str) -> str:
    """A folder's name by the rule for files, short and in small letters; empty where nothing is left of it.

    >>> slug("../A Sticker of sks!"), slug("☃")
    ('a-sticker-of-sks', '')
    """
    return file_name_from(file_name_from(text.lower(), "")[:60], "")
