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
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from reslora_diffusion import (
    calibrate,
    distill,
    get_adapter,
    merge_report,
    merged_forward,
)
from reslora_diffusion.methods.schedules import Fold
from reslora_diffusion.methods.schedules.making import make_schedule

from ..utils.problems import refuse
from .adapter_trainer import SHARDING, AdapterTrainer, is_reslora
from .chunked_loss import chunked
from .encoder import Encoded
from .encoding import Collator, packing_problem
from .generation import Generations, Question, evaluate
from .methods import settings_of
from .options import ModelOptions
from .resuming import SCHEDULE
from .scheduling import Scheduled, load_schedule, save_schedule

Inputs = dict[str, Any]


def run_model(model: nn.Module, batch: Inputs) -> Any:
    """The model's output on a batch, loss included if it has labels."""
    device = next(model.parameters()).device
    output = model(**{name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()})
    restore_exported_factors(model)
    return output


def logits(model: nn.Module, batch: Inputs) -> Tensor:
    """Return a model's logits, [T, vocabulary] or [T, classes]; batches are not padded."""
    return run_model(model, batch).logits.flatten(0, -2).float()


def divergence(merged: Tensor, trained: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of two models' logits [T, n]; the squared error of regressions (n = 1)."""
    if trained.shape[-1] == 1:
        return F.mse_loss(merged, trained)
    found, wanted = (F.log_softmax(value, dim=-1) for value in (merged, trained))
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean")


def shortcut_of(model: PeftModel) -> str | None:
    """The shortcut the adapter computes with now; None for plain LoRA."""
    return str(get_adapter(model).config.shortcut) if is_reslora(model) else None


def restore_exported_factors(model: nn.Module) -> None:
    """Put together again the factors that DeepSpeed ZeRO-3 took apart: evaluation does that even to those below its
    `stage3_param_persistence_threshold`, and merging reads them between forwards. Every process must call it."""
    away: list[Any] = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id") and not p.numel()]
    if away:
        away[0].all_gather(away)


@contextmanager
def as_exported(model: PeftModel, batches: Sequence[Inputs]) -> Iterator[None]:
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


class ExportedTrainer(AdapterTrainer):
    """An `AdapterTrainer`, evaluating what would be exported, with exact match of generated answers if asked.

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
        calibration: Sequence[Inputs],
        exact_match: ExactMatch | None = None,
        distillation_steps: int | None = None,
        options: ModelOptions | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, options=options, **kwargs)
        self.schedule = None
        settings = settings_of(options) if options else None
        if settings is not None:
            self.schedule = make_schedule(
                settings,
                seed=self.args.seed,
                calibrate=lambda: calibrated(self.adapted, calibration),
                on_device=self.args.torch_compile or self.args.world_size > 1,
                gradient_scale=self.gradient_scale,
            )
            self.add_callback(Scheduled(self.schedule))
        self.in_parts = bool(getattr(options, "chunked_loss", False))
        self.calibration, self.exact_match, self.distillation_steps = calibration, exact_match, distillation_steps

    def gradient_scale(self) -> float:
        """Return what gradients are multiplied by when the optimizer is about to step; clipping undoes it before."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None or self.args.max_grad_norm else scaler.get_scale()

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch; with `--chunked_loss` in parts while training, and plain in evaluations, which may ask
        for logits."""
        with chunked(model) if self.in_parts and model.training else nullcontext():
            return super().compute_loss(model, *args, **kwargs)

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

    def save_more(self, folder: Path) -> None:
        if self.schedule is not None:
            save_schedule(folder, self.schedule, self.options.schedule if self.options else None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.take_up_schedule(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def take_up_schedule(self, checkpoint: Path) -> None:
        """Give the adapter the form that it has in a checkpoint, whose values are loaded afterwards; the links of a
        chain come with them. A fold is recognised by the adapter's own configuration (`restore_shortcut`)."""
        if self.schedule is None or isinstance(self.schedule, Fold) or not (checkpoint / SCHEDULE).is_file():
            return
        load_schedule(checkpoint, self.schedule, self.adapted)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None, "transformers asks only where there is one"
        self.take_up_schedule(Path(best))
        super()._load_best_model()

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
            collate = cast(Callable[[Sequence[Any]], Inputs], self.data_collator)  # transformers' own take lists alone
            batches = batches_of(held_out, collate, self.args.per_device_eval_batch_size)
            merging = merge_report(model, batches, run_model, lambda model, batch: run_model(model, batch).loss.item())
            self.accelerator.print(merging)
            found["merging"] = merging.to_dict()
        return found


def fold_at(share: float, model: nn.Module, calibration: Sequence[Inputs]) -> Scheduled:
    """Fold the shortcut of `model` into plain LoRA after a share of the steps."""

    return Scheduled(Fold(share, lambda: calibrated(model, calibration)))


def calibrated(model: nn.Module, calibration: Sequence[Inputs]) -> None:
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


# ------------------------------------------------------------------------------------------------------ batches


def calibration_batches(
    examples: Sequence[Any], collate: Callable[[list[Any]], Inputs], training: TrainingArguments, count: int
) -> list[Inputs]:
    """This process's part of the random training examples that every calibration uses, each a batch of its own: the
    second moments must not see padding. `calibrate` sums over processes."""
    generator = torch.Generator().manual_seed(training.seed)
    count = max(1, min(count, len(examples)) // training.world_size) * training.world_size
    order = torch.randperm(len(examples), generator=generator).repeat(training.world_size)[:count].tolist()
    return [collate([examples[i]]) for i in order[training.process_index :: training.world_size]]


def batches_of(examples: Sequence[Any], collate: Callable[[Sequence[Any]], Inputs], batch_size: int) -> list[Inputs]:
    return [collate(examples[start : start + batch_size]) for start in range(0, len(examples), batch_size)]
