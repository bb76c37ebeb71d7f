"""From what was read to what a run learns and is asked: encoded examples, and the questions of validation and test."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ..problems import BadInput, refuse
from .encoding import Encoded, encode_all, encode_prompt
from .generation import Question
from .options import LlmOptions
from .reading import Reading, test_judge
from .records import numbers_of
from .tasks import TASKS, Task


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


def prepare(options: LlmOptions, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> Data:
    """Encode everything.

    Raises:
        BadInput: examples that are too long.
    """
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
            )
            notes += [f"{name}: dropped {dropped} examples of more than {options.max_length} tokens"] if dropped else []
        except BadInput as error:
            problems += error.problems
    refuse(problems)
    data = Data(examples["train"], examples["validation"], notes=notes)
    if options.task:
        task = TASKS[options.task]

        def questions(name: str, judge: Task) -> list[Question]:
            prompts = [encode_prompt(talk[:-1], tokenizer, options.prompt_template) for talk in reading.talks[name]]
            answers = [judge.answer(row) for row in reading.rows[name]]
            return [Question(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

        data.validation_questions = questions("validation", task)
        data.test_questions = questions("test", test_judge(options))
        data.read, data.test_read = task.read, test_judge(options).read
    return data
