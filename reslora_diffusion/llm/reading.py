"""Reads and checks the rows of a data set and the conversations in them, as options say, without torch.

Where a data set has no split to choose the best step on, a random share of train is set apart for it. Test rows are
read for the final report and for nothing else. Several data sets are read one after the other, each in its own format,
and learned as one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.problems import BadInput, listing, refuse
from .forms import NAMES, Form, conversations, form_of, unread_columns
from .options import LlmOptions
from .records import Messages, Row, carve, choose, joined, missing_files, names_of, read_rows
from .tasks import TASKS, Task, needs_rows, usable

Rows = Sequence[Row]
SPLITS = ("train", "validation", "test")


@dataclass
class Reading:
    """Rows and conversations by split: train, validation, test (empty where there is none); `notes` say what was left
    out."""

    rows: dict[str, Rows]
    talks: dict[str, list[Messages]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def option_problems(options: LlmOptions) -> list[str]:
    """Faults that need no file to be opened."""
    problems = []
    if options.task is not None and options.task not in TASKS:
        problems.append(f"--task: got {options.task!r}, wanted {', '.join(TASKS)}")
    if not options.dataset_name and (options.task is None or needs_rows(options.task)):
        problems.append("--dataset_name: got nothing, wanted a .jsonl file, a folder with train.jsonl, or a data set")
    problems += missing_files(options.dataset_name)
    if options.task and len(names_of(options.dataset_name)) > 1:
        problems.append(f"--dataset_name: got several, but --task {options.task} judges one data set; wanted one")
    if options.task and columns_of(options):
        problems.append(f"--prompt_column, --response_column, --columns: --task {options.task} knows its columns")
    for name in (options.columns or {}).keys() - {*NAMES}:
        problems.append(f"--columns: got {name}=..., wanted names among {', '.join(NAMES)}")
    if options.drop_long and options.cut_long:
        problems.append("--cut_long: got --drop_long too, wanted one of them")
    if options.training_template and options.prompt_template:
        problems.append("--training_template: --prompt_template overrides chat templates; wanted one of them")
    if options.prompt_template is not None and "{prompt}" not in options.prompt_template:
        problems.append(f"--prompt_template: got {options.prompt_template!r}, wanted {{prompt}} in it")
    if not 0 < options.validation_fraction < 1:
        problems.append(f"--validation_fraction: got {options.validation_fraction}, wanted more than 0 and less than 1")
    for name in (
        "max_length",
        "max_new_tokens",
        "max_total_tokens",
        "num_beams",
        "max_train_examples",
        "max_eval_examples",
    ):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"--{name}: got {value}, wanted 1 or more")
    return problems


def columns_of(options: LlmOptions) -> dict[str, str]:
    """Columns of the data set by our names for them."""
    named = {"prompt": options.prompt_column, "response": options.response_column}
    return (options.columns or {}) | {name: column for name, column in named.items() if column}


def sources(options: LlmOptions) -> list[str]:
    """The data sets to read; without any named, the task's own."""
    return names_of(options.dataset_name) or ([TASKS[options.task].source] if options.task else [])


def rows_of(source: str, options: LlmOptions, seed: int) -> tuple[Rows, Rows, Rows]:
    """`(train, validation, test)` of one data set; test is empty where there is none."""
    task = TASKS[options.task] if options.task else None
    local = Path(source).exists()
    own = task is not None and source == task.source
    subset = options.dataset_config or (task.subset if task and own else None)
    revision = task.revision if task and own else None

    def read(split: str) -> Rows | None:
        return read_rows(source, split, subset, revision)

    split = options.dataset_train_split
    train = read(split)
    if train is None:
        lacks = "is one file, whose split is 'train'" if Path(source).is_file() else f"has no split {split!r}"
        raise BadInput([f"{source}: {lacks}" + (f"; wanted {split}.jsonl in it" if Path(source).is_dir() else "")])
    if task is None or local:
        validation, test = read("validation"), (read("test") if task else None)
    else:
        validation = read(task.validation_split) if task.validation_split else None
        test = test_rows(task, read)
    if not len(train):
        raise BadInput([f"{source}: split {split!r} has no rows"])
    if validation is None:
        if len(train) < 2:
            raise BadInput([f"{source}: got {len(train)} row, wanted at least one to train on and one to validate on"])
        train, validation = carve(train, options.validation_fraction, seed)
    return (
        choose(train, options.max_train_examples, seed),
        choose(validation, options.max_eval_examples, seed),
        choose(test or [], options.max_eval_examples, seed),
    )


