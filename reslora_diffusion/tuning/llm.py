"""Short trainings of the language-model trainer: rows are read and encoded once, the model is loaded anew each time."""

import copy
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..llm import reading
from ..llm.checks import check
from ..llm.options import LlmOptions, parse, reader
from ..llm.other_programs import translate
from ..llm.training_options import TrainingOptions
from ..utils.option_parser import parse_file
from ..utils.problems import Stopped

if TYPE_CHECKING:
    from torch import Tensor

    from ..llm.trainer import ExportedTrainer
    from .study import Report, Spent

DEFAULTS = {"output_dir": "reslora-llm"}  # of train_scripts/train_llm_reslora.py
# What a trial does without: it writes and generates nothing.
QUIET: dict[str, Any] = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": ["none"],
    "push_to_hub": False,
    "resume_from_checkpoint": None,
    "disable_tqdm": True,
}
FEWEST_ROWS = 4  # as `Settings.held_out_draws`: half of them choose, the others give the gain's interval
OUTSIDE = ("output_dir", "problems", "save_merged_model", "eval_base", *QUIET)  # change no trial


@dataclass
class Command:
    """A command line, read and checked."""

    options: LlmOptions
    training: TrainingOptions
    rows: reading.Reading | None
    given: dict[str, Any]


def read(words: Sequence[str]) -> Command:
    """Raises `BadInput` with every problem of the command."""
    options, training = parse(LlmOptions, words, DEFAULTS)
    problems = reading.option_problems(options)
    _, rows = check(options, training, problems, lambda: reading.read(options, training.seed))
    given = reader(LlmOptions).command_line(words).values
    if path := given.pop("config", None):
        config = parse_file("--config", path)
        translation = translate(config)  # of axolotl's or LLaMA-Factory's options
        given = reader(LlmOptions).mapping(translation.values if translation else config).values | given
    return Command(options, training, rows, given)


class Language:
    """A `study.Trainee` that trains a language model."""

    names: Mapping[str, str] = {"lr_scheduler": "lr_scheduler_type"}

    def __init__(self, command: Command, draws: int) -> None:
        from peft import TaskType

        from ..llm import data as llm_data
        from ..llm import models
        from ..llm.encoding import pack_examples
        from ..llm.model_checks import length_problems
        from ..utils.problems import refuse

        self.options, self.training, self.given = command.options, command.training, command.given
        self.kind = TaskType.CAUSAL_LM
        options = self.options
        self.config = models.load_config(options, self.kind)
        context = models.context_length(self.config)
        problems = [*models.target_problems(self.config, options, self.kind)]
        refuse([*problems, *length_problems(context, options.max_length)])
        self.tokenizer = models.load_tokenizer(options, self.config)
        options.max_length = options.max_length or min(1024, context or 1024)
        stops = models.stored_stops(options, self.config)
        rows = command.rows or reading.read(options, self.training.seed)
        self.data = llm_data.prepare(options, self.tokenizer, rows, models.embedding_rows(self.config), stops)
        self.held_out = self.data.validation[:draws]
        packed = options.packing
        self.rows: Sequence[Any] = pack_examples(self.data.train, options.max_length) if packed else self.data.train
        few = f"validation has {len(self.held_out)} rows that can be measured on, wanted {FEWEST_ROWS} or more"
        refuse([few] if len(self.held_out) < FEWEST_ROWS else [])
        self.steps = self.length()
        self.keeping_best = {"load_best_model_at_end": True}
        alpha = options.lora_alpha if options.lora_alpha is not None else 2 * options.rank
        self.start = {
            "learning_rate": self.training.learning_rate,
            "lora_alpha": alpha / options.rank,
            "rank": options.rank,
            "method": "lora" if options.method == "lora" else f"reslora-{options.shortcut or 'block'}",
            "lr_scheduler": self.training.lr_scheduler_type,
        }
        everything = {**asdict(options), **asdict(self.training)}
        own = {name: value for name, value in everything.items() if name not in OUTSIDE}
        self.identity = {n: v if isinstance(v, (int, float, str, bool, type(None))) else str(v) for n, v in own.items()}
        self.identity |= {"examples": len(self.data.train), "held_out_draws": len(self.held_out)}

    def length(self) -> int:
        """Steps of the whole training."""
        training = self.training
        if training.max_steps > 0:
            return training.max_steps
        size = training.per_device_train_batch_size * training.gradient_accumulation_steps
        return math.ceil(training.num_train_epochs * math.ceil(len(self.rows) / size))

    def train(self, options: Mapping[str, Any], steps: int, evaluate_at: Sequence[int], report: "Report") -> "Spent":
        from .study import Spent

        with tempfile.TemporaryDirectory(prefix="reslora-tune-") as folder:
            trainer = self.begin(options, steps, folder)
            judge = Judge(trainer, self.held_out, evaluate_at, report)
            trainer.add_callback(judge.callback())
            started = time.monotonic()
            try:
                trainer.train()
            except Stopped:  # the adapters are not finite
                report(trainer.state.global_step, np.full(len(self.held_out), np.nan))
            if trainer.stop_was_requested:  # in the last step, after which the trainer ends as if nothing had been said
                raise KeyboardInterrupt
            total = time.monotonic() - started
            return Spent((total - judge.seconds) / max(1, trainer.state.global_step), total)

    def begin(self, changed: Mapping[str, Any], steps: int, folder: str) -> "ExportedTrainer":
        from transformers import set_seed

        from ..llm import models
        from ..llm.encoding import Collator, uses_flash_attention
        from ..llm.options import training_arguments
        from ..llm.trainer import ExportedTrainer, calibration_batches, fold_at

        options, values = copy.deepcopy(self.options), copy.deepcopy(self.training)
        for name, value in QUIET.items():
            setattr(values, name, value)
        values.output_dir, values.max_steps = folder, steps
        if values.warmup_steps >= 1:
            values.warmup_steps = round(values.warmup_steps * steps / self.steps)
        for name, value in changed.items():
            setattr(values if name in ("learning_rate", "lr_scheduler_type") else options, name, value)
        training = training_arguments(values)
        set_seed(training.seed)
        base = models.load_model(options, self.config, self.kind)
        models.stop_at(base, self.data.ends)
        model = models.add_adapter(base, options, self.kind)
        pad = self.tokenizer.pad_token_id
        calibration = calibration_batches(
            self.data.train, Collator(pad, multiple_of=1), training, options.calibration_examples
        )
        return ExportedTrainer(
            model,
            training,
            data_collator=Collator(pad, lengths=uses_flash_attention(model)),
            train_dataset=self.rows,
            processing_class=self.tokenizer,
            callbacks=[fold_at(options.handover_at, model, calibration)] if options.handover_at else [],
            calibration=calibration,
            options=options,
        )


