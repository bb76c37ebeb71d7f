"""The formats that a row's conversation comes in, and the one way in which it goes on.

    messages     {"messages": [{"role": "user", "content": ...}, ...], "tools": [...]}       OpenAI's, TRL's
    sharegpt     {"conversations": [{"from": "human", "value": ...}, ...]}                   ShareGPT's
    response     {"prompt": ..., "response": ...}, or "completion"                           text, or lists of messages
    instruction  {"instruction": ..., "input": ..., "output": ..., "history": [[q, a]]}      Alpaca's, Dolly's
    preference   {"prompt": ..., "chosen": ..., "rejected": ...}                             `reslora dpo` uses both
    text         {"text": ...}                                                               every token is learned

    form = form_of(rows, {"prompt": "question", "response": "answer"})    names of ours: columns of the data set
    form.messages(row)    -> a `Conversation`: turns with "role" and "content", and the tools that it may call

A column "system" or "system_prompt" beside the others is a turn before the prompt. Columns that are not read are named
before training; those that would change what a conversation means are refused, as are rows of several formats.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..utils.documents import parse_json
from ..utils.problems import BadInput, listing, printable
from .records import SHOWN, Messages, Number, Row, column_problems, numbers_of

TEXT = "text"  # the role of the only turn of a text without roles
ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {  # of ShareGPT, beside the roles themselves
    "human": "user",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
WHOLE = {"messages": "messages", "conversations": "sharegpt", "conversation": "sharegpt"}
RESPONSES = {"prompt": ("response", "completion"), "instruction": ("output", "response", "completion")}
CONTEXTS = {"instruction": ("input", "context")}  # by column of the prompt: Alpaca's, Dolly's
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
MEANINGFUL = (*TOOLS, "history")  # they change what a conversation means
NAMES = (*WHOLE, "prompt", "response", "instruction", "input", "output", "system", "history", "tools", "text")
NAMES += ("chosen", "rejected")


class Conversation(Messages):
    """Turns with "role" and "content", and the tools that the assistant may call, as JSON schemas. Its slices have the
    same tools."""

    def __init__(self, turns: Iterable[dict[str, Any]] = (), tools: Sequence[Any] | None = None) -> None:
        super().__init__(turns)
        self.tools = list(tools) if tools else None

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return Conversation(found, self.tools) if isinstance(place, slice) else found


def tools_of(messages: Messages) -> list[Any] | None:
    return messages.tools if isinstance(messages, Conversation) else None


@dataclass(frozen=True)
class Form:
    """The columns of a row that make its conversation; None for those that it does not have.

    Attributes:
        kind: messages, sharegpt, response, instruction, preference or text.
        whole: the column of all turns, or of the text.
        prompt, response: where the prompt and what is learned stand, if not in one column.
        context: text that belongs to the prompt, such as Alpaca's `input` beside `instruction`; may be empty.
        system: text of a turn before the prompt; may be empty.
        history: earlier turns, as pairs of question and answer.
        tools: JSON schemas of tools.
        rejected: of a preference, what is not learned by imitation.
    """

    kind: str
    whole: str | None = None
    prompt: str | None = None
    response: str | None = None
    context: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    rejected: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} ({', '.join(self.read)})"

    @property
    def required(self) -> list[str]:
        return [name for name in (self.whole, self.prompt, self.response, self.rejected) if name]

    @property
    def read(self) -> list[str]:
        return [name for item in fields(self)[1:] if (name := getattr(self, item.name))]

    def messages(self, row: Row, rejected: bool = False) -> Conversation:
        """The conversation of a row; of a preference the one that is preferred, or the other.

        Raises:
            ValueError: something in it has no such meaning; said as a fault of the row.
        """
        tools = tools_in(row.get(self.tools)) if self.tools else None
        if self.kind == "text":
            return Conversation([{"role": TEXT, "content": row[str(self.whole)]}])
        answer = self.rejected if rejected else self.response
        system, context = text_of(row, self.system), text_of(row, self.context)
        found: Messages = [{"role": "system", "content": system}] if system else []
        if self.whole:
            column = self.rejected if rejected and self.rejected else self.whole
            if not isinstance(row[column], list):
                raise ValueError(f"got {column} {printable(row[column], 80)!r}, wanted a list of turns")
            return Conversation(map(turn_of, found + row[column]), tools)
        assert self.prompt is not None, "a form has all turns in one column, or a column of prompts"
        assert answer is not None, "and one of responses"
        prompt = row[self.prompt]
        if context and isinstance(prompt, str):
            prompt = f"{prompt}\n\n{context}"
        for question, reply in pairs_in(row.get(self.history)) if self.history else ():
            found += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        return Conversation(map(turn_of, found + turns(prompt, "user") + turns(row[answer], "assistant")), tools)

    def fault_of(self, row: Row) -> str | None:
        """Return what keeps a row from being learned from; None if nothing does."""
        for name in MEANINGFUL:
            if name not in self.read and row.get(name):
                return f"got {name!r}, which is not read; wanted it as turns of 'messages', or the column removed"
        try:
            return fault_of(self.messages(row)) or (fault_of(self.messages(row, True)) if self.rejected else None)
        except ValueError as error:
            return str(error)


def form_of(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> Form:
    """The form of all rows, recognised by the first.

    Args:
        columns: columns of the data set by our names for them (`NAMES`); a form is looked for among those first.
    """
    first, columns = (rows[0] if len(rows) else {}), columns or {}

    def column(*names: str) -> str | None:
        """The column that one of ours stands for, if the row has it."""
        return next((found for name in names if (found := columns.get(name, name)) in first), None)

    def given(*names: str) -> bool:
        return not columns or any(name in columns for name in names)

    beside = {"tools": column(*TOOLS), "system": column(*SYSTEMS)}
    for name, kind in WHOLE.items():
        if given(name) and (found := column(name)):
            return Form(kind, whole=found, **beside)
    chosen, rejected, prompt = column("chosen"), column("rejected"), column("prompt")
    if chosen and rejected and not {"response", "text"} & columns.keys():
        if prompt is None:
            return Form("preference", whole=chosen, rejected=rejected, **beside)
        return Form("preference", prompt=prompt, response=chosen, rejected=rejected, **beside)
    if given("text") and not column("prompt", "instruction") and (found := column("text")):
        return Form("text", whole=found)
    ours = "instruction" if "prompt" not in columns and not prompt and column("instruction") else "prompt"
    prompt = columns.get(ours, ours)
    known = RESPONSES.get(prompt, RESPONSES["prompt"])
    response = columns.get("response") or columns.get("output") or column(*known) or "response"
    taken = {prompt, response}
    context = columns.get("input") or next((n for n in CONTEXTS.get(prompt, ()) if n in first and n not in taken), None)
    history = column("history") if prompt == "instruction" or "history" in columns else None
    kind = "instruction" if prompt == "instruction" else "response"
    if beside["system"] in taken:
        beside["system"] = None
    return Form(kind, None, prompt, response, context, beside["system"], history, beside["tools"])


def conversations(
    rows: Sequence[Row], columns: Mapping[str, str] | None = None, where: str = "data", form: Form | None = None
) -> list[Conversation]:
    """The conversation of each row.

    Raises:
        BadInput: rows whose form is not one of those above, or not that of the others.
    """
    form = form or form_of(rows, columns)
    problems = [*mixed_problems(rows, form, columns, where)] or column_problems(rows, form.required, where)
    if not problems:
        numbered = zip(numbers_of(rows), rows, strict=True)
        problems = [f"{where} row {number}: {fault}" for number, row in numbered if (fault := form.fault_of(row))]
    if not len(rows):
        problems.append(f"{where}: there are no rows")
    if problems:
        more = [f"{where}: {len(problems) - SHOWN} more rows like these"] if len(problems) > SHOWN else []
        raise BadInput(problems[:SHOWN] + more)
    return [form.messages(row) for row in rows]


def mixed_problems(rows: Sequence[Row], form: Form, columns: Mapping[str, str] | None, where: str) -> Iterator[str]:
    """Rows that are in another format than the first, one of them shown."""
    others: dict[str, list[tuple[Number, Row]]] = {}
    for number, row in zip(numbers_of(rows), rows, strict=True):
        there = {name: value for name, value in row.items() if value is not None}
        if all(name in there for name in form.required):
            continue
        other = form_of([there], columns)
        if other.kind != form.kind and all(name in there for name in other.required):
            others.setdefault(other.kind, []).append((number, there))
    for kind, found in others.items():
        number, row = found[0]
        yield (
            f"{where}: rows of several formats: row {numbers_of(rows)[0]} is {form.kind}, row "
            f"{listing(n for n, _ in found)} {kind}: row {number} is {printable(json.dumps(row, default=str), 160)}; "
            "wanted one format"
        )


def unread_columns(rows: Sequence[Row], form: Form) -> list[str]:
    """Columns that hold something and that training does not look at."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in form.read and any(row.get(name) is not None for row in rows)]


