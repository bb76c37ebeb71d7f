"""The part that every Trainer of an adapter shares, whatever it trains for.

    checkpoints     count as broken until they are whole, have checksums, and replace older ones only then
    Ctrl-C          and SIGTERM finish the step, write a checkpoint and end the training
    NaN, infinity   in an adapter end the training and are never saved
    evaluations     leave the random numbers of the training alone

`AdapterTrainer` works as a mixin too: before a trainer of TRL's it gives the same to that one (`alignment_trainers`).
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from reslora_diffusion import ResLoraConfig, Shortcut, get_adapter

from ..interruption import Interruption
from ..utils.documents import parse_json
from ..utils.files import unfinished
from ..utils.problems import Interrupted, Stopped, listing
from ..weights import broken_tensors
from .options import ModelOptions
from .resuming import CONFIG, checkpoints_in, remove_oldest, write_checksums
from .scheduling import pair_optimizer

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def is_reslora(model: PeftModel) -> bool:
    return isinstance(model.peft_config["default"], ResLoraConfig)


def restore_shortcut(model: PeftModel, checkpoint: str | Path) -> None:
    """Compute as the checkpoint did: one from after a fold is plain LoRA, one from before has its shortcut."""
    stored = Path(checkpoint, CONFIG)
    if is_reslora(model) and stored.is_file():
        adapter = get_adapter(model)
        adapter.config.shortcut = Shortcut(parse_json(stored.read_text(encoding="utf-8"))["shortcut"])
        adapter.link()


class StopWhenAsked(TrainerCallback):
    """Saves and ends the training after the step in which a signal came; `step` is that step."""

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption
        self.step: int | None = None

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interruption.requested():
            self.step = state.global_step
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            args.load_best_model_at_end = False  # nothing is exported now


class AdapterTrainer(Trainer):
    """`transformers.Trainer` of a PEFT model, whose checkpoints can be relied upon.

    Args:
        options: of the scripts; their optimizer.
    """

    def __init__(self, *args: Any, options: ModelOptions | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = options
        self.stop: StopWhenAsked | None = None

    @property
    def output_folder(self) -> Path:
        assert self.args.output_dir is not None, "transformers fills it in"
        return Path(self.args.output_dir)

    @property
    def stop_was_requested(self) -> bool:
        return self.stop is not None and self.stop.step is not None

    @property
    def own_model(self) -> nn.Module:
        """The model that the trainer was made with."""
        assert self.model is not None, "no trainer is made without one"
        return self.model

    @property
    def adapted(self) -> PeftModel:
        """The model without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.own_model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`transformers.Trainer.train`; Ctrl-C and SIGTERM finish the step and save.

        Raises:
            Interrupted: a signal came, and a checkpoint was saved.
        """
        with Interruption(self.accelerator) as interruption:
            stop = self.stop = StopWhenAsked(interruption)
            self.add_callback(stop)
            try:
                outcome = super().train(*args, **kwargs)
            finally:
                self.remove_callback(stop)
        if stop.step is not None and stop.step < self.state.max_steps:
            done = f"after step {stop.step} of {self.state.max_steps}"
            raise Interrupted(f"{done}; continue by --resume_from_checkpoint latest")
        return outcome

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`transformers.Trainer.evaluate`, after which random numbers go on as if it had not been: a checkpoint that is
        written before the evaluation of its step, as at the end of an epoch, is then continued as the run was."""
        device = self.accelerator.device
        with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
            return super().evaluate(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of pairs that was asked for, or what transformers makes."""
        if self.options is None or self.options.optimizer is None or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        self.optimizer = pair_optimizer(self.options, self.args, self.adapted)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters that decay: DoRA's magnitudes are lengths of rows, whose zero is no smaller a change."""
        return [name for name in super().get_decay_parameter_names(model) if "lora_magnitude_vector" not in name]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint that counts as broken until it is whole; older ones are removed only then.

        Raises:
            Stopped: the adapters are not finite; what was saved before is still there.
        """
        self.refuse_wrecked()
        saves, limit = self.args.should_save, self.args.save_total_limit
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        with unfinished(folder) if saves else nullcontext():
            self.accelerator.wait_for_everyone()
            self.args.save_total_limit = None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()  # each process writes the state of its own random numbers
            if saves:
                self.save_more(folder)
            if saves and self.accelerator.distributed_type not in SHARDING:
                write_checksums(folder)
        if saves and not self.stop_was_requested:  # else this step is perhaps written again, at the end of its epoch
            remove_oldest(folder, limit, self.state.best_model_checkpoint)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.refuse_wrecked()  # transformers leaves losses that are not finite out of its logs
        super().log(logs, *args, **kwargs)

    def refuse_wrecked(self) -> None:
        """Raise `Stopped` if training has made the adapters something else than numbers. The base was looked at before
        the first step, so a learning rate that is too large is the likely cause."""
        if self.accelerator.distributed_type in SHARDING or not (broken := broken_tensors(self.adapted, True)):
            return
        there = listing(path.name for path in checkpoints_in(self.output_folder)) or "no checkpoint"
        raise Stopped(
            f"the adapters are not finite after step {self.state.global_step} ({listing(broken, 2)}): not saved. "
            f"In {self.output_folder}: {there}. A lower --learning_rate may help"
        )

    def save_more(self, folder: Path) -> None:
        """Write what else a subclass needs beside the files of a checkpoint; the first process calls it."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_shortcut(self.adapted, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None, "transformers asks only where there is one"
        super()._load_best_model()
        restore_shortcut(self.adapted, best)
