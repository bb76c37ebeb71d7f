"""TRL's trainers of preferences and of rewards are given these rows; `alignment_run` has what becomes of their model.

    preferences(rows)      {"prompt": [turns], "chosen": [turn], "rejected": [turn]}, as `trl.DPOTrainer` reads them
    questions(rows, task)  {"prompt": [turns], "wanted": "19"}, as `trl.GRPOTrainer` does
    Reward(task)           1 for each generated answer that is the wanted one, else 0

TRL gets a `ResLoraConfig` and makes the adapter itself; the base, with the adapter off, is what both compare with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..utils.environment import missing_packages
from ..utils.output_folder import alone_in
from ..utils.problems import BadInput, listing
from .checks import check
from .forms import NAMES, Form, conversations, form_of
from .options import PreferenceOptions, RewardOptions, parse
from .reading import column_notes
from .records import Row, choose, missing_files, read_rows
from .tasks import TASKS, Task, needs_rows, usable
from .training_options import TrainingOptions
from .values import same

if TYPE_CHECKING:
    from .encoder import Encoder

Rows = Sequence[Row]
Options = TypeVar("Options", PreferenceOptions, RewardOptions)
DEFAULTS = {"num_train_epochs": 1.0, "eval_strategy": "no", "load_best_model_at_end": False}
ELSEWHERE = ("schedule", "handover_at", "distillation_steps")  # options of train-llm that have no part here


@dataclass(frozen=True)
class Aligned:
    """Rows as TRL takes them; `notes` say how they were recognised and what was left out."""

    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def run_checked(
    kind: type[Options],
    argv: Sequence[str] | None,
    defaults: Mapping[str, Any],
    train: Callable[[Options, TrainingOptions, Aligned | None, str | None], Path],
) -> Path:
    """Read a command line, check all that needs no model, and train alone in the output folder, which is returned.

    Args:
        defaults: of the program, beside `DEFAULTS`.
        train: called with the options, those of training, the rows (None where they have yet to be fetched), and the
            checkpoint to continue from.

    Raises:
        BadInput: every problem with the options and the data.
    """
    options, training = parse(kind, argv, DEFAULTS | dict(defaults))
    problems = problems_of(options, training)
    checkpoint, given = check(options, training, problems, lambda: read(options, training.seed))
    with alone_in(training.output_folder):
        return train(options, training, given, checkpoint)


def problems_of(options: PreferenceOptions | RewardOptions, training: TrainingOptions) -> list[str]:
    """Faults that need no file to be opened."""
    problems = [*missing_packages([("this program", name, name) for name in ("trl", "datasets")])]
    for name in ELSEWHERE:
        if (value := getattr(options, name)) is not None:
            problems.append(f"--{name}: got {value!r}, but works in reslora train-llm alone; wanted none")
    if training.eval_strategy != "no" or training.load_best_model_at_end:
        problems.append(
            "--eval_strategy, --load_best_model_at_end: there are no validation rows here; wanted no and false"
        )
    problems += missing_files(options.dataset_name)
    task = getattr(options, "task", None)
    if isinstance(options, RewardOptions) and task not in TASKS:
        problems.append(f"--task: got {task!r}, wanted {', '.join(TASKS)}")
    elif task is not None and needs_rows(task) and not options.dataset_name:
        problems.append(f"--dataset_name: got nothing, but --task {task} has no data set of its own")
    if isinstance(options, PreferenceOptions):
        for name in (options.columns or {}).keys() - {*NAMES}:
            problems.append(f"--columns: got {name}=..., wanted names among {', '.join(NAMES)}")
        if not options.dataset_name:
            problems.append(
                "--dataset_name: got nothing, wanted a .jsonl file, a folder with train.jsonl, or a data set"
            )
    return problems


def read(options: PreferenceOptions | RewardOptions, seed: int) -> Aligned:
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
        good, unread = usable(task, rows, "train")
        notes = [f"train: {len(good)} questions of {source}, read as --task {task.source or source}"]
        notes += [f"train: left out rows without a readable answer: {listing(unread)}"] if unread else []
        return Aligned(questions(good, task), notes)
    columns = getattr(options, "columns", None)
    form = form_of(rows, columns)
    return Aligned(preferences(rows, columns, form), column_notes(rows, form, "train"))


def preferences(rows: Rows, columns: Mapping[str, str] | None = None, form: Form | None = None) -> list[dict[str, Any]]:
    """Each row as a prompt and two answers to it.

    Raises:
        BadInput: rows that hold no preference, or two answers to different prompts.
    """
    form = form or form_of(rows, columns)
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
    """Rows for a model without a chat template: turns as text, the prompt as in other trainings."""
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
