"""GLUE's metrics against numbers worked out by hand and, where it is installed, scikit-learn and SciPy."""

import numpy as np
import pytest

from reslora_diffusion.llm.glue import GLUE, METRICS, accuracy, f1, matthews, measure, pearson, ranks, read, spearman
from reslora_diffusion.llm.options import GlueOptions
from reslora_diffusion.utils.problems import BadInput

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


# ---------------------------------------------------------------------------------------------- the original files

TABLES = {
    "rte": 'index\tsentence1\tsentence2\tlabel\n0\tA "b c\td\tnot_entailment\n1\te\tf\tentailment\n',
    "cola": "gj04\t1\t\tOur friends.\ncj99\t0\t*\tThey drank.\n",
    "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n0\t7\t8\tc\td\n",
    "stsb": "index\tsentence1\tsentence2\tscore\n0\ta\tb\t5.000\n1\tc\td\t2.4\n",
    "qqp": "id\tquestion1\tquestion2\tis_duplicate\n1\ta\tb\t1\n2\tonly\n3\tc\td\t0\n",
}
FOUND = {
    "rte": [{"sentence1": 'A "b c', "sentence2": "d", "label": 1}, {"sentence1": "e", "sentence2": "f", "label": 0}],
    "cola": [{"sentence": "Our friends.", "label": 1}, {"sentence": "They drank.", "label": 0}],
    "mrpc": [{"sentence1": "a", "sentence2": "b", "label": 1}, {"sentence1": "c", "sentence2": "d", "label": 0}],
    "stsb": [{"sentence1": "a", "sentence2": "b", "label": 5.0}, {"sentence1": "c", "sentence2": "d", "label": 2.4}],
    "qqp": [{"question1": "a", "question2": "b", "label": 1}, {"question1": "c", "question2": "d", "label": 0}],
}


@pytest.mark.parametrize("name", TABLES)
def test_glues_own_files_are_read(name, tmp_path, capsys):
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / file).write_bytes(TABLES[name].replace("\n", "\r\n").encode())
    rows = read(GlueOptions(task_name=name, dataset_name=str(tmp_path)))
    assert rows["train"] == rows["validation"] == FOUND[name]
    assert ("left out 1 of 3 rows" in capsys.readouterr().out) == (name == "qqp")


def test_mnli_has_two_files_to_report_on(tmp_path):
    table = "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n1\tc\td\tcontradiction\n"
    for file in ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"):
        (tmp_path / file).write_text(table)
    rows = read(GlueOptions(task_name="mnli", dataset_name=str(tmp_path)))
    assert rows.keys() == {"train", "validation_matched", "validation_mismatched"}
    assert rows["train"][1] == {"premise": "c", "hypothesis": "d", "label": 2}


def test_what_is_wrong_with_a_file_of_glue_is_said(tmp_path):
    options = GlueOptions(task_name="rte", dataset_name=str(tmp_path))
    (tmp_path / "train.tsv").write_text("index\tsentence1\tlabel\n0\ta\tentailment\n")
    with pytest.raises(BadInput, match="has no column sentence2; it has index, sentence1, label"):
        read(options)
    (tmp_path / "train.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\tmaybe\n")
    with pytest.raises(BadInput, match="row 1: got label 'maybe', wanted entailment, not_entailment"):
        read(options)
