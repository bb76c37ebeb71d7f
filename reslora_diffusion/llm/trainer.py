"""A Trainer that judges what would be exported.

At every evaluation the shortcuts are merged (`calibrate`, `merged_forward`), so the loss, the answers and the choice of
the best step are those of the plain LoRA that will be written, not of a model that nobody can load.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from reslora_diffusion import (
    ResLoraConfig,
    Shortcut,
    calibrate,
    distill,
    get_controller,
    merge_report,
    merged_forward,
)
from reslora_diffusion.methods.schedules import Fold
from reslora_diffusion.methods.schedules.making import make_schedule

from ..interruption import Interruption
from ..utils.documents import parse_json
from ..utils.files import unfinished
from ..utils.problems import Interrupted, Stopped, listing, refuse
from ..weights import broken_tensors
from .encoder import Encoded
from .encoding import Collator, packing_problem
from .generation import Generations, Question, evaluate
from .methods import settings_of
from .options import ModelOptions
from .resuming import SCHEDULE, checkpoints_in, remove_oldest, write_checksums
from .scheduling import Scheduled, load_schedule, pair_optimizer, save_schedule

Batch = dict[str, Any]
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def run_model(model: nn.Module, batch: Batch) -> Any:
    """The model's output on a batch, loss included if it has labels."""
    device = next(model.parameters()).device
    output = model(**{name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()})
    restore_exported_factors(model)
    return output


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """What a model says, [T, vocabulary] or [T, classes]; batches are not padded."""
    return run_model(model, batch).logits.flatten(0, -2).float()


def divergence(merged: Tensor, trained: Tensor) -> Tensor:
    """How far two models' logits [T, n] are apart: Kullback and Leibler's, or squared for a regression's (n = 1)."""
    if trained.shape[-1] == 1:
        return F.mse_loss(merged, trained)
    found, wanted = (F.log_softmax(value, dim=-1) for value in (merged, trained))
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean")


def shortcut_of(model: PeftModel) -> str | None:
    """The shortcut the adapter computes with now; None for plain LoRA."""
    return str(get_controller(model).config.shortcut) if is_reslora(model) else None


def is_reslora(model: PeftModel) -> bool:
    return isinstance(model.peft_config["default"], ResLoraConfig)


def restore_exported_factors(model: nn.Module) -> None:
    """Put together again the factors that DeepSpeed ZeRO-3 took apart: evaluation does that even to those below its
    `stage3_param_persistence_threshold`, and merging reads them between forwards. Every process must call it."""
    away: list[Any] = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id") and not p.numel()]
    if away:
        away[0].all_gather(away)


@contextmanager
def as_exported(model: PeftModel, batches: Sequence[Batch]) -> Iterator[None]:
    """Inside, the model computes as the LoRA that would be exported now; `batches` are what merging is fitted on."""
    restore_exported_factors(model)
    if is_reslora(model):
        calibrate(model, batches, run_model)
    with merged(model):
        yield


def merged(model: PeftModel) -> AbstractContextManager:
    """Inside, the model computes as the LoRA that it was last calibrated to be exported as."""
    restore_exported_factors(model)
    return merged_forward(model) if is_reslora(model) else nullcontext()


@dataclass(frozen=True)
class ExactMatch:
    """The share of questions that a model answers right by generation; `read` finds the answer in a response."""

    questions: Sequence[Question]
    read: Callable[[str], str | None]
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    batch_size: int
    num_beams: int = 1
    max_total_tokens: int | None = None

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Generations:
        """Every process asks its part of the questions; all get all answers.

        All processes ask equally many, some of them again, and generate equally many tokens where weights are sharded:
        nobody may stop before the others.
        """
        count = len(self.questions)
        padded = [*self.questions, *[self.questions[-1]] * (-count % accelerator.num_processes)]
        with accelerator.split_between_processes(padded) as questions:
            found = evaluate(
                model,
                self.tokenizer,
                questions,
                self.read,
                max_new_tokens=self.max_new_tokens,
                max_total_tokens=self.max_total_tokens,
                batch_size=self.batch_size,
                num_beams=self.num_beams,
                synced_gpus=accelerator.distributed_type in SHARDING,
            )
        return Generations(*(gather_object(part)[:count] for part in (found.responses, found.answers, found.wanted)))


