"""The plan of a run, printed before the first step."""

import math
from collections.abc import Iterator, Sized
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from transformers import Trainer
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..methods.advice import clipping_note
from ..rules import ShortcutFields
from .checks import adapter_settings
from .options import ModelOptions
from .resuming import STATE, read_json

FEW = 50  # steps in which an adapter learns little
EPOCHS = 3.0  # of TrainingArguments, if nothing is said


def steps_of(trainer: Trainer) -> int:
    """Optimizer steps that a run ends at."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    batches = len(trainer.get_train_dataloader())
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def past_the_end(trainer: Trainer, checkpoint: str | None) -> Iterator[str]:
    """A checkpoint that has more steps behind it than the run is to have."""
    if checkpoint and (done := read_json(Path(checkpoint, STATE)).get("global_step", 0)) > (end := steps_of(trainer)):
        yield f"--resume_from_checkpoint: {checkpoint} has {done} steps behind it; this run is to end at {end}"


def preflight(trainer: Trainer, options: ModelOptions, trained: int) -> Iterator[str]:
    """Lines on the device, the adapter, the optimizer and the number of steps. `trained`: parameters."""
    args, processes = trainer.args, trainer.accelerator.num_processes
    autocast = (
        "" if trainer.accelerator.mixed_precision == "no" else f", autocast {trainer.accelerator.mixed_precision}"
    )
    several = f", {processes} processes ({trainer.accelerator.distributed_type})" if processes > 1 else ""
    yield f"on {args.device}: the frozen base in {options.dtype}, adapters in float32{autocast}{several}"
    settings: dict[str, Any] = {item.name: item.default for item in fields(ShortcutFields)} | adapter_settings(options)
    rank, alpha = settings["r"], settings["lora_alpha"]
    kind = "LoRA"
    if options.method != "lora":
        reach = settings["num_previous"]
        kind = f"ResLoRA, shortcut {settings['shortcut']}, num_previous {'all' if reach is None else reach}"
    scale = alpha / (math.sqrt(rank) if options.use_rslora else rank)
    yield f"{kind}: rank {rank}, lora_alpha {alpha:g}, scale {scale:g}; {trained:,} trained parameters"
    schedule = SchedulerType(args.lr_scheduler_type).value
    warmup = f", warm-up {args.warmup_steps:g}" + (" of the steps" if 0 < args.warmup_steps < 1 else "")
    optimizer = options.optimizer or OptimizerNames(args.optim).value
    yield (f"{optimizer}: learning rate {args.learning_rate:g}, {schedule}{warmup}, weight decay {args.weight_decay:g}")
    if note := clipping_note(options.optimizer, args.max_grad_norm):
        yield note
    steps, each, accumulated = steps_of(trainer), trainer._train_batch_size, args.gradient_accumulation_steps
    parts = [(each, "examples"), (accumulated, "accumulated"), (processes, "processes")]
    batch = " x ".join(f"{count} {name}" for count, name in parts if count > 1 or name == "examples")
    yield f"{steps} steps of {batch}; {len(cast(Sized, trainer.train_dataset))} in a pass over the data"
    if steps < FEW and args.max_steps <= 0 and args.num_train_epochs == EPOCHS:
        yield (
            f"only {steps} steps: the {EPOCHS:g} passes of the default are few for this data; give --num_train_epochs "
            "or --max_steps, or a smaller --per_device_train_batch_size"
        )
