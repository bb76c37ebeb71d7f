"""The five reasoning tasks of ResLoRA's paper, and rows of your own: what is asked, and what counts as right.

    task         data set (`datasets` name)   answer                   best step chosen on  reported on
    gsm8k        openai/gsm8k, main           number after "####"      part of train        test
    svamp        ChilleD/SVAMP                number                   part of train        test
    mathqa       allenai/math_qa              letter a to e            validation           test
    metamathqa   meta-math/MetaMathQA         number or LaTeX          part of train        GSM8K's test
    hellaswag    Rowan/hellaswag              number 0 to 3            part of train        validation
    answers      --dataset_name               word, number or LaTeX    part of train        test

(HellaSwag's test split is unlabelled.) Prompts are those of the authors' code, but for a space that SVAMP lacks there
between story and question; responses follow it, every one ending in "The answer is X.", so that one rule reads all
answers. Unlike theirs, no step is ever chosen by test results. Answers are generated: the shares are not those that
lm-eval reports as `acc` for mathqa and hellaswag, where the likelihoods of the given choices are compared.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..utils.problems import BAD_DATA, listing, refuse
from .records import Messages, Number, Numbered, Row, column_problems, numbers_of, part

ANSWER = "The answer is"
UNREADABLE = 0.01
NUMBER = re.compile(r"-?\$?-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Task:
    """One reasoning task. `ask`, `respond` and `answer` read a row of its data set, `read` a generated response."""

    source: str
    columns: Sequence[str]
    ask: Callable[[Row], str]
    respond: Callable[[Row], str]
    answer: Callable[[Row], str]
    read: Callable[[str], str | None]
    subset: str | None = None
    revision: str | None = None
    validation_split: str | None = None
    test_split: str = "test"
    test_task: str | None = None  # whose test set is used, if the data set has none

    def messages(self, row: Row) -> Messages:
        """Prompt and response as a conversation."""
        return [
            {"role": "user", "content": self.ask(row)},
            {"role": "assistant", "content": self.respond(row)},
        ]


def usable(task: Task, rows: Sequence[Row], where: str) -> tuple[Numbered, list[Number]]:
    """`(rows with a readable answer, numbers of the others)`.

    Raises:
        BadInput: columns are missing, or more than one row in a hundred has no readable answer (an unlabelled split).
    """
    refuse(column_problems(rows, task.columns, where))
    good: list[int] = []
    others: list[int] = []
    for place, row in enumerate(rows):
        try:
            answer = task.answer(row)
            readable = answer and task.read(task.respond(row)) == answer and task.messages(row)
        except BAD_DATA:  # a value of another type
            readable = False
        (good if readable else others).append(place)
    bad = [numbers_of(rows)[place] for place in others]
    if len(bad) > UNREADABLE * len(rows):
        refuse([f"{where}: {len(bad)} of {len(rows)} rows have no readable answer: row {listing(bad)}"])
    return part(rows, good), bad


def needs_rows(name: str) -> bool:
    """Return whether a task has no data set of its own."""
    return name in TASKS and not TASKS[name].source


# ------------------------------------------------------------------------------------------------------ answers


def normalized(answer: str) -> str:
    """One spelling per answer: numbers without $, commas and needless decimals; other text with single spaces."""
    text = " ".join(answer.replace("\N{MINUS SIGN}", "-").split()).rstrip(".").rstrip()
    if NUMBER.fullmatch(text):
        number = text.replace("$", "").replace(",", "")
        if "." in number:
            return f"{float(number):.10g}"
        digits = number.lstrip("-0") or "0"  # Python makes no number of more than some thousand digits
        return f"-{digits}" if number.startswith("-") and digits != "0" else digits
    return text


def stated(response: str) -> str | None:
    """Return what follows the last "The answer is" (or the last "####")."""
    for mark in (ANSWER, "####"):
        _, found, rest = response.rpartition(mark)
        if found:
            return rest.removeprefix(":").strip()
    return None


def read_text(response: str) -> str | None:
    return normalized(stated(response) or "") or None


def read_number(response: str) -> str | None:
    """The first number of the stated answer; without a stated answer the last number of the response."""
    response = response.replace("\N{MINUS SIGN}", "-")
    answer = stated(response)
    numbers = NUMBER.findall(response if answer is None else answer)
    return normalized(numbers[0 if answer is not None else -1]) if numbers else None


def read_short(response: str) -> str | None:
    """The stated answer; without one the last word of the response."""
    if stated(response):
        return read_text(response)
    words = re.findall(r"\w+", response)
    return normalized(words[-1]) if words else None


def read_choice(response: str, choices: str) -> str | None:
    """The first of the choices' letters or digits that stands alone in the stated answer; capitals count too."""
    found = re.search(rf"(?<!\w)[{choices}](?!\w)", stated(response) or "", re.IGNORECASE)
    return found.group().lower() if found else None


