"""What TRL's trainers of preferences and of rewards are given, and what becomes of their model.

    preferences(rows)      {"prompt": [turns], "chosen": [turn], "rejected": [turn]}, as `trl.DPOTrainer` reads them
    questions(rows, task)  {"prompt": [turns], "wanted": "19"}, as `trl.GRPOTrainer` does
    Reward(task)           1 for each generated answer that is the wanted one, else 0

TRL gets a `ResLoraConfig` and makes the adapter itself; the base, with the adapter off, is what both compare with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..utils.environment import missing_packages
from ..utils.options import value_problems
from ..utils.problems import BadInput
from .forms import NAMES, conversations, form_of
from .options import PreferenceOptions, RewardOptions
from .records import Row, choose, read_rows
from .tasks import TASKS, Task, usable
from .training_options import TrainingOptions
from .values import same

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from .adapter_trainer import AdapterTrainer
    from .encoder import Encoder

Rows = Sequence[Row]
ELSEWHERE = ("schedule", "handover_at", "distillation_steps")  # options of train-llm that have no part here


def problems_of(options: PreferenceOptions | RewardOptions, training: TrainingOptions) -> list[str]:
    """Faults that need no file to be opened."""
    problems = [
        *value_problems(options),
        *missing_packages([("this program", name, name) for name in ("trl", "datasets")]),
    ]
    for name in ELSEWHERE:
        if (value := getattr(options, name)) is not None:
            problems.append(f"--{name}: got {value!r}, but works in reslora train-llm alone; wanted none")
    if training.eval_strategy != "no" or training.load_best_model_at_end:
        problems.append(
            "--eval_strategy, --load_best_model_at_end: there are no validation rows here; wanted no and false"
        )
    task = getattr(options, "task", None)
    if isinstance(options, RewardOptions) and task not in TASKS:
        problems.append(f"--task: got {task!r}, wanted {', '.join(TASKS)}")
    if isinstance(options, PreferenceOptions):
        for name in (options.columns or {}).keys() - {*NAMES}:
            problems.append(f"--columns: got {name}=..., wanted names among {', '.join(NAMES)}")
        if not options.dataset_name:
            problems.append(
                "--dataset_name: got nothing, wanted a .jsonl file, a folder with train.jsonl, or a data set"
            )
    return problems


def read(options: PreferenceOptions | RewardOptions, seed: int) -> list[dict[str, Any]]:
    """The rows to train on, as TRL takes them.

    Raises:
        BadInput: there are none, or some are of another format.
    """
    task = TASKS[str(options.task)] if isinstance(options, RewardOptions) else None
    source = str(options.dataset_name or (task.source if task else None))
    subset = options.dataset_config or (task.subset if task and source == task.source else None)
    rows = read_rows(source, "train", subset)
    if rows is None or not len(rows):
        raise BadInput([f"{source}: has no rows in a split 'train'"])
    rows = choose(rows, options.max_train_examples, seed)
    if task:
        return questions(usable(task, rows, "train")[0], task)
    return preferences(rows, getattr(options, "columns", None))


def preferences(rows: Rows, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Each row as a prompt and two answers to it.

    Raises:
        BadInput: rows that hold no preference, or two answers to different prompts.
    """
    form = form_of(rows, columns)
    if form.kind != "preference":
        raise BadInput([f"train: rows are {form}, wanted 'chosen' and 'rejected', with or without 'prompt'"])
    chosen = conversations(rows, columns, "train", form)
    rejected = [form.messages(row, rejected=True) for row in rows]
    problems = [
        f"train row {number}: chosen and rejected answer different prompts"
        for number, (good, bad) in enumerate(zip(chosen, rejected, strict=True), 1)
        if good[:-1] != bad[:-1]
    ]
    if problems:
        raise BadInput(problems[:10])
    return [
        {"prompt": [*good[:-1]], "chosen": [good[-1]], "rejected": [bad[-1]]}
        for good, bad in zip(chosen, rejected, strict=True)
    ]


def questions(rows: Rows, task: Task) -> list[dict[str, Any]]:
    return [{"prompt": task.messages(row)[:-1], "wanted": task.answer(row)} for row in rows]


def as_text(rows: Sequence[dict[str, Any]], encoder: "Encoder") -> list[dict[str, Any]]:
    """The same for a model without a chat template: turns as text, the prompt as in other trainings."""
    if encoder.templated:
        return list(rows)
    texts = []
    for row in rows:
        answers = {name: value[0]["content"] for name, value in row.items() if name in ("chosen", "rejected")}
        texts.append(row | {"prompt": encoder.prompt_text(row["prompt"])} | answers)
    return texts


@dataclass(frozen=True)
class Reward:
    """Exact match of what a response answers; called by TRL with the columns of its batch."""

    task: Task
    __name__ = "exact_match"  # TRL logs it under this

    def __call__(self, completions: Sequence[Any], wanted: Sequence[str], **_: Any) -> list[float | None]:
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        return [float(same(self.task.read(text), answer)) for text, answer in zip(texts, wanted, strict=True)]


def train_and_export(
    trainer: "AdapterTrainer",
    options: PreferenceOptions | RewardOptions,
    batches: Sequence[Any],
    checkpoint: str | None,
) -> Path:
    """Train, merge, export; return the output folder. `batches`: what merging is fitted on.

    Raises:
        Stopped: one of these failed; a checkpoint of what was trained is kept, and the message says where.
        Interrupted: a signal came.
    """
    from peft import TaskType

    from reslora_diffusion import calibrate

    from .adapter_trainer import is_reslora
    from .models import save_generation
    from .rescue import rescued
    from .results import export_lora, write_json
    from .trainer import run_model

    model, output = trainer.adapted, trainer.output_folder
    with rescued(trainer, options, "training"):
        trainer.train(resume_from_checkpoint=checkpoint)
    with rescued(trainer, options, "merging"):
        if is_reslora(model):
            calibrate(model, batches, run_model)
    with rescued(trainer, options, "exporting"):
        if trainer.is_world_process_zero():
            logged = [row for row in trainer.state.log_history if "loss" in row]
            write_json(output / "results.json", {"method": options.method, "steps": trainer.state.global_step})
            write_json(output / "history.json", {"logged": logged})
        export_lora(trainer, options, TaskType.CAUSAL_LM)
        if trainer.is_world_process_zero():
            save_generation(cast("PreTrainedModel", model.get_base_model()), output)
    return output


def batches_for(
    rows: Sequence[dict[str, Any]], encoder: "Encoder", training: "TrainingArguments", count: int, longest: int
) -> list[Any]:
    """Batches that merging is fitted on: prompts with the answer that is preferred, or alone."""
    from .encoder import Encoded
    from .encoding import Collator
    from .trainer import calibration_batches

    examples: list[Encoded] = []
    for row in rows[: 4 * count]:
        answer = row.get("chosen")
        ids = encoder.encode_prompt(row["prompt"])
        if answer:
            ids = encoder.encode(encoder.sequences([*row["prompt"], *answer])[-1])["input_ids"]
        examples.append(Encoded(input_ids=ids[:longest], labels=ids[:longest], end=ids[-1]))
    assert encoder.tokenizer.pad_token_id is not None, "load_tokenizer sets it"
    collate = Collator(encoder.tokenizer.pad_token_id, multiple_of=1)
    return calibration_batches(examples, collate, training, count)
