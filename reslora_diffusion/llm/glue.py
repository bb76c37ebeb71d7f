"""The nine GLUE tasks: columns, splits and metrics.

    accuracy, F1 (of class 1), Matthews' correlation, Pearson's and Spearman's correlation

as GLUE defines them, in float64. The first metric of a task chooses its best step, on rows set apart from train; the
validation split, the only labelled one that is left, is what is reported.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SOURCE = "nyu-mll/glue"
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
