"""Conversations become text by the tokenizer's chat template, in two parts: what is given and what is learned.

    context    "<s>user: 2 + 2<end>assistant: "    what generation of an answer starts from
    response   "4<end>"                            what the model learns to write there

Templates are judged by what they write, not by their names:

    continuing   each context begins with the turns before it as they were written: a conversation is one sequence
    rewriting    earlier turns change once there are later ones (Qwen3, Phi-3, GPT-OSS write the last turn in another
                 way): every answer is learned in a sequence of its own, behind the context it would be generated from
    reasoning    the context opens a `<think>` that finished turns do not have (DeepSeek-R1, Nemotron): the response
                 closes it, empty or with the reasoning that the row holds, which some templates would drop
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..utils.problems import first_line
from .forms import Messages, is_learned, tools_of

THINK, THOUGHT = "<think>", "</think>"
PROBE = "Answer"  # a text whose end shows what a template writes behind an answer


class Turn(NamedTuple):
    """One answer of the assistant. `ending` is what the template writes behind the answer's own text; `learned` is
    False where the row says so."""

    context: str
    response: str
    ending: str
    learned: bool = True


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template. One that drops or does not take text as text, as those of models of images and
    text do, is given lists of parts: `[{"type": "text", "text": ...}]`."""

    tokenizer: PreTrainedTokenizerBase
    source: str | None = None  # in place of the tokenizer's own, such as TRL's training templates

    @cached_property
    def wants_parts(self) -> bool:
        probe = [{"role": "user", "content": PROBE}]
        if PROBE in self.attempt(probe):
            return False
        written = self.attempt(as_parts(probe))
        return PROBE in written and str(as_parts(probe)[0]["content"]) not in written

    def attempt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return what the template writes, nothing if it fails."""
        try:
            given = [dict(message) for message in messages]
            return str(self.tokenizer.apply_chat_template(given, chat_template=self.source, tokenize=False))
        except Exception:  # said by `render`, of a real conversation
            return ""

    def render(self, messages: Messages, **settings: Any) -> str:
        """Return what the template writes.

        Raises:
            ValueError: the template refuses the conversation, or fails on it.
        """
        given = as_parts(messages) if self.wants_parts else messages
        try:
            settings |= {"tools": tools_of(messages), "chat_template": self.source}
            return str(self.tokenizer.apply_chat_template(given, tokenize=False, **settings))
        except Exception as error:  # a template is a program: it raises errors of jinja's, its own, any of Python's
            raise ValueError(f"the chat template does not take the conversation: {first_line(error)}") from error

    def turns(self, messages: Messages) -> list[Turn]:
        """Every answer of a conversation.

        Raises:
            ValueError: the template does not take the conversation, or what it writes cannot be cut.
        """
        ends = [number for number, message in enumerate(messages, 1) if message["role"] == "assistant"]
        found = [self.last_turn(messages[:end]) for end in ends]
        if fault := left_out(messages, found[-1].context):
            raise ValueError(f"the chat template leaves out {fault}")
        return found

    def last_turn(self, messages: Messages) -> Turn:
        """The turn of the assistant that a conversation ends with."""
        before, content = messages[:-1], messages[-1].get("content") or ""
        context = self.render(before, add_generation_prompt=True)
        whole = self.render(messages)
        ending = self.render([*before, {"role": "assistant", "content": PROBE}]).rpartition(PROBE)[2]
        response = continuation(context, whole)
        if response is None:
            raise ValueError(
                f"the chat template rewrites earlier turns at turn {len(messages)}: what it writes with the answer "
                "does not continue what it writes for generating it"
            )
        if not holds(response, content):
            if THOUGHT not in content:
                raise ValueError(f"the chat template leaves out or changes part of the answer {content[:60]!r}")
            opened = context.rstrip().endswith(THINK)
            response = (content.lstrip().removeprefix(THINK).lstrip("\n") if opened else content) + ending
        for call in messages[-1].get("tool_calls") or ():
            name = str(call.get("function", call).get("name"))
            if name not in response:
                raise ValueError(f"the chat template leaves out the call of the tool {name!r}")
        return Turn(context, response, ending, is_learned(messages[-1]))


def as_parts(messages: Messages) -> list[dict[str, Any]]:
    texts = [message.get("content") for message in messages]
    parts = [[{"type": "text", "text": text}] if text else [] for text in texts]
    return [{**message, "content": part} for message, part in zip(messages, parts, strict=True)]


def left_out(messages: Messages, context: str) -> str | None:
    """Return what the context of the last answer lacks of the tools, and of the turns of the system and of tools."""
    for tool in tools_of(messages) or ():
        if (name := str(tool.get("function", tool).get("name"))) not in context:
            return f"the tool {name!r}: it does not know tools"
    for message in messages:
        content = message.get("content") or ""
        if message["role"] in ("system", "developer", "tool") and not any(
            holds(context, text)
            for text in (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
        ):
            return f"the {message['role']}'s turn {content[:60]!r}"
    return None


def continuation(context: str, whole: str) -> str | None:
    """The text that follows a context; None if the finished conversation does not begin with it."""
    if whole.startswith(context):
        return whole[len(context) :]
    bare = context.rstrip()
    if bare.endswith(THINK):
        head = bare.removesuffix(THINK)
        if whole.startswith(bare):
            return whole[len(bare) :].lstrip("\n")
        if whole.startswith(head):
            return f"\n{THOUGHT}\n\n{whole[len(head) :]}"
    return whole[len(bare) :].lstrip() if whole.startswith(bare) else None


def holds(response: str, content: str) -> bool:
    """Return whether a response has all of an answer's text, but for white space and the tag opening its reasoning."""
    wanted, written = (re.sub(rf"\s+|{THINK}", "", text) for text in (content, response))
    return wanted in written


def is_continuing(turns: list[Turn]) -> bool:
    """Return whether each context begins with everything that was written before it."""
    done = ""
    for turn in turns:
        if not turn.context.startswith(done):
            return False
        done = turn.context + turn.response
    return True