# --------------------------------------------------------------------------------------------------------- rows


def gsm8k_response(row: Row) -> str:
    """The worked solution without its calculator notes, on one line."""
    steps, _, answer = row["answer"].rpartition("####")
    text = " ".join(re.sub(r"<<[^<>]*>>", "", steps).split())
    return f"{text} {ANSWER} {normalized(answer)}."


def svamp_response(row: Row) -> str:
    """The equation, with 8.0 written as 8: the decimals are an artefact of how the set was made."""
    equation = re.sub(r"(?<!\d)(\d+)\.0\b", r"\1", str(row["Equation"]).strip())
    return f"{equation}. {ANSWER} {normalized(str(row['Answer']))}."


def mathqa_question(row: Row) -> str:
    count = row["options"].count(")")
    return f"{row['Problem']}\nThere are {count} options: {row['options']}\nPlease answer the correct option."


def mathqa_response(row: Row) -> str:
    rationale = " ".join(str(row["Rationale"]).strip().strip('"').split())
    return f"{rationale} {ANSWER} {row['correct'].strip().lower()}."


def metamathqa_response(row: Row) -> str:
    """One of the set's two notes of the answer is dropped: "#### 18" before "The answer is: 18"."""
    steps, _, answer = row["response"].rpartition("The answer is:")
    before, note, rest = steps.rstrip().rpartition("\n####")
    steps = before if note and "\n" not in rest else steps
    return f"{steps.strip()}\n{ANSWER} {answer.strip().rstrip('.')}."


def metamathqa_answer(row: Row) -> str:
    _, found, answer = row["response"].rpartition("The answer is:")
    return normalized(answer) if found else ""


def hellaswag_question(row: Row) -> str:
    endings = "\n".join(f"{number}: {ending}" for number, ending in enumerate(row["endings"]))
    return (
        f'Here is a sentence to be continued: "{row["ctx"]}"\nThere are 4 options as an ending:\n{endings}\n'
        "Please select the correct option and answer with a number between 0 and 3."
    )


TASKS = {
    "gsm8k": Task(
        source="openai/gsm8k",
        subset="main",
        columns=("question", "answer"),
        ask=lambda row: row["question"].strip(),
        respond=gsm8k_response,
        answer=lambda row: normalized(row["answer"].rpartition("####")[2]),
        read=read_number,
    ),
    "svamp": Task(
        source="ChilleD/SVAMP",
        columns=("Body", "Question", "Equation", "Answer"),
        ask=lambda row: f"{row['Body'].strip()} {row['Question'].strip()}",
        respond=svamp_response,
        answer=lambda row: normalized(str(row["Answer"])),
        read=read_number,
    ),
    "mathqa": Task(
        source="allenai/math_qa",
        revision="refs/convert/parquet",  # the main branch is a script, which `datasets` no longer runs
        columns=("Problem", "Rationale", "options", "correct"),
        ask=mathqa_question,
        respond=mathqa_response,
        answer=lambda row: row["correct"].strip().lower(),
        read=partial(read_choice, choices="a-e"),
        validation_split="validation",
    ),
    "metamathqa": Task(
        source="meta-math/MetaMathQA",
        columns=("query", "response"),
        ask=lambda row: row["query"].strip(),
        respond=metamathqa_response,
        answer=metamathqa_answer,
        read=read_text,
        test_task="gsm8k",
    ),
    "hellaswag": Task(
        source="Rowan/hellaswag",
        columns=("ctx", "endings", "label"),
        ask=hellaswag_question,
        respond=lambda row: f"{ANSWER} {row['label']}.",
        answer=lambda row: str(row["label"]).strip(),
        read=partial(read_choice, choices="0-3"),
        test_split="validation",
    ),
    "answers": Task(
        source="",  # rows of one's own, such as those of reasoning-gym
        columns=("question", "answer"),
        ask=lambda row: row["question"].strip(),
        respond=lambda row: f"{ANSWER} {normalized(str(row['answer']))}.",
        answer=lambda row: normalized(str(row["answer"])),
        read=read_short,
    ),
}
