"""Rows of a data set, from local JSON lines or by a `datasets` name, and the conversations in them.

    rows = read_rows("data/train.jsonl")               one file
    rows = read_rows("data", "train")                  data/train.jsonl
    rows = read_rows("openai/gsm8k", "train", "main")  anything `datasets.load_dataset` knows

A row holds one conversation in one of the field's forms:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    {"prompt": ..., "response": ...}                      or "completion"; two other columns by name
    {"instruction": ..., "input": ..., "output": ...}     Alpaca's; "context" and "response" are Dolly's

and "system" or "system_prompt" beside the latter two. Columns that are not read are named before training; those that
would change what a conversation means (`NOT_READ`) are refused.

Every bad line of a file is reported, by number and with its text, before anything is read by a model.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.hub import unreachable
from ..utils.json_lines import lines_of, parse
from ..utils.problems import BadInput, listing

Row = Mapping[str, Any]
Messages = list[dict[str, str]]
RESPONSE_COLUMNS = ("response", "completion")
CONTEXTS = {"instruction": ("input", "context")}  # by column of the prompt: Alpaca's, Dolly's
SYSTEM_COLUMNS = ("system", "system_prompt")
NOT_READ = ("tools", "functions", "history")  # they change what a conversation means
ROLES = ("system", "user", "assistant")
SHOWN = 10


def read_json_lines(path: Path) -> list[Row]:
    """Objects of a JSON lines file.

    Raises:
        BadInput: lines that are empty or not JSON objects, each with number and text.
    """
    try:
        lines = lines_of(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput([f"{path}: {error}"]) from error
    rows: list[Row] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse(line)
        except ValueError as error:
            problems.append(f"{path} line {number}: {error}: {line[:120]!r}")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            problems.append(f"{path} line {number}: got {type(row).__name__}, wanted an object: {line[:120]!r}")
    if not lines:
        problems.append(f"{path} is empty; wanted one JSON object per line")
    if problems:
        more = [f"{path}: {len(problems) - SHOWN} more lines like these"] if len(problems) > SHOWN else []
        raise BadInput(problems[:SHOWN] + more)
    return rows


def is_json_lines(source: str) -> bool:
    """Whether that is JSON lines on this machine, or could be nothing else; anything else is up to `datasets`."""
    path = Path(source)
    if path.exists():
        return path.is_file() or any(path.glob("*.jsonl"))
    return path.suffix == ".jsonl" or path.is_absolute() or source.startswith(".") or len(path.parts) > 2


def read_rows(
    source: str, split: str = "train", subset: str | None = None, revision: str | None = None
) -> Sequence[Row] | None:
    """Rows of one split, or None if a local source or the data set has no such split.

    Raises:
        BadInput: the source cannot be read.
    """
    path = Path(source)
    if path.is_file():
        return read_json_lines(path) if split == "train" else None
    if path.is_dir() and any(path.glob("*.jsonl")):
        file = path / f"{split}.jsonl"
        return read_json_lines(file) if file.is_file() else None
    if not path.exists() and is_json_lines(source):
        raise BadInput([f"{source}: there is no such file, and no such folder with .jsonl files"])
    why = None if path.exists() else unreachable()
    try:
        import datasets
    except ImportError as error:
        raise BadInput(
            [f"{source} is no file and no folder with .jsonl files; data sets by name need `pip install datasets`"]
        ) from error
    try:
        return datasets.load_dataset(source, subset, split=split, revision=revision)
    except ValueError as error:
        if f'Unknown split "{split}"' in str(error):
            return None
        raise BadInput([f"{source}: {why or error}"]) from error
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise BadInput([f"{source}: {f'it is not on this machine, and {why}' if why else error}"]) from error


class Part(list[Row]):
    """Some rows of a split, with the numbers that they have in it: what is wrong is shown where it stands."""

    def __init__(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        super().__init__(rows[i] for i in places)
        self.numbers = [numbers_of(rows)[i] for i in places]


def numbers_of(rows: Sequence[Row]) -> Sequence[int]:
    return rows.numbers if isinstance(rows, Part) else range(1, len(rows) + 1)


def carve(rows: Sequence[Row], fraction: float, seed: int, at_most: int | None = None) -> tuple[Part, Part]:
    """`(rest, validation)`: a random share of the rows set apart, the same for equal seeds."""
    count = max(1, round(len(rows) * fraction))
    count = min(count, at_most) if at_most else count
    order = random.Random(f"validation {seed}").sample(range(len(rows)), len(rows))
    return Part(rows, sorted(order[count:])), Part(rows, sorted(order[:count]))


def choose(rows: Sequence[Row], at_most: int | None, seed: int) -> Sequence[Row]:
    """A random choice of the rows, in their order, if there are more than wanted."""
    if at_most is None or len(rows) <= at_most:
        return rows
    return Part(rows, sorted(random.Random(f"choice {seed}").sample(range(len(rows)), at_most)))


def column_problems(rows: Sequence[Row], columns: Sequence[str], where: str) -> list[str]:
    """Rows without one of the columns."""
    numbered = list(zip(numbers_of(rows), rows, strict=True))
    problems = []
    for column in columns:
        if lacking := [(number, row) for number, row in numbered if column not in row]:
            number, row = lacking[0]
            rest = listing(n for n, _ in lacking)
            problems.append(f"{where}: no {column!r} in row {rest}; row {number} has {listing(row, 12)}")
    return problems


def conversations(
    rows: Sequence[Row], prompt_column: str | None = None, response_column: str | None = None, where: str = "data"
) -> list[Messages]:
    """The conversation of each row; `messages` unless columns are named.

    Raises:
        BadInput: rows whose form is not one of those above.
    """
    form = form_of(rows, prompt_column, response_column)
    problems = column_problems(rows, form.required, where)
    found = [] if problems else [form.messages(row) for row in rows]
    for number, row, messages in zip(numbers_of(rows), rows, found, strict=False):
        if fault := form.fault_of(row) or fault_of(messages):
            problems.append(f"{where} row {number}: {fault}")
    if not len(rows):
        problems.append(f"{where}: there are no rows")
    if problems:
        more = [f"{where}: {len(problems) - SHOWN} more rows like these"] if len(problems) > SHOWN else []
        raise BadInput(problems[:SHOWN] + more)
    return found


@dataclass(frozen=True)
class Form:
    """Which columns of a row make its conversation.

    Attributes:
        messages_column: whole conversations; then the others are None.
        context_column: text that belongs to the prompt, such as Alpaca's `input` beside `instruction`; may be empty.
        system_column: text of a turn before the prompt; may be empty.
    """

    messages_column: str | None
    prompt_column: str | None = None
    response_column: str | None = None
    context_column: str | None = None
    system_column: str | None = None

    @property
    def required(self) -> list[str]:
        return [name for name in (self.messages_column, self.prompt_column, self.response_column) if name]

    @property
    def read(self) -> list[str]:
        return [name for name in (*self.required, self.context_column, self.system_column) if name]

    def messages(self, row: Row) -> Messages:
        if self.messages_column:
            return list(row[self.messages_column] or [])
        system, context = (text_of(row, name) for name in (self.system_column, self.context_column))
        assert self.prompt_column is not None, "a form without messages has a column of prompts"
        assert self.response_column is not None, "and one of responses"
        prompt = row[self.prompt_column]
        if context and isinstance(prompt, str):
            prompt = f"{prompt}\n\n{context}"
        before = [{"role": "system", "content": system}] if system else []
        return before + turns(prompt, "user") + turns(row[self.response_column], "assistant")

    def fault_of(self, row: Row) -> str | None:
        """A column that changes what the conversation means, and that is not read."""
        for name in NOT_READ:
            if name not in self.read and row.get(name):
                return f"got {name!r}, which is not read; wanted it as turns of 'messages', or the column removed"
        return None


def form_of(rows: Sequence[Row], prompt_column: str | None = None, response_column: str | None = None) -> Form:
    """The form of all rows, told by the first."""
    first = rows[0] if len(rows) else {}
    if prompt_column is None and response_column is None and "messages" in first:
        return Form("messages")
    alpaca = "prompt" not in first and "instruction" in first
    prompt = prompt_column or ("instruction" if alpaca else "prompt")
    known = (*RESPONSE_COLUMNS, "output") if prompt == "instruction" else RESPONSE_COLUMNS
    response = response_column or next((name for name in known if name in first), "response")
    named = {prompt, response}
    context = next((name for name in CONTEXTS.get(prompt, ()) if name in first and name not in named), None)
    system = next((name for name in SYSTEM_COLUMNS if name in first and name not in named), None)
    return Form(None, prompt, response, context, system)


def unread_columns(rows: Sequence[Row], form: Form) -> list[str]:
    """Columns that hold something and that training does not look at."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in form.read and any(row.get(name) is not None for row in rows)]


