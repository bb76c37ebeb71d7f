"""From what was read to what a run learns and is asked: encoded examples, and the questions of validation and test."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ..utils.problems import BadInput, refuse
from .encoder import Encoded, Encoder
from .encoding import encode_all, row_problems
from .generation import Question
from .options import LlmOptions
from .reading import Reading, test_judge
from .records import numbers_of
from .tasks import TASKS


@dataclass
class Data:
    """What a run reads. Questions are empty where nothing is to be generated; `notes` say what was left out, `ends` are
    the tokens by which answers end in training, at which generation has to stop."""

    train: list[Encoded]
    validation: list[Encoded]
    validation_questions: list[Question] = field(default_factory=list)
    test_questions: list[Question] = field(default_factory=list)
    read: Callable[[str], str | None] | None = None
    test_read: Callable[[str], str | None] | None = None
    ends: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepare(
    options: LlmOptions,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    rows: int | None = None,
    ends: Collection[int] = (),
) -> Data:
    """Encode everything.

    Args:
        rows: of the model's embedding.
        ends: tokens that the model's generation stops at.

    Raises:
        BadInput: examples that are too long, that the chat template does not take, or whose tokens have no rows.
    """
    assert options.max_length is not None, "the model's context tells where nobody does"
    notes, problems, examples = [*reading.notes], [], {}
    for name in ("train", "validation"):
        try:
            examples[name], dropped = encode_all(
                reading.talks[name],
                tokenizer,
                max_length=options.max_length,
                prompt_template=options.prompt_template,
                drop_long=options.drop_long,
                where=name,
                numbers=numbers_of(reading.rows[name]),
                rows=rows,
                ends=ends,
            )
            notes += [f"{name}: dropped {dropped} examples of more than {options.max_length} tokens"] if dropped else []
            if len(examples[name]) > len(reading.talks[name]) - dropped:
                notes.append(
                    f"{name}: the chat template rewrites earlier turns, so {len(reading.talks[name]) - dropped} "
                    f"conversations are learned as {len(examples[name])} answers, each behind its own context"
                )
        except BadInput as error:
            problems += error.problems
    encoder = Encoder(tokenizer, options.prompt_template, rows, ends)
    questions: dict[str, list[Question]] = {"validation": [], "test": []}
    judges = {"validation": TASKS[options.task], "test": test_judge(options)} if options.task else {}
    for name, judge in judges.items():
        faults: dict[str, list[int]] = {}
        split = reading.rows[name]
        for number, talk, row in zip(numbers_of(split), reading.talks[name], split, strict=True):
            try:
                questions[name].append(Question(encoder.encode_prompt(talk[:-1]), judge.answer(row)))
            except ValueError as error:
                faults.setdefault(str(error), []).append(number)
        problems += [problem for problem in row_problems(faults, name) if problem not in problems]
    refuse(problems)
    data = Data(examples["train"], examples["validation"], questions["validation"], questions["test"], notes=notes)
    data.ends = sorted({example["end"] for example in data.train})
    if options.task:
        data.read, data.test_read = TASKS[options.task].read, test_judge(options).read
    return data