# ------------------------------------------------------------------------------------------------------- parts


def text_of(row: Row, column: str | None) -> str:
    value = row.get(column) if column else None
    return value.strip() if isinstance(value, str) else ""


def turns(value: Any, role: str) -> Messages:
    """A column's value as messages: plain text is one turn."""
    return list(value) if isinstance(value, list) else [{"role": role, "content": value}]


def turn_of(message: Any) -> Any:
    """A turn in our words: ShareGPT's "from" and "value" are "role" and "content", lists of texts are one text."""
    if not isinstance(message, Mapping):
        return message
    found = {name: value for name, value in message.items() if value is not None or name == "content"}
    if "from" in found and "value" in found:
        speaker, said = found.pop("from"), found.pop("value")
        found |= {"role": SPEAKERS.get(speaker, speaker), "content": said}
        if speaker == "function_call":
            found |= {"content": "", "tool_calls": calls_in(said)}
    content = found.get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        found["content"] = "".join(str(part.get("text", "")) for part in content)
    return found


def calls_in(said: Any) -> list[dict[str, Any]]:
    """Calls of tools that ShareGPT writes as JSON."""
    found = parsed(said, "function_call")
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise ValueError(f"got a function_call {printable(said, 80)!r}, wanted 'name' and 'arguments' as JSON")
    return [{"type": "function", "function": dict(call)} for call in calls]