def text_of(row: Row, column: str | None) -> str:
    value = row.get(column) if column else None
    return value.strip() if isinstance(value, str) else ""


def turns(value: Any, role: str) -> Messages:
    """A column's value as messages: plain text is one turn."""
    return list(value) if isinstance(value, list) else [{"role": role, "content": value}]


def fault_of(messages: Messages) -> str | None:
    """What keeps a conversation from being learned from."""
    for message in messages:
        if not isinstance(message, Mapping) or {"role", "content"} - message.keys():
            return f"got a message {str(message)[:80]!r}, wanted 'role' and 'content'"
        if message["role"] not in ROLES:
            return f"got role {message['role']!r}, wanted one of {', '.join(ROLES)}"
        if not isinstance(message["content"], str) or not message["content"].strip():
            return f"the {message['role']}'s text is {str(message['content'])[:80]!r}, wanted some text"
        if any("\ud800" <= character <= "\udfff" for character in message["content"]):
            return f"the {message['role']}'s text has half of a surrogate pair: {ascii(message['content'])[:80]}"
    if not messages or messages[-1]["role"] != "assistant":
        return "the conversation does not end with the assistant's turn"
    if messages[0]["role"] == "assistant":
        return "the conversation begins with the assistant's turn, wanted a turn before it that it answers"
    return None
