"""`Comparer.compare(request)` -> an iterator of generated cells.

One pipeline stays in memory. For each cell, and under one lock: set the scheduler anew, switch the adapter, read the
switch back, seed a CPU generator with the row's seed, generate. The generator depends on the seed alone, so the first
noise of a row is the same tensor in every column and on every machine.

Generating order is row by row, so that a cancelled comparison still has whole rows to look at.
"""

import copy
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from reslora_diffusion.diffusion.models.families import FAMILIES
from reslora_diffusion.export.single_file import as_said, is_single_file, load_single_file, read_single_file

from .adapters import AdapterShelf
from .foreign import shortened
from .request import Column, CompareRequest, Limits, Row, Scheduler, checked, image_count, step_count

SCHEDULERS = {
    Scheduler.DDIM: DDIMScheduler,
    Scheduler.EULER: EulerDiscreteScheduler,
    Scheduler.DPM: DPMSolverMultistepScheduler,
    Scheduler.UNIPC: UniPCMultistepScheduler,
}
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Cell:
    """One generated image. `generated_with` is what the adapter layers held, not what was asked of them."""

    row: Row
    column: Column
    image: Image.Image
    generated_with: str
    seconds: float


class Cancelled(Exception):
    """Raised out of a denoising loop; never leaves this module."""


class Comparer:
    """A pipeline that generates comparisons for any number of people, one cell at a time."""

    def __init__(self, pipe: DiffusionPipeline, limits: Limits | None = None):
        self.pipe = pipe
        self.limits = limits or Limits()
        self.shelf = AdapterShelf(pipe)
        self.tokenizer = copy.deepcopy(pipe.tokenizer)  # counts in one thread while the pipeline pads in another
        self.saved_scheduler = pipe.scheduler
        self.lock = threading.Lock()
        self.seconds_per_step: float | None = None
        pipe.set_progress_bar_config(disable=True)

    @property
    def resolution(self) -> int:
        """Pixels of the side of a generated image."""
        model = getattr(self.pipe, "unet", None) or self.pipe.transformer
        own = getattr(self.pipe, "default_sample_size", 128)  # FLUX.1 has it there alone, Z-Image nowhere
        side = getattr(model.config, "sample_size", None) or own
        return side * self.pipe.vae_scale_factor

    @property
    def takes_negative(self) -> bool:
        """True where images of this pipeline can be guided away from a prompt; those of FLUX.2 cannot."""
        return "negative_prompt" in inspect.signature(self.pipe.__call__).parameters

    def compare(
        self,
        request: CompareRequest,
        cancel: threading.Event | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[Cell]:
        """Generate a request, yielding each cell as it is done.

        `cancel` may be set from any thread; the iterator then ends after the denoising step under way, without the
        image that it belonged to. `on_step(cell, step)` is told about every step begun by the current cell.

        Raises:
            ValueError: before the first image, with everything that is wrong with the request or its files.
        """
        checked(request, self.limits)
        if request.negative_prompt and not self.takes_negative:
            raise ValueError(f"Nothing was generated: a {type(self.pipe).__name__} takes no negative prompt")
        with self.lock:
            for adapter in request.adapters:
                self.shelf.load(adapter)
        cancel = cancel or threading.Event()
        cells = ((row, column) for row in request.rows for column in request.columns)
        for index, (row, column) in enumerate(cells):
            try:
                with self.lock:
                    cell = self.generate(
                        request, row, column, cancel, lambda step, i=index: on_step and on_step(i, step)
                    )
            except Cancelled:
                return
            yield cell

    def generate(
        self, request: CompareRequest, row: Row, column: Column, cancel: threading.Event, on_step: Callable[[int], None]
    ) -> Cell:
        def step_ended(pipe, step: int, timestep, values: dict) -> dict:
            if cancel.is_set():
                raise Cancelled
            on_step(step + 1)
            return values

        if cancel.is_set():
            raise Cancelled
        sampling = request.sampling(row, column)
        self.pipe.scheduler = self.scheduler(sampling.scheduler)
        generated_with = self.shelf.switch(column)
        started = time.perf_counter()
        words = self.shelf.worded(column, request.negative_prompt)
        negative = {"negative_prompt": words} if self.takes_negative else {}
        family = FAMILIES.get(type(self.pipe).__name__)
        image = self.pipe(
            prompt=self.shelf.worded(column, row.prompt),
            num_inference_steps=sampling.num_inference_steps,
            **{family.guidance_name if family else "guidance_scale": sampling.guidance_scale},
            **negative,
            generator=torch.Generator("cpu").manual_seed(row.seed),
            callback_on_step_end=step_ended,
        ).images[0]
        seconds = time.perf_counter() - started
        self.seconds_per_step = seconds / sampling.num_inference_steps
        return Cell(row, column, image, generated_with, seconds)

    def scheduler(self, kind: Scheduler):
        """A fresh scheduler: solvers of higher order keep a history, which must not leak into the next cell."""
        kind_of = type(self.saved_scheduler) if kind is Scheduler.AS_SAVED else SCHEDULERS[kind]
        return kind_of.from_config(self.saved_scheduler.config)

    def warm_up(self) -> None:
        """Generate an image of two steps: the first call is slow, and `estimate` needs a measured step."""
        request = CompareRequest(prompts=("",), seeds=(0,), num_inference_steps=WARM_UP_STEPS)
        list(self.compare(request))
        list(self.compare(request))

    def estimate(self, request: CompareRequest) -> tuple[int, float]:
        """(images, expected seconds), from the step times measured so far."""
        if self.seconds_per_step is None:
            self.warm_up()
        checked(request, self.limits)
        return image_count(request), step_count(request) * self.seconds_per_step

    def prompt_warnings(self, request: CompareRequest) -> list[str]:
        """Prompts of which the text encoder reads only the beginning."""
        limit = self.tokenizer.model_max_length
        lengths = {row.prompt: len(self.tokenizer(row.prompt).input_ids) for row in request.rows}
        long = {prompt: n for prompt, n in lengths.items() if n > limit}
        return [f"“{shortened(prompt)}” has {n} tokens, the text encoder reads {limit}" for prompt, n in long.items()]


def load_pipeline(source: str | Path, device: str = "cpu", config: str | None = None) -> DiffusionPipeline:
    """A pipeline from a folder, a single file or the hub's local cache; safetensors only, without a safety checker.

    Args:
        config: for a single file, folder or hub name of the configurations, if not its family's own on the hub.
    """
    if is_single_file(str(source)):
        found = read_single_file(source)
        pipe = as_said(found, load_single_file(found, config or found.config, torch.float32))
    else:
        pipe = DiffusionPipeline.from_pretrained(source, use_safetensors=True, local_files_only=True)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    return pipe.to(device)