def tools_in(value: Any) -> list[Any] | None:
    """Schemas of tools, which many data sets hold as JSON in a string."""
    found = parsed(value, "tools") if isinstance(value, str) and value.strip() else value or None
    if found is not None and not (isinstance(found, list) and all(isinstance(tool, Mapping) for tool in found)):
        raise ValueError(f"got tools {printable(value, 80)!r}, wanted a list of JSON schemas")
    return found


def parsed(value: Any, name: str) -> Any:
    try:
        return parse_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got {name} {printable(value, 80)!r}, which is no JSON") from error


def pairs_in(history: Any) -> list[tuple[Any, Any]]:
    """Alpaca's earlier turns: [[question, answer], ...]."""
    pairs = list(history or ())
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"got history {printable(history, 80)!r}, wanted pairs of question and answer")
    return [(question, answer) for question, answer in pairs]


def fault_of(messages: Messages) -> str | None:
    """Return what keeps a conversation from being learned from; None if nothing does."""
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or not message.keys() & {"content", "tool_calls"}:
            return f"got a message {str(message)[:80]!r}, wanted 'role' and 'content'"
        role, content = message["role"], message.get("content")
        if role not in ROLES and not (role == TEXT and len(messages) == 1):
            return f"got role {role!r}, wanted one of {', '.join(ROLES)}"
        called = role == "assistant" and message.get("tool_calls")
        if not (called and not content) and (not isinstance(content, str) or not (content.strip() or role == "tool")):
            return f"the {role}'s text is {str(content)[:80]!r}, wanted some text"
        if any("\ud800" <= character <= "\udfff" for character in content or ""):
            return f"the {role}'s text has half of a surrogate pair: {ascii(content)[:80]}"
    if messages and messages[0]["role"] == TEXT:
        return None
    if not messages or messages[-1]["role"] != "assistant":
        return "the conversation does not end with the assistant's turn"
    if messages[0]["role"] == "assistant":
        return "the conversation begins with the assistant's turn, wanted a turn before it that it answers"
    if not any(is_learned(message) for message in messages):
        return "no turn of the assistant is to be learned: all have 'weight' 0 or 'train' false"
    return None


def is_learned(message: Mapping[str, Any]) -> bool:
    """Return whether a turn is the assistant's and learned; axolotl's and OpenAI's rows can say that it is not."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0 and message.get("train", True) is not False