class Judge:
    """Measures the LoRA that would be exported at some steps of a training, and ends it on request."""

    def __init__(
        self, trainer: "ExportedTrainer", rows: Sequence[Any], evaluate_at: Sequence[int], report: "Report"
    ) -> None:
        self.trainer, self.rows, self.evaluate_at, self.report = trainer, rows, evaluate_at, report
        self.seconds = 0.0

    def callback(self) -> Any:
        from transformers import TrainerCallback

        judge = self

        class Measure(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step in judge.evaluate_at:
                    started = time.monotonic()
                    if judge.report(state.global_step, judge.losses()):
                        control.should_training_stop = True
                    judge.seconds += time.monotonic() - started

        return Measure()

    def losses(self) -> np.ndarray:
        """Mean loss of the answer's tokens, of every row."""
        import torch

        from ..llm.trainer import as_exported, batches_of, run_model

        model, found = self.trainer.adapted, []
        was = model.training
        model.eval()
        collate: Any = self.trainer.data_collator
        rows = sorted(range(len(self.rows)), key=lambda n: len(self.rows[n]["input_ids"]))  # little padding
        size = self.trainer.args.per_device_eval_batch_size
        with torch.no_grad(), as_exported(model, self.trainer.calibration):
            for batch in batches_of([self.rows[n] for n in rows], collate, size):
                found.append(row_losses(run_model(model, batch).logits, batch["labels"]).cpu())
        model.train(was)
        losses = np.empty(len(rows))
        losses[rows] = torch.cat(found).double().numpy()
        return losses


def row_losses(logits: "Tensor", labels: "Tensor") -> "Tensor":
    """Mean loss [B] over the learned tokens of each row: logits [B, T, V], labels [B, T] with -100 elsewhere."""
    import torch.nn.functional as F

    wanted = labels[:, 1:].to(logits.device)
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), wanted, reduction="none")  # 0 where it is -100
    return each.sum(1) / (wanted != -100).sum(1)
