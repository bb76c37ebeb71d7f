"""Rows of a data set, from local JSON lines or by a `datasets` name, and the conversations in them.

    rows = read_rows("data/train.jsonl")               one file
    rows = read_rows("data", "train")                  data/train.jsonl
    rows = read_rows("openai/gsm8k", "train", "main")  anything `datasets.load_dataset` knows

A row holds one conversation in one of the field's forms:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    {"prompt": ..., "response": ...}   or "completion"; two other columns by name

Every bad line of a file is reported, by number and with its text, before anything is read by a model.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..hub import unreachable
from ..problems import BadInput, listing

Row = Mapping[str, Any]
Messages = list[dict[str, str]]
RESPONSE_COLUMNS = ("response", "completion")
ROLES = ("system", "user", "assistant")
SHOWN = 10


def read_json_lines(path: Path) -> list[Row]:
    """Objects of a JSON lines file.

    Raises:
        BadInput: lines that are empty or not JSON objects, each with number and text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput([f"{path}: {error}"]) from error
    rows, problems = [], []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            fault = None if isinstance(row, dict) else f"got {type(row).__name__}, wanted an object"
        except json.JSONDecodeError as error:
            fault = f"not JSON, {error.msg} at column {error.colno}" if line.strip() else "the line is empty"
        if fault:
            problems.append(f"{path} line {number}: {fault}: {line[:120]!r}")
        else:
            rows.append(row)
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
    first = rows[0] if len(rows) else {}
    if prompt_column is None and response_column is None and "messages" in first:
        problems = column_problems(rows, ["messages"], where)
        found = [list(row["messages"]) for row in rows] if not problems else []
    else:
        prompt = prompt_column or "prompt"
        response = response_column or next((name for name in RESPONSE_COLUMNS if name in first), "response")
        problems = column_problems(rows, [prompt, response], where)
        found = [turns(row[prompt], "user") + turns(row[response], "assistant") for row in rows] if not problems else []
    for number, messages in zip(numbers_of(rows), found, strict=False):
        if fault := fault_of(messages):
            problems.append(f"{where} row {number}: {fault}")
    if not len(rows):
        problems.append(f"{where}: there are no rows")
    if problems:
        more = [f"{where}: {len(problems) - SHOWN} more rows like these"] if len(problems) > SHOWN else []
        raise BadInput(problems[:SHOWN] + more)
    return found


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
    if not messages or messages[-1]["role"] != "assistant":
        return "the conversation does not end with the assistant's turn"
    if messages[0]["role"] == "assistant":
        return "the conversation begins with the assistant's turn, wanted a turn before it that it answers"
    return None