def test_rows(task: Task, read: Callable[[str], Rows | None]) -> Rows | None:
    if task.test_task is None:
        return read(task.test_split)
    other = TASKS[task.test_task]
    return read_rows(other.source, other.test_split, other.subset, other.revision)


def read(options: LlmOptions, seed: int) -> Reading:
    """Read and check everything that is trained and tested on.

    Raises:
        BadInput: every problem of the first stage that has any: files, then columns and answers.
    """
    names = sources(options)
    files: list[tuple[str, tuple[Rows, Rows, Rows]]] = []
    found, problems = Reading({}), []
    for source in names:
        try:
            files.append((source, rows_of(source, options, seed)))
        except BadInput as error:
            problems += error.problems
    refuse(problems)
    found.notes += [note for source in names for note in file_notes(source, options)]
    for place, split in enumerate(SPLITS):
        parts: list[tuple[str, Rows]] = []
        talks: list[Messages] = []
        for source, rows in files:
            try:
                one, new = one_split(found, rows[place], split, source if len(files) > 1 else "", options)
                parts.append((Path(source).name, one))
                talks += new
            except BadInput as error:
                problems += error.problems
        found.rows[split], found.talks[split] = joined(parts) if parts else [], talks
    refuse(problems)
    return found


def one_split(
    found: Reading, rows: Rows, split: str, source: str, options: LlmOptions
) -> tuple[Rows, Sequence[Messages]]:
    """`(rows, conversations)` of one split of one data set; says in `found` what was recognised and left out.

    Args:
        source: the data set's name, if there are several.

    Raises:
        BadInput: as of `read`.
    """
    where = f"{source} {split}".strip()
    if options.task is None:
        columns = columns_of(options)
        if source and len(rows):  # every data set has some of the columns that are named
            columns = {ours: column for ours, column in columns.items() if column in rows[0]}
        form = form_of(rows, columns)
        found.notes += column_notes(rows, form, where)
        if form.rejected:
            found.notes.append(f"{where}: {form.rejected!r} is not learned from here; reslora dpo learns from both")
        return rows, conversations(rows, columns, where, form) if len(rows) else []
    judge = test_judge(options) if split == "test" else TASKS[options.task]
    rows, unread = usable(judge, rows, where)
    if unread:
        found.notes.append(f"{where}: left out rows without a readable answer: {listing(unread)}")
    return rows, [judge.messages(row) for row in rows]


def file_notes(source: str, options: LlmOptions) -> list[str]:
    """Files of a local folder that are no split of ours, such as dev.jsonl."""
    folder = Path(source)
    read = {options.dataset_train_split, "validation", *(["test"] if options.task else [])}
    others = sorted(path.name for path in folder.glob("*.jsonl") if path.stem not in read)
    return [f"{folder}: files that are not read: {listing(others)}"] if others else []


def column_notes(rows: Rows, form: Form, name: str) -> list[str]:
    """Say which columns were read together, and which were not read at all."""
    notes = [f"{name}: {len(rows)} rows, read as {form}"] if len(rows) else []
    if form.context and any(row.get(form.context) for row in rows):
        notes.append(f"{name}: prompts are {form.prompt!r} and, after a blank line, {form.context!r}")
    if form.system and any(row.get(form.system) for row in rows):
        notes.append(f"{name}: {form.system!r} is the turn of the system")
    if unread := unread_columns(rows, form) if rows else []:
        notes.append(f"{name}: columns that are not read: {listing(unread, 12)}")
    return notes


def test_judge(options: LlmOptions) -> Task:
    """The data set whose columns the test rows have: another one, where the task borrows its test."""
    task = TASKS[str(options.task)]
    borrowed = task.test_task is not None and (options.dataset_name in (None, task.source))
    return TASKS[str(task.test_task)] if borrowed else task
