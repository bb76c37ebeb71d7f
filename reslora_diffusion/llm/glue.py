"""The nine GLUE tasks: columns, splits and metrics.

    accuracy, F1 (of class 1), Matthews' correlation, Pearson's and Spearman's correlation

as GLUE defines them, in float64. The first metric of a task chooses its best step, on rows set apart from train; the
validation split, the only labelled one that is left, is what is reported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..utils.problems import listing, refuse
from .glue_files import holds_tsv, read_tsv
from .options import GlueOptions
from .records import Row, carve, choose, column_problems, numbers_of, read_rows

SOURCE = "nyu-mll/glue"
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Metric = Callable[[NDArray, NDArray], float]


@dataclass(frozen=True)
class GlueTask:
    """One task: the text columns, how many labels (1: a number is predicted), and the metrics by name."""

    columns: tuple[str, ...]
    num_labels: int
    metrics: tuple[str, ...]
    reported: tuple[str, ...] = ("validation",)


def accuracy(predicted: NDArray, labels: NDArray) -> float:
    return float(np.mean(predicted == labels))


def f1(predicted: NDArray, labels: NDArray) -> float:
    """2 TP / (2 TP + FP + FN) of class 1; 0 where there is none."""
    hits = np.sum((predicted == 1) & (labels == 1))
    named = np.sum(predicted == 1) + np.sum(labels == 1)
    return float(2 * hits / named) if named else 0.0


def matthews(predicted: NDArray, labels: NDArray) -> float:
    """The correlation of two binary variables; 0 where one of them is constant."""
    return pearson(predicted == 1, labels == 1)


def pearson(predicted: NDArray, labels: NDArray) -> float:
    """The correlation of two variables; 0 where one of them is constant."""
    x, y = (values.astype(np.float64) - values.astype(np.float64).mean() for values in (predicted, labels))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else 0.0


def spearman(predicted: NDArray, labels: NDArray) -> float:
    return pearson(ranks(predicted), ranks(labels))


def ranks(values: NDArray) -> NDArray:
    """Rank of each value; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[group]


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
GLUE = {
    "cola": GlueTask(("sentence",), 2, ("matthews_correlation",)),
    "sst2": GlueTask(("sentence",), 2, ("accuracy",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), 2, ("accuracy", "f1")),
    "stsb": GlueTask(("sentence1", "sentence2"), 1, ("pearson", "spearman")),
    "qqp": GlueTask(("question1", "question2"), 2, ("accuracy", "f1")),
    "mnli": GlueTask(("premise", "hypothesis"), 3, ("accuracy",), ("validation_matched", "validation_mismatched")),
    "qnli": GlueTask(("question", "sentence"), 2, ("accuracy",)),
    "rte": GlueTask(("sentence1", "sentence2"), 2, ("accuracy",)),
    "wnli": GlueTask(("sentence1", "sentence2"), 2, ("accuracy",)),
}


def measure(task: GlueTask, logits: NDArray, labels: NDArray) -> dict[str, float]:
    """The task's metrics from logits [N, num_labels] and labels [N]."""
    predicted = logits.reshape(len(labels)) if task.num_labels == 1 else logits.argmax(-1)
    return {name: METRICS[name](predicted, labels) for name in task.metrics}


# ------------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class GlueData:
    """Encoded rows: to train on, to choose the best step by, and to report on, by split."""

    train: list[dict]
    validation: list[dict]
    reported: dict[str, list[dict]]


def task_problems(options: GlueOptions) -> list[str]:
    """Faults that need no file to be opened."""
    problems = []
    if options.task_name not in GLUE:
        problems.append(f"--task_name: got {options.task_name!r}, wanted {', '.join(GLUE)}")
    if not 0 < options.validation_fraction < 1:
        problems.append(f"--validation_fraction: got {options.validation_fraction}, wanted more than 0 and less than 1")
    for name in ("max_length", "max_train_examples", "max_validation_examples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"--{name}: got {value}, wanted 1 or more")
    return problems


def read(options: GlueOptions) -> dict[str, Sequence[Row]]:
    """Rows by split, checked.

    Raises:
        BadInput: splits that are missing, columns that are missing, labels that are none of the task's.
    """
    task = GLUE[str(options.task_name)]
    subset = options.task_name if options.dataset_name == SOURCE else None
    splits: dict[str, Sequence[Row] | None]
    if holds_tsv(options.dataset_name):
        kind = str(options.task_name)
        splits = {n: read_tsv(options.dataset_name, n, kind, task.columns) for n in ("train", *task.reported)}
    else:
        splits = {n: read_rows(options.dataset_name, n, subset) for n in ("train", *task.reported)}
    refuse(f"{options.dataset_name}: has no split {name!r}" for name, rows in splits.items() if rows is None)
    found: dict[str, Sequence[Row]] = {name: rows for name, rows in splits.items() if rows is not None}
    problems = [problem for name, rows in found.items() for problem in row_problems(task, rows, name)]
    if not problems and len(found["train"]) < 2:
        problems.append(f"train: got {len(found['train'])} rows, wanted at least one to train on and one to choose by")
    refuse(problems)
    return found


def prepare(
    options: GlueOptions,
    tokenizer: "PreTrainedTokenizerBase",
    found: Mapping[str, Sequence[Row]],
    seed: int,
    embedded: int | None = None,
) -> GlueData:
    """Set a share of train apart, and encode.

    Raises:
        BadInput: rows with tokens beyond the `embedded` ones, those that the model has an embedding for.
    """
    from .encoder import rowless

    task = GLUE[str(options.task_name)]
    train, validation = carve(found["train"], options.validation_fraction, seed, options.max_validation_examples)

    splits = {"train": choose(train, options.max_train_examples, seed), "validation": validation}
    examples: dict[str, list[dict]] = {}
    problems = []
    for name, rows in (splits | {f"reported {name}": found[name] for name in task.reported}).items():
        examples[name] = [encode_row(task, row, tokenizer, options.max_length) for row in rows]
        for number, example in zip(numbers_of(rows), examples[name], strict=True):
            if fault := rowless(example["input_ids"], tokenizer, embedded):
                problems.append(f"{name.removeprefix('reported ')} row {number}: {fault}")
    refuse(problems[:10])
    reported = {name: examples[f"reported {name}"] for name in task.reported}
    return GlueData(examples["train"], examples["validation"], reported)


def row_problems(task: GlueTask, rows: Sequence[Row], where: str) -> list[str]:
    problems = column_problems(rows, (*task.columns, "label"), where)
    if problems:
        return problems
    if not len(rows):
        return [f"{where}: there are no rows"]
    labels = [row["label"] for row in rows]
    wanted = "a number from 0 to 5" if task.num_labels == 1 else f"a number from 0 to {task.num_labels - 1}"
    bad = [n for n, label in enumerate(labels, 1) if not is_label(task, label)]
    if not bad:
        return []
    return [f"{where}: label {labels[bad[0] - 1]!r} in row {bad[0]} (rows {listing(bad)}), wanted {wanted}"]


def is_label(task: GlueTask, label: object) -> bool:
    if task.num_labels == 1:
        return isinstance(label, int | float) and 0 <= label <= 5
    return isinstance(label, int) and 0 <= label < task.num_labels


def encode_row(task: GlueTask, row: Row, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> dict:
    texts = [row[column] for column in task.columns]
    label = float(row["label"]) if task.num_labels == 1 else int(row["label"])
    return dict(tokenizer(*texts, truncation=True, max_length=max_length)) | {"labels": label}
