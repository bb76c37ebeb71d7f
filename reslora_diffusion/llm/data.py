"""From options to what a run reads: training and validation examples, and the questions of validation and test.

Where a data set has no split to choose the best step on, a random share of train is set apart for it. Test rows are
read for the final report and for nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..problems import BadInput, listing
from .encoding import Encoded, encode_all, encode_prompt
from .generation import Question
from .options import LlmOptions
from .records import Messages, Row, carve, choose, conversations, numbers_of, read_rows
from .tasks import TASKS, Task, usable

Rows = Sequence[Row]


@dataclass
class Data:
    """What a run reads. Questions are empty where nothing is to be generated; `notes` say what was left out."""

    train: list[Encoded]
    validation: list[Encoded]
    validation_questions: list[Question] = field(default_factory=list)
    test_questions: list[Question] = field(default_factory=list)
    read: Callable[[str], str | None] | None = None
    test_read: Callable[[str], str | None] | None = None
    notes: list[str] = field(default_factory=list)


def option_problems(options: LlmOptions) -> list[str]:
    """Faults that need no file to be opened."""
    problems = []
    if options.task is not None and options.task not in TASKS:
        problems.append(f"--task: got {options.task!r}, wanted {', '.join(TASKS)}")
    if options.task is None and not options.dataset_name:
        problems.append("--dataset_name: got nothing, wanted a .jsonl file, a folder with train.jsonl, or a data set")
    if options.task and (options.prompt_column or options.response_column):
        problems.append(f"--prompt_column, --response_column: --task {options.task} knows its columns")
    if options.prompt_template is not None and "{prompt}" not in options.prompt_template:
        problems.append(f"--prompt_template: got {options.prompt_template!r}, wanted {{prompt}} in it")
    if not 0 < options.validation_fraction < 1:
        problems.append(f"--validation_fraction: got {options.validation_fraction}, wanted more than 0 and less than 1")
    for name in ("max_length", "max_new_tokens", "num_beams", "max_train_examples", "max_eval_examples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"--{name}: got {value}, wanted 1 or more")
    return problems


def is_local(source: str) -> bool:
    return Path(source).exists()


def rows_of(options: LlmOptions, seed: int) -> tuple[Rows, Rows, Rows]:
    """`(train, validation, test)`; test is empty where there is none."""
    task = TASKS[options.task] if options.task else None
    source = options.dataset_name or (task.source if task else "")
    local = is_local(source)
    own = task is not None and source == task.source
    subset = options.dataset_config or (task.subset if task and own else None)
    revision = task.revision if task and own else None

    def read(split: str) -> Rows | None:
        return read_rows(source, split, subset, revision)

    train = read("train")
    if train is None:
        raise BadInput([f"{source}: has no split 'train'" + (", or no train.jsonl" if local else "")])
    if task is None or local:
        validation, test = read("validation"), (read("test") if task else None)
    else:
        validation = read(task.validation_split) if task.validation_split else None
        test = test_rows(task, read)
    if not len(train):
        raise BadInput([f"{source}: split 'train' has no rows"])
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


def prepare(options: LlmOptions, tokenizer: PreTrainedTokenizerBase, seed: int) -> Data:
    """Read, check and encode everything.

    Raises:
        BadInput: every problem of the first stage that has any: files, columns, lengths.
    """
    splits = dict(zip(("train", "validation", "test"), rows_of(options, seed), strict=True))
    task = TASKS[options.task] if options.task else None
    notes: list[str] = []
    problems: list[str] = []
    talks: dict[str, list[Messages]] = {}
    for name, rows in splits.items():
        try:
            if task is None:
                found = conversations(rows, options.prompt_column, options.response_column, name) if rows else []
            else:
                judge = test_judge(options) if name == "test" else task
                rows, unread = usable(judge, rows, name)
                splits[name] = rows
                notes += [f"{name}: left out rows without a readable answer: {listing(unread)}"] if unread else []
                found = [judge.messages(row) for row in rows]
            talks[name] = found
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    examples = {}
    for name in ("train", "validation"):
        try:
            examples[name], dropped = encode_all(
                talks[name],
                tokenizer,
                max_length=options.max_length,
                prompt_template=options.prompt_template,
                drop_long=options.drop_long,
                where=name,
                numbers=numbers_of(splits[name]),
            )
            notes += [f"{name}: dropped {dropped} examples of more than {options.max_length} tokens"] if dropped else []
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    data = Data(examples["train"], examples["validation"], notes=notes)
    if task is not None:

        def questions(name: str, judge: Task) -> list[Question]:
            prompts = [encode_prompt(talk[:-1], tokenizer, options.prompt_template) for talk in talks[name]]
            answers = [judge.answer(row) for row in splits[name]]
            return [Question(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

        data.validation_questions = questions("validation", task)
        data.test_questions = questions("test", test_judge(options))
        data.read, data.test_read = task.read, test_judge(options).read
    return data


def test_judge(options: LlmOptions) -> Task:
    """Whose columns the test rows have: another data set's, where the task borrows its test."""
    task = TASKS[str(options.task)]
    borrowed = task.test_task is not None and (options.dataset_name in (None, task.source))
    return TASKS[str(task.test_task)] if borrowed else task