class ExportedTrainer(Trainer):
    """`transformers.Trainer`, evaluating what would be exported, with exact match of generated answers if asked.

    Args:
        calibration: batches that merging is fitted on.
        exact_match: validation questions; their share of right answers joins the metrics as `exact_match`.
        distillation_steps: in which the final merge is refined.
        options: of the scripts; their schedule and optimizer.

    `merged` may be set to False, to evaluate the shortcuts as they were trained.
    """

    merged = True

    def __init__(
        self,
        *args: Any,
        calibration: Sequence[Batch],
        exact_match: ExactMatch | None = None,
        distillation_steps: int | None = None,
        options: ModelOptions | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.options, self.schedule = options, None
        self.stop: StopWhenAsked | None = None
        settings = settings_of(options) if options else None
        if settings is not None:
            self.schedule = make_schedule(
                settings,
                seed=self.args.seed,
                calibrate=lambda: calibrated(self.accelerator.unwrap_model(self.model), calibration),
                on_device=self.args.torch_compile or self.args.world_size > 1,
                gradient_scale=self.gradient_scale,
            )
            self.add_callback(Scheduled(self.schedule))
        self.calibration, self.exact_match, self.distillation_steps = calibration, exact_match, distillation_steps

    @property
    def output_folder(self) -> Path:
        assert self.args.output_dir is not None, "transformers fills it in"
        return Path(self.args.output_dir)

    def gradient_scale(self) -> float:
        """What gradients are multiplied by when the optimizer is about to step; clipping takes that away before."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None or self.args.max_grad_norm else scaler.get_scale()

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
        """The same without the wrappers of distributed training."""
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

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of pairs that was asked for, or what transformers makes."""
        if self.options is None or self.options.optimizer is None or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        self.optimizer = pair_optimizer(self.options, self.args, self.accelerator.unwrap_model(self.model))
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters that decay: DoRA's magnitudes are lengths of rows, whose zero is no smaller a change."""
        return [name for name in super().get_decay_parameter_names(model) if "lora_magnitude_vector" not in name]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        model = self.adapted
        with as_exported(model, self.calibration) if self.merged else nullcontext():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self.exact_match is not None and output.metrics is not None:
                answered = self.exact_match.evaluate(model, self.accelerator)
                output.metrics[f"{metric_key_prefix}_exact_match"] = answered.exact_match
        return output

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
            if self.schedule is not None and saves:
                save_schedule(folder, self.schedule, self.options.schedule if self.options else None)
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.take_up_schedule(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_shortcut(self.adapted, resume_from_checkpoint)

    def take_up_schedule(self, checkpoint: Path) -> None:
        """Give the adapter the form that it has in a checkpoint, whose values are loaded afterwards; the links of a
        chain come with them. A fold is recognised by the adapter's own configuration (`restore_shortcut`)."""
        if self.schedule is None or isinstance(self.schedule, Fold) or not (checkpoint / SCHEDULE).is_file():
            return
        load_schedule(checkpoint, self.schedule, self.accelerator.unwrap_model(self.model))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None, "transformers asks only where there is one"
        self.take_up_schedule(Path(best))
        super()._load_best_model()
        restore_shortcut(self.adapted, best)

    def outcome(self, held_out: Sequence[Any]) -> dict[str, Any]:
        """Best step, and the cost of merging on rows other than those of calibration; leaves the adapter calibrated."""
        model = self.adapted
        restore_exported_factors(model)
        found: dict[str, Any] = {
            "shortcut": shortcut_of(model),
            "best_step": self.state.best_global_step,
            "best_metric": self.state.best_metric,
        }
        if is_reslora(model):
            calibrate(model, self.calibration, run_model)
            if self.distillation_steps:
                found["distillation"] = distill(
                    model, self.calibration, logits, steps=self.distillation_steps, distance=divergence
                )._asdict()
            collate = cast(Callable[[Sequence[Any]], Batch], self.data_collator)  # transformers' own take lists alone
            batches = batches_of(held_out, collate, self.args.per_device_eval_batch_size)
            merging = merge_report(model, batches, run_model, lambda model, batch: run_model(model, batch).loss.item())
            self.accelerator.print(merging)
            found["merging"] = merging.to_dict()
        return found


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


def fold_at(share: float, model: nn.Module, calibration: Sequence[Batch]) -> Scheduled:
    """Fold the shortcut of `model` into plain LoRA after a share of the steps."""

    return Scheduled(Fold(share, lambda: calibrated(model, calibration)))


def calibrated(model: nn.Module, calibration: Sequence[Batch]) -> None:
    """Find what merging needs, now."""
    restore_exported_factors(model)
    calibrate(model, calibration, run_model)


class PackingProbe(TrainerCallback):
    """Tries out, once the model is where it is trained, whether packed examples see each other.

    Raises:
        BadInput: they do.
    """

    def __init__(self, collate: Collator, examples: Sequence[Encoded], accelerator: Accelerator) -> None:
        self.collate, self.examples, self.accelerator = collate, examples, accelerator

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        with self.accelerator.autocast():
            problem = packing_problem(getattr(model, "module", model), self.collate, self.examples)
        restore_exported_factors(model)
        refuse([problem] if problem else [])


def restore_shortcut(model: PeftModel, checkpoint: str | Path) -> None:
    """Compute as the checkpoint did: one from after a fold is plain LoRA, one from before has its shortcut."""
    stored = Path(checkpoint, "adapter_config.json")
    if is_reslora(model) and stored.is_file():
        controller = get_controller(model)
        controller.config.shortcut = Shortcut(parse_json(stored.read_text())["shortcut"])
        controller.link()


# ------------------------------------------------------------------------------------------------------ batches


def calibration_batches(
    examples: Sequence[Any], collate: Callable[[Sequence[Any]], Batch], training: TrainingArguments, count: int
) -> list[Batch]:
    """This process's part of the random training examples that every calibration uses, each a batch of its own: the
    second moments must not see padding. `calibrate` sums over processes."""
    generator = torch.Generator().manual_seed(training.seed)
    count = max(1, min(count, len(examples)) // training.world_size) * training.world_size
    order = torch.randperm(len(examples), generator=generator).repeat(training.world_size)[:count].tolist()
    return [collate([examples[i]]) for i in order[training.process_index :: training.world_size]]


def batches_of(examples: Sequence[Any], collate: Callable[[Sequence[Any]], Batch], batch_size: int) -> list[Batch]:
    return [collate(examples[start : start + batch_size]) for start in range(0, len(examples), batch_size)]
