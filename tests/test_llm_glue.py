"""GLUE's metrics against numbers worked out by hand and, where it is installed, scikit-learn and SciPy."""

import numpy as np
import pytest

from reslora_diffusion.llm.glue import GLUE, METRICS, accuracy, f1, matthews, measure, pearson, ranks, spearman

PREDICTED = np.array([1, 1, 1, 0, 0, 0, 1, 0])
LABELS = np.array([1, 0, 1, 0, 1, 0, 1, 1])  # TP 3, FP 1, FN 2, TN 2


def test_counts_worked_out_by_hand():
    assert accuracy(PREDICTED, LABELS) == 5 / 8
    assert f1(PREDICTED, LABELS) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert matthews(PREDICTED, LABELS) == pytest.approx((3 * 2 - 1 * 2) / np.sqrt(4 * 5 * 3 * 4))


def test_correlations_worked_out_by_hand():
    x, y = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 6.0])
    assert pearson(x, y) == pytest.approx(5 / np.sqrt(2 * 14))
    assert spearman(x, y) == pytest.approx(1.0)
    assert ranks(np.array([10.0, 30.0, 10.0, 20.0])).tolist() == [1.5, 4.0, 1.5, 3.0]


def test_constant_predictions_have_no_correlation():
    constant = np.zeros(8)
    assert matthews(constant, LABELS) == 0
    assert pearson(constant, LABELS) == 0
    assert f1(constant, np.zeros(8)) == 0


def test_against_other_implementations():
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    predicted, labels = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    assert f1(predicted, labels) == pytest.approx(metrics.f1_score(labels, predicted))
    assert matthews(predicted, labels) == pytest.approx(metrics.matthews_corrcoef(labels, predicted))
    x, y = rng.integers(0, 9, 200).astype(float), rng.normal(size=200)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_nine_tasks_with_their_metrics():
    assert len(GLUE) == 9
    assert {name: task.metrics for name, task in GLUE.items()} == {
        "cola": ("matthews_correlation",),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "stsb": ("pearson", "spearman"),
        "qqp": ("accuracy", "f1"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
    }
    assert set().union(*(task.metrics for task in GLUE.values())) == set(METRICS)
    assert GLUE["mnli"].reported == ("validation_matched", "validation_mismatched")


def test_logits_are_read_by_the_kind_of_task():
    logits = np.eye(3)[[0, 1, 2, 1]]
    assert measure(GLUE["mnli"], logits, np.array([0, 1, 2, 2])) == {"accuracy": 0.75}
    scores = np.array([[1.0], [2.0], [4.0]])
    assert measure(GLUE["stsb"], scores, np.array([1.0, 2.0, 3.0]))["spearman"] == pytest.approx(1.0)
