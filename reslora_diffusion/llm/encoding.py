"""From conversations to token ids, with the loss on what the assistant says and nowhere else.

    text     <s>Question: 12 + 7\\nAnswer:  ( 12 + 7 ). The answer is 19.</s>
    labels   -100 ...              -100  ids of the response, with its end token

Prompt and response are tokenised apart, so that in training the response follows exactly the ids that generation will
start from. With a chat template every turn of the assistant is learned; without one (or with a prompt template) a
conversation is one prompt and one response.

`pack` puts several examples into one sequence. Positions start anew with each, from which transformers builds a mask
that lets no example see another (not all of its models do, hence `packing_problem`); shortcuts add up values of one
token only, so they need no mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..problems import BadInput, listing
from .records import Messages

IGNORED = -100
PROMPT_TEMPLATE = "{prompt}\n"


class Encoded(TypedDict):
    """One example: labels are the ids of learned tokens, `IGNORED` elsewhere. Equal lengths."""

    input_ids: list[int]
    labels: list[int]


def prompt_text(messages: Messages, tokenizer: PreTrainedTokenizerBase, prompt_template: str | None) -> str:
    """What the model is given before the assistant's next turn."""
    if prompt_template is None and tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return (prompt_template or PROMPT_TEMPLATE).replace("{prompt}", messages[-1]["content"])


def segments(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, prompt_template: str | None
) -> list[tuple[str, bool]]:
    """The conversation as `(text, learned)` pieces, in order.

    Raises:
        ValueError: the conversation cannot be cut into prompts and responses.
    """
    if prompt_template is not None or not tokenizer.chat_template:
        if len(messages) != 2:
            raise ValueError(f"{len(messages)} turns, but without a chat template there is one prompt and one response")
        return [(prompt_text(messages[:1], tokenizer, prompt_template), False), (messages[1]["content"], True)]
    pieces: list[tuple[str, bool]] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        context = prompt_text(messages[:number], tokenizer, None)
        whole = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not (context.startswith(done) and whole.startswith(context)):
            raise ValueError(
                f"the chat template rewrites earlier turns at turn {number + 1}; wanted one answer per row"
            )
        pieces += [(context[len(done) :], False), (whole[len(context) :], True)]
        done = whole
    return pieces


def encode(messages: Messages, tokenizer: PreTrainedTokenizerBase, prompt_template: str | None = None) -> Encoded:
    """Token ids and labels of one conversation."""
    example = Encoded(input_ids=[], labels=[])
    templated = prompt_template is None and bool(tokenizer.chat_template)
    for text, learned in segments(messages, tokenizer, prompt_template):
        ids = token_ids(text, tokenizer, beginning=not templated and not example["input_ids"])
        if learned and (not ids or ids[-1] not in tokenizer.all_special_ids) and not ends_itself(text, tokenizer):
            ids = [*ids, tokenizer.eos_token_id]
        example["input_ids"] += ids
        example["labels"] += ids if learned else [IGNORED] * len(ids)
    return example


