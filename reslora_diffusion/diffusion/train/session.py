"""A run: everything a training loop holds, and what happens around its steps: save and restore.

`validating` validates it, `finishing` merges and exports it.

Methods are called by every process alike; only the main one writes. What is random or scheduled is a function of
(options, step), so a checkpoint holds tensors, the optimizer's moments and a step, and nothing else.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from reslora_diffusion.export import ExportReport, save_merged
from reslora_diffusion.methods.schedules import Change, Schedule
from reslora_diffusion.methods.schedules.base import follow_learning_rate
from reslora_diffusion.methods.schedules.making import make_schedule

from ...utils.problems import Stopped, listing
from ..data.sampling import Batch, Sampler
from ..models.adapters import Adapters
from ..objective.loss import Denoiser
from ..objective.randomness import Stream, seed_of
from ..options import DreamBoothOptions
from ..options.plan import Plan
from .best import Best, Factors, Rows
from .changes import Data
from .checkpoints import STATE_FOLDER, checkpoints_in, stored_facts, write_checkpoint, written_elsewhere
from .ema import Ema
from .exporting import checkpoint_number, export_adapter, header_facts, tag_frequency
from .history import History, NonFiniteLoss
from .merging import Evaluation, MergeReport, forwards_of
from .optimizers import DECIDED, fast_forward, make_lr_scheduler, used_weights
from .record import versions
from .schedules import settings_of
from .training_state import load_training_state, save_training_state, take
from .validation import ValidationImages


@dataclass
class Run:
    """The parts of one training run."""

    options: DreamBoothOptions
    plan: Plan
    accelerator: Accelerator
    adapters: Adapters
    denoiser: Denoiser
    sampler: Sampler
    evaluation: Evaluation
    validation_images: ValidationImages
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: History
    ema: Ema | None
    loss_base: float
    data: Data  # what is trained on
    lr_scheduler: LRScheduler = field(init=False)
    schedule: Schedule = field(init=False)
    step: int = field(init=False, default=0)  # steps that are done
    settled: bool = field(init=False, default=True)  # whether all that a step changes belongs to that step
    unwritten: OSError | None = field(init=False, default=None)
    saved_step: int | None = field(init=False, default=None)
    latest: dict[str, float] = field(init=False, default_factory=dict)
    best: Best | None = field(init=False, default=None)  # under --keep_best, on the process that validates

    def __post_init__(self) -> None:
        self.method = self.adapters.merging()  # as trained: after a fold the adapters are plain LoRA
        self.collect_tensors()
        self.schedule = make_schedule(
            settings_of(self.options),
            seed=self.seed,
            calibrate=self.calibrate,
            on_device=self.options.compile,
            gradient_scale=self.scaler.get_scale,
        )
        self.schedule.start(self.adapters.handles(), self.plan.max_train_steps, self.optimizer)
        self.make_lr_scheduler()

    def make_lr_scheduler(self) -> None:
        """The learning rate as a function of the step, as the schedule has it."""
        self.lr_scheduler = make_lr_scheduler(self.optimizer, self.options, self.plan.max_train_steps)
        follow_learning_rate(self.schedule, self.lr_scheduler)

    def collect_tensors(self) -> None:
        self.tensors = self.adapters.tensors()
        self.parameters = [p for name, p in self.tensors.items() if name.partition(".")[0] not in self.adapters.stopped]

    @property
    def seed(self) -> int:
        """The run's, which was drawn where none is given."""
        assert self.options.seed is not None, "`resolve_seed` has set it"
        return self.options.seed

    @property
    def output(self) -> Path:
        return Path(self.options.output_dir)

    def batches(self, step: int, micro: int) -> list[Batch]:
        """The examples of this process in micro-step `micro` of step `step`, both from 0; this seeds dropout too."""
        size, processes = self.options.train_batch_size, self.accelerator.num_processes
        turn = (step * self.options.gradient_accumulation_steps + micro) * processes + self.accelerator.process_index
        torch.manual_seed(seed_of(self.seed, Stream.DROPOUT, turn))
        return self.sampler.batches(turn * size, size)

    def log(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Keep what was measured, and look at it when it is time; raises `Stopped` if a loss is not finite."""
        lr = float(self.lr_scheduler.get_last_lr()[0])
        self.history.add_step(step, loss, grad_norm, lr)
        if self.history.is_due():
            try:
                self.flush(step)
            except OSError as error:
                self.unwritten = error  # raised once the step is done, so that it is kept

    def flush(self, step: int) -> None:
        """Write what was measured up to now."""
        try:
            rows = self.history.flush()
        except NonFiniteLoss as error:
            self.give_up(step, error)
        for row in rows:
            self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def give_up(self, step: int, error: NonFiniteLoss) -> NoReturn:
        """Keep what there is: the step in question changed nothing (`GradScaler.step`). No checkpoint is removed."""
        try:
            if problem := self.adapters.health_problem():
                raise Stopped(f"the adapters had been wrecked before it ({problem}), and are not saved")
            self.save(step, limit=None)
            kept = f"checkpoint-{step} holds the state that the adapters had, without that step"
        except Stopped as reason:
            kept = str(reason)
        there = listing(path.name for path in checkpoints_in(self.output)) or "no checkpoint"
        raise Stopped(f"{error}; {kept}. In {self.output}: {there}. A lower --learning_rate may help") from error

    # ------------------------------------------------------------------------------------------ schedule

    def after_step(self, step: int) -> Change:
        """`step` steps are done: let the schedule change what is due. Returns what it has changed."""
        change = self.schedule.after_step(step)
        self.follow(change)
        return change

    def follow(self, change: Change) -> None:
        """Train what is to be trained now, and average it from here on."""
        if change & Change.PARAMETERS:
            self.collect_tensors()
            if self.ema is not None:
                self.ema.start(self.tensors)

    # ------------------------------------------------------------------------------------------ save and restore

    def save(self, step: int, limit: int | None = None) -> None:
        """Write `checkpoint-<step>`, with the LoRA as it is now; keep the last `limit` checkpoints.

        Raises:
            Stopped: the adapters are broken, or cannot be written; earlier checkpoints stay.
        """
        self.flush(step)
        if self.saved_step == step:
            return
        tensors = self.trained()
        if not all(value.isfinite().all() for value in tensors.values()):
            raise Stopped(f"the adapters of step {step} are not finite, and are not saved")
        with self.averaged():
            self.calibrate()
            if self.accelerator.is_main_process:
                self.write_checkpoint(step, lambda folder: self.write_lora(folder, step), tensors, limit)
        self.accelerator.wait_for_everyone()
        self.saved_step = step

    def trained(self) -> dict[str, Tensor]:
        """A copy of all that training has made, the optimizer's moments apart."""
        average = self.ema.average if self.ema is not None else {}
        tensors = {**self.tensors, **{f"ema.{name}": value for name, value in average.items()}}
        tensors |= {f"schedule.{name}": value for name, value in self.schedule.tensors().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.tensors().items()} if self.best else {}
        return {name: value.detach().clone() for name, value in tensors.items()}

    def write_checkpoint(
        self, step: int, more: Callable[[Path], None], tensors: dict[str, Tensor], limit: int | None = None
    ) -> None:
        def write(folder: Path) -> None:
            owner = nn.ModuleDict(self.adapters.trained)
            facts = {
                "step": step,
                "schedule": self.schedule.state_dict(),
                "options": self.options.recorded(),
                "versions": versions(),
                "data": self.data,
                "scaler": self.scaler.state_dict(),
                "best": self.best and self.best.facts(),
            }
            save_training_state(folder / STATE_FOLDER, tensors, model=owner, optimizer=self.optimizer, facts=facts)
            more(folder)

        try:
            write_checkpoint(self.output, step, write, limit)
        except (OSError, SafetensorError) as error:
            other = written_elsewhere(self.output, step, write)
            raise Stopped(f"checkpoint-{step} cannot be written: {error}{other}") from error

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Inside, adapters and optimizer go from one step to the next; an error in there leaves neither."""
        self.settled = False
        yield
        self.step += 1
        self.settled = True
        if self.unwritten:
            raise self.unwritten

    def keep(self, step: int) -> None:
        """A checkpoint without its LoRA; no process waits for another."""
        if self.accelerator.is_main_process and self.saved_step != step:
            self.write_checkpoint(step, lambda folder: None, self.trained())

    def write_lora(self, folder: Path, step: int) -> None:
        """The LoRA of a checkpoint; one that cannot be exported, as too large for fp16, leaves the state alone."""
        if self.adapters.health_problem() is None and self.schedule.leaves_lora:
            factors = self.factors()
            save_merged(folder / STATE_FOLDER, factors, self.facts(step))
            try:
                self.export(folder, factors, step)
            except ValueError as error:
                self.accelerator.print(f"checkpoint-{step} holds no LoRA file: {error}")

    def factors(self) -> Factors:
        """The plain LoRA of each component as it would be exported now."""
        return {
            name: self.schedule.exported(factors, number)
            for number, (name, factors) in enumerate(self.adapters.factors().items())
        }

    def restore(self, folder: Path) -> int:
        """Inverse of `save`; returns the step."""
        facts = stored_facts(folder)
        state = facts.get("schedule", {"folded": facts.get("handed_over", False)})  # checkpoints of version 0.1
        self.follow(self.schedule.load_state_dict(state))
        decided = [{name: group[name] for name in DECIDED if name in group} for group in self.optimizer.param_groups]
        owner = nn.ModuleDict(self.adapters.trained)
        tensors, _ = load_training_state(folder / STATE_FOLDER, model=owner, optimizer=self.optimizer)
        averages, own, best = (take(tensors, prefix) for prefix in ("ema.", "schedule.", "best."))
        if self.options.keep_best and facts.get("best"):
            self.best = Best.from_state(facts["best"], best)
        self.adapters.load(tensors)
        self.schedule.load_tensors(own)
        if self.ema is not None:
            self.ema.start({name: averages[name].to(value.device) for name, value in self.ema.average.items()})
        for group, own in zip(self.optimizer.param_groups, decided, strict=True):
            group.update(own)
        self.make_lr_scheduler()
        fast_forward(self.lr_scheduler, facts["step"])
        self.scaler.load_state_dict(facts["scaler"])
        self.step = self.saved_step = facts["step"]
        return facts["step"]

    def averaged(self) -> AbstractContextManager:
        """Inside, the adapters hold what is shown and exported: their moving average if there is one, or the weights
        that a schedule-free optimizer means."""
        return self.ema.in_place_of(self.tensors) if self.ema is not None else used_weights(self.optimizer)

    def calibrate(self, distillation_steps: int = 0) -> None:
        self.adapters.calibrate(self.evaluation.calibration, forwards_of(self.denoiser), distillation_steps)

    def is_checkpoint_step(self, step: int) -> bool:
        return step % self.checkpoint_every == 0

    @property
    def checkpoint_every(self) -> int:
        """Steps from one checkpoint to the next."""
        passes = self.options.checkpointing_epochs
        return passes * self.plan.steps_per_epoch if passes else self.options.checkpointing_steps

    def is_validation_step(self, step: int) -> bool:
        every = self.options.validation_steps or self.options.validation_epochs * self.plan.steps_per_epoch
        return step % every == 0 or step == self.plan.max_train_steps

    def shown(self) -> dict[str, str]:
        """Return the figures beside the progress bar."""
        smoothed = self.history.smoothed
        loss = {} if smoothed is None else {"loss": f"{smoothed:.4f}"}
        return loss | {
            name: f"{value:+.0e}" if name == "merge_gap" else f"{value:.4f}" for name, value in self.latest.items()
        }

    def export(
        self, folder: Path, factors: Factors, step: int, report: MergeReport | None = None, rows: Rows | None = None
    ) -> ExportReport:
        """Write factors as a plain LoRA and rows of new tokens (those of now, if not given) as embeddings, with what
        the run knows of them in the headers."""
        number, facts = checkpoint_number(self.options, self.plan, step), self.facts(step, report)
        rows = self.adapters.new_tokens() if rows is None else rows
        return export_adapter(self.options, self.plan.base.family, self.adapters, factors, rows, folder, facts, number)

    def facts(self, step: int, report: MergeReport | None = None) -> dict[str, str]:
        facts = header_facts(self.options, self.plan.base.family, self.method, step, report)
        return facts | {"ss_tag_frequency": tag_frequency(self.plan.concepts, self.options.dataset_name)}

    def close(self) -> None:
        """Let the trackers write what they hold. A full disk must not hide why a run has ended."""
        for tracker in self.accelerator.trackers:
            with suppress(OSError):
                tracker.finish()
