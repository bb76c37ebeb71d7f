"""Conversations as token ids, with the loss on what the assistant says and nowhere else.

    text     <s>Question: 12 + 7\nAnswer:  ( 12 + 7 ). The answer is 19.</s>
    labels   -100 ...              -100  ids of the response, with its end token

Prompt and response are tokenised apart, so that in training the response follows exactly the ids that generation will
start from. With a chat template every turn of the assistant is learned (see `turns`); without one, or with a prompt
template, a conversation is one prompt and one response.

Every response ends with a token that generation can stop at: the special token by which the chat template closes a
turn, else the tokenizer's end token, which is added. `Encoded["end"]` says which; programs generate with it.

A text without turns is learned from its first token to its end token.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypedDict

from transformers import PreTrainedTokenizerBase

from ..utils.problems import listing
from .forms import TEXT, Messages, tools_of
from .turns import ChatTemplate, is_continuing

IGNORED = -100
PROMPT_TEMPLATE = "{prompt}\n"


class Encoded(TypedDict):
    """One example. Labels are ids of learned tokens, `IGNORED` elsewhere; `end` is what its last response ends with."""

    input_ids: list[int]
    labels: list[int]
    end: int


class Piece(NamedTuple):
    """A part of a text. `ending` is what a chat template writes behind a response's own text; before an `opening` part
    the tokenizer puts what it puts before every text."""

    text: str
    learned: bool
    ending: str = ""
    opening: bool = False


@dataclass(frozen=True)
class Encoder:
    """Turns conversations into token ids.

    Args:
        prompt_template: text around "{prompt}"; overrides the tokenizer's chat template.
        rows: of the model's embedding; a token without one is a fault.
        ends: tokens that the model's generation stops at, beside the tokenizer's end token.
        training_template: a chat template for training alone, under which a conversation is one sequence.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt_template: str | None = None
    rows: int | None = None
    ends: Collection[int] = ()
    training_template: str | None = None

    @cached_property
    def templated(self) -> bool:
        return self.prompt_template is None and bool(self.tokenizer.chat_template)

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    @cached_property
    def special(self) -> set[int]:
        """Tokens that no ordinary text is made of."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {i for i, token in added if token.special or token.content.strip()} | {*self.tokenizer.all_special_ids}

    @cached_property
    def known_ends(self) -> set[int | None]:
        return {self.tokenizer.eos_token_id, *self.ends}

    @cached_property
    def closings(self) -> dict[str, int | None]:
        """The token that an ending closes a turn by; None for one without. Filled as endings come."""
        return {}

    def prompt_text(self, messages: Messages) -> str:
        """Return what the model is given before the assistant's next turn."""
        if self.templated:
            return self.template.render(messages, add_generation_prompt=True)
        return (self.prompt_template or PROMPT_TEMPLATE).replace("{prompt}", messages[-1]["content"])

    def sequences(self, messages: Messages) -> list[list[Piece]]:
        """The conversation as one sequence of pieces, or as one for each answer if the template rewrites earlier turns.

        Raises:
            ValueError: the conversation cannot be cut into prompts and responses.
        """
        if messages[0]["role"] == TEXT:
            return [[Piece(messages[0]["content"], True, opening=True)]]
        if not self.templated:
            if tools_of(messages):
                raise ValueError("there are tools, but no chat template that would write them")
            if len(messages) != 2:
                raise ValueError(
                    f"{len(messages)} turns, but without a chat template there is one prompt and one response"
                )
            return [[Piece(self.prompt_text(messages[:1]), False, opening=True), Piece(messages[1]["content"], True)]]
        turns = ChatTemplate(self.tokenizer, self.training_template).turns(messages)
        if not is_continuing(turns):
            learned = [turn for turn in turns if turn.learned]
            return [[Piece(turn.context, False), Piece(turn.response, True, turn.ending)] for turn in learned]
        pieces, done = [], 0
        for turn in turns:
            pieces += [Piece(turn.context[done:], False), Piece(turn.response, turn.learned, turn.ending)]
            done = len(turn.context) + len(turn.response)
        return [pieces]

    def encode(self, pieces: Iterable[Piece]) -> Encoded:
        """Token ids and labels of one sequence.

        Raises:
            ValueError: a response would have no end, or tokens have no rows in the embedding.
        """
        ids: list[int] = []
        labels: list[int] = []
        end = None
        for piece in pieces:
            new = token_ids(piece.text, self.tokenizer, beginning=piece.opening)
            if piece.learned:
                new, end = self.ended(new, piece.ending)
            ids += new
            labels += new if piece.learned else [IGNORED] * len(new)
        if fault := rowless(ids, self.tokenizer, self.rows):
            raise ValueError(fault)
        assert end is not None, "a sequence has a response"
        return Encoded(input_ids=ids, labels=labels, end=end)

    def ended(self, ids: list[int], ending: str) -> tuple[list[int], int]:
        """`(ids of a response with an end token, that token)`."""
        end = self.closing(ending)
        if end is None and ids and ids[-1] in self.known_ends:
            end = ids[-1]
        if end is not None:
            return ids, end
        if (end := self.tokenizer.eos_token_id) is None:
            raise ValueError(
                "the tokenizer has no end token, so the model would not learn where an answer ends; wanted an "
                "eos_token in tokenizer_config.json, or a chat template that closes turns by a special token"
            )
        return [*ids, end], end

    def closing(self, ending: str) -> int | None:
        """The special token that closes a turn: one that generation is known to stop at, else the last."""
        if ending not in self.closings:
            found = [i for i in token_ids(ending, self.tokenizer, beginning=False) if i in self.special]
            known = [i for i in found if i in self.known_ends]
            self.closings[ending] = next(iter([*known, *reversed(found)]), None)
        return self.closings[ending]

    def encode_prompt(self, messages: Messages) -> list[int]:
        """Token ids that generation of the next turn starts from.

        Raises:
            ValueError: as of `encode`.
        """
        ids = token_ids(self.prompt_text(messages), self.tokenizer, beginning=not self.templated)
        if fault := rowless(ids, self.tokenizer, self.rows):
            raise ValueError(fault)
        return ids


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, beginning: bool) -> list[int]:
    """Ids of a piece; `beginning` adds what the tokenizer puts before a text (not what it puts after)."""
    ids = tokenizer(text, add_special_tokens=beginning).input_ids
    return ids[:-1] if beginning and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def rowless(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, rows: int | None) -> str | None:
    """Problems with tokens that the model's embedding has no rows for, None if all have one."""
    if rows is None or not (beyond := sorted({i for i in ids if i >= rows})):
        return None
    tokens = listing(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in beyond)
    return f"the model's embedding has {rows} rows and none for {tokens}; wanted the model's own tokenizer"
