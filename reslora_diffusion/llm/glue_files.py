"""GLUE as its authors publish it: tab-separated files of each task, as `download_glue_data.py` leaves them.

    RTE/train.tsv, RTE/dev.tsv          index  sentence1  sentence2  label
    MNLI/dev_matched.tsv, ...           many columns, gold_label
    CoLA/train.tsv                      without a line of names: source, label, mark, sentence

Nothing is quoted. A row that lacks a field, of which QQP has some, is left out, and how many are is said.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..utils.problems import BadInput, listing, shortened
from .records import Row

ENTAILMENT = ("entailment", "not_entailment")
NAMES = {"mnli": ("entailment", "neutral", "contradiction"), "qnli": ENTAILMENT, "rte": ENTAILMENT}
COLUMNS: dict[str, Mapping[str, str]] = {  # ours: theirs, where they differ
    "mrpc": {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    "stsb": {"label": "score"},
    "qqp": {"label": "is_duplicate"},
    "mnli": {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
}
WITHOUT_NAMES = {"cola": ("source", "label", "mark", "sentence")}
FILES = {
    "train": "train.tsv",
    "validation": "dev.tsv",
    "validation_matched": "dev_matched.tsv",
    "validation_mismatched": "dev_mismatched.tsv",
}


def holds_tsv(source: str) -> bool:
    return Path(source, FILES["train"]).is_file()


def read_tsv(source: str, split: str, task: str, columns: Sequence[str]) -> list[Row] | None:
    """Rows of one split with the columns that the task has on the hub, None if there is no such file.

    Raises:
        BadInput: the file cannot be read, lacks a column, or has labels that the task does not have.
    """
    path = Path(source, FILES[split])
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput([f"{path}: {error}"]) from error
    table = [line.removesuffix("\r").split("\t") for line in lines if line.strip()]
    if not table:
        raise BadInput([f"{path}: is empty"])
    head = WITHOUT_NAMES.get(task) or table.pop(0)
    theirs = {name: COLUMNS.get(task, {}).get(name, name) for name in (*columns, "label")}
    if missing := [name for name in theirs.values() if name not in head]:
        raise BadInput([f"{path}: has no column {', '.join(missing)}; it has {listing(head, 12)}"])
    places = {name: head.index(column) for name, column in theirs.items()}
    whole = [fields for fields in table if all(place < len(fields) and fields[place] for place in places.values())]
    if len(whole) < len(table):
        print(f"{path}: left out {len(table) - len(whole)} of {len(table)} rows that lack a field")
    rows: list[Row] = []
    bad = []
    for number, fields in enumerate(whole, 1):
        row = {name: fields[place] for name, place in places.items()}
        try:
            rows.append(row | {"label": label_of(task, row["label"])})
        except ValueError:
            bad.append(f"{path} row {number}: got label {shortened(row['label'])}, wanted {wanted(task)}")
    if bad:
        raise BadInput(bad[:10])
    return rows


def label_of(task: str, text: str) -> int | float:
    if task in NAMES:
        return NAMES[task].index(text)
    return float(text) if task == "stsb" else int(text)


def wanted(task: str) -> str:
    return ", ".join(NAMES[task]) if task in NAMES else "a number"
