"""Makes the data of a run from rows that were read: encoded examples, and the questions of validation and test."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ..utils.problems import BadInput, refuse
from .encoder import Encoded, Encoder
from .encoding import encode_all, row_problems
from .forms import TEXT
from .generation import Question
from .options import LlmOptions
from .reading import Reading, test_judge
from .records import Messages, Number, numbers_of
from .showing import first_example, statistics
from .tasks import TASKS


@dataclass
class Data:
    """The data of a run. Questions are empty where nothing is generated; `notes` say what was left out, `ends` are
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
    training_template = template_for_training(tokenizer) if options.training_template else None
    for name in ("train", "validation"):
        try:
            examples[name], dropped = encode_all(
                reading.talks[name],
                tokenizer,
                max_length=options.max_length,
                prompt_template=options.prompt_template,
                drop_long=options.drop_long,
                cut_long=options.cut_long,
                where=name,
                numbers=numbers_of(reading.rows[name]),
                rows=rows,
                ends=ends,
                training_template=training_template,
            )
            notes += length_notes(name, reading.talks[name], examples[name], dropped, options)
        except BadInput as error:
            problems += error.problems
    if examples.get("train"):
        notes += [*statistics(examples["train"], options.max_length), *first_example(examples["train"][0], tokenizer)]
    encoder = Encoder(tokenizer, options.prompt_template, rows, ends)
    questions: dict[str, list[Question]] = {"validation": [], "test": []}
    judges = {"validation": TASKS[options.task], "test": test_judge(options)} if options.task else {}
    for name, judge in judges.items():
        faults: dict[str, list[Number]] = {}
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


def length_notes(
    name: str, talks: Sequence[Messages], examples: Sequence[Encoded], long: int, options: LlmOptions
) -> Iterator[str]:
    """Say how many conversations were cut, dropped, or are learned in several sequences."""
    if long and options.cut_long:
        yield f"{name}: cut {long} conversations to their first {options.max_length} tokens"
    elif long:
        yield f"{name}: dropped {long} examples of more than {options.max_length} tokens"
    count = len(talks) - (0 if options.cut_long else long)
    if len(examples) <= count:
        return
    if talks[0][0]["role"] == TEXT:
        yield f"{name}: {count} texts are learned in {len(examples)} windows of at most {options.max_length} tokens"
    else:
        yield (
            f"{name}: the chat template rewrites earlier turns, so {count} conversations are learned as "
            f"{len(examples)} answers, each behind its own context (--training_template learns them in one sequence)"
        )


def template_for_training(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's training template, None where the tokenizer's own is one.

    Raises:
        BadInput: TRL is not installed, or has none for the tokenizer's chat template.
    """
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError as error:
        raise BadInput(["--training_template: needs the package trl (pip install 'reslora-diffusion[llm]')"]) from error
    if not tokenizer.chat_template:
        raise BadInput(["--training_template: the tokenizer has no chat template"])
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise BadInput(
            [
                "--training_template: TRL has no training template for the tokenizer's chat template, which marks no "
                "{% generation %}; without the option answers are cut out by what the template writes"
            ]
        ) from error