def encode_prompt(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, prompt_template: str | None = None
) -> list[int]:
    """Token ids that generation of the last turn starts from."""
    templated = prompt_template is None and bool(tokenizer.chat_template)
    if templated:
        return token_ids(prompt_text(messages, tokenizer, prompt_template), tokenizer, beginning=False)
    return token_ids(prompt_text(messages[-1:], tokenizer, prompt_template), tokenizer, beginning=True)


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, beginning: bool) -> list[int]:
    """Ids of a piece; `beginning` adds what the tokenizer puts before a text (not what it puts after)."""
    ids = tokenizer(text, add_special_tokens=beginning).input_ids
    return ids[:-1] if beginning and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def ends_itself(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template closed the turn: many write a line break after the end token."""
    return text.rstrip().endswith(tuple(tokenizer.all_special_tokens))


def encode_all(
    conversations: Sequence[Messages],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    prompt_template: str | None = None,
    drop_long: bool = False,
    where: str = "data",
    numbers: Sequence[int] | None = None,
) -> tuple[list[Encoded], int]:
    """`(examples, how many were dropped for their length)`; `numbers` are those that conversations are known by.

    Raises:
        BadInput: conversations that cannot be cut, or, without `drop_long`, that exceed `max_length` tokens.
    """
    kept, long, problems = [], {}, []
    for number, messages in zip(numbers or range(1, len(conversations) + 1), conversations, strict=True):
        try:
            example = encode(messages, tokenizer, prompt_template)
        except ValueError as error:
            problems.append(f"{where} row {number}: {error}")
            continue
        if len(example["input_ids"]) > max_length:
            long[number] = len(example["input_ids"])
        else:
            kept.append(example)
    if long and not drop_long:
        shown = listing(f"row {number} ({length})" for number, length in long.items())
        problems.append(
            f"{where}: {len(long)} of {len(conversations)} examples have more tokens than --max_length {max_length}: "
            f"{shown}; wanted a larger --max_length, or --drop_long to train without them"
        )
    if not kept and not problems:
        problems.append(f"{where}: no example fits into --max_length {max_length}")
    if problems:
        raise BadInput(problems[:10])
    return kept, len(long)


def pack(examples: Sequence[Encoded], max_length: int) -> list[list[Encoded]]:
    """Examples in as few bins of at most `max_length` tokens as first fit by falling length finds."""
    bins: list[list[Encoded]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: len(example["input_ids"]), reverse=True):
        length = len(example["input_ids"])
        place = next((i for i, free in enumerate(room) if free >= length), None)
        if place is None:
            bins.append([])
            room.append(max_length)
            place = len(bins) - 1
        bins[place].append(example)
        room[place] -= length
    return bins


@dataclass(frozen=True)
class Collator:
    """A batch from examples, or from lists of them (packed): input_ids, labels and, padded on the right, the rest.

    Unpacked: attention_mask [B, T]. Packed: position_ids [B, T] that start at 0 with each example, no mask and no
    cache, beside which transformers does not look at positions.
    """

    pad_token_id: int
    multiple_of: int = 8

    def __call__(self, items: Sequence[Encoded | list[Encoded]]) -> dict[str, Any]:
        packed = isinstance(items[0], list)
        rows = [item if packed else [item] for item in items]
        longest = max(sum(len(example["input_ids"]) for example in row) for row in rows)
        width = -(-longest // self.multiple_of) * self.multiple_of
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
        for row in rows:
            ids = [i for example in row for i in example["input_ids"]]
            labels = [i for example in row for i in first_unlearned(example["labels"])]
            positions = [i for example in row for i in range(len(example["input_ids"]))]
            rest = width - len(ids)
            batch["input_ids"].append(ids + [self.pad_token_id] * rest)
            batch["labels"].append(labels + [IGNORED] * rest)
            batch["attention_mask"].append([1] * len(ids) + [0] * rest)
            batch["position_ids"].append(positions + list(range(rest)))
        del batch["attention_mask" if packed else "position_ids"]
        tensors = {name: torch.tensor(values) for name, values in batch.items()}
        return tensors | {"use_cache": False} if packed else tensors


@torch.no_grad()
def packing_problem(model: nn.Module, collate: Collator, examples: Sequence[Encoded]) -> str | None:
    """Whether the model lets packed examples see each other: a short one's logits, alone and behind another."""
    first, second = sorted(examples, key=lambda example: len(example["input_ids"]))[:2]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()

    def logits(items: list) -> Tensor:
        batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in collate(items).items() if k != "labels"}
        return model(**batch).logits[0].float()

    alone = logits([second])[: len(second["input_ids"])]
    behind = logits([[first, second]])[len(first["input_ids"]) :][: len(second["input_ids"])]
    model.train(was_training)
    if (behind - alone).norm() < 0.02 * alone.norm():
        return None
    return f"--packing: {type(model).__name__} lets the examples of a pack see each other; wanted --packing false"


def first_unlearned(labels: list[int]) -> list[int]:
    """The first token of an example has no context to be predicted from; in a pack its context would be another's."""
    return [IGNORED, *labels[1:]]
