"""`--schedule` and `--optimizer` inside `transformers.Trainer`: the hooks, and what a checkpoint holds."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from ..core.attach import AdaptedModel
from ..methods.optimizers import OPTIMIZERS, factor_pairs
from ..methods.optimizers.parameters import literal
from ..methods.schedules import Schedule
from ..methods.schedules.base import follow_learning_rate
from ..utils.documents import parse_json
from .options import ModelOptions
from .resuming import SCHEDULE, SCHEDULE_TENSORS, STATE


class Scheduled(TrainerCallback):
    """Calls a schedule at its hooks in a `transformers.Trainer`."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        inner = getattr(optimizer, "optimizer", optimizer)  # as accelerate wraps it
        self.schedule.start([AdaptedModel(getattr(model, "module", model))], state.max_steps, inner)
        follow_learning_rate(self.schedule, kwargs.get("lr_scheduler"))

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.before_step(state.global_step)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.after_backward(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.after_step(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.finish()


def save_schedule(folder: Path, schedule: Schedule, option: str | None) -> None:
    """Write how far a schedule has come beside the files of a checkpoint."""
    facts = {"option": option, "state": schedule.state_dict()}
    (folder / SCHEDULE).write_text(json.dumps(facts, indent=2), encoding="utf-8")
    if not schedule.saved_with_adapter and (tensors := schedule.tensors()):
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / SCHEDULE_TENSORS)


def load_schedule(folder: Path, schedule: Schedule, model: nn.Module) -> None:
    """Give the adapter the form that it has in a checkpoint, whose values are loaded afterwards."""
    steps = parse_json((folder / STATE).read_text(encoding="utf-8"))["max_steps"]
    schedule.start([AdaptedModel(model)], steps)
    schedule.load_state_dict(parse_json((folder / SCHEDULE).read_text(encoding="utf-8"))["state"])
    if (folder / SCHEDULE_TENSORS).is_file():
        schedule.load_tensors(load_file(folder / SCHEDULE_TENSORS))


def pair_optimizer(options: ModelOptions, training: TrainingArguments, model: nn.Module) -> torch.optim.Optimizer:
    """`--optimizer` with Adam's options, where they were given, and `--optimizer_args`."""
    assert options.optimizer is not None, "who calls this has asked"
    return OPTIMIZERS[options.optimizer](
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        factor_pairs(model),
        lr=training.learning_rate,
        **pair_settings(options, training),
    )


def pair_settings(options: ModelOptions, training: TrainingArguments) -> dict[str, Any]:
    """Keyword arguments of the optimizer; an epsilon that was not given is the optimizer's own."""
    eps = {} if training.adam_epsilon == 1e-8 else {"eps": training.adam_epsilon}
    settings = {"betas": (training.adam_beta1, training.adam_beta2), "weight_decay": training.weight_decay, **eps}
    return settings | {name: literal(value) for name, value in options.optimizer_args.items()}
