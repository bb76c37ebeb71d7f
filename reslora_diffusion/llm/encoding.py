"""Conversations become batches: `Encoder` makes examples, which are packed and padded.

`pack_examples` puts several examples into one sequence. Positions start anew with each, from which transformers builds
a mask that lets no example see another; flash attention, which has no mask, is given the lengths of the examples
instead. Not all models go by either, hence `packing_problem`. Shortcuts add up values of one token only, so they need
no mask.
"""

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..utils.problems import BadInput, listing
from .encoder import IGNORED, Encoded, Encoder
from .forms import TEXT, Messages
from .records import Number

SHOWN = 10


def segments(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, prompt_template: str | None
) -> list[tuple[str, bool]]:
    """The conversation as `(text, learned)` pieces, in order; the last answer's if the template rewrites earlier turns.

    Raises:
        ValueError: the conversation cannot be cut into prompts and responses.
    """
    return [(piece.text, piece.learned) for piece in Encoder(tokenizer, prompt_template).sequences(messages)[-1]]


def encode(messages: Messages, tokenizer: PreTrainedTokenizerBase, prompt_template: str | None = None) -> Encoded:
    """Token ids and labels of one conversation; of its last answer if the template rewrites earlier turns."""
    encoder = Encoder(tokenizer, prompt_template)
    return encoder.encode(encoder.sequences(messages)[-1])


def encode_prompt(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, prompt_template: str | None = None
) -> list[int]:
    """Token ids that generation of the last turn starts from."""
    return Encoder(tokenizer, prompt_template).encode_prompt(messages)


def encode_all(
    conversations: Sequence[Messages],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    prompt_template: str | None = None,
    drop_long: bool = False,
    cut_long: bool = False,
    where: str = "data",
    numbers: Sequence[Number] | None = None,
    rows: int | None = None,
    ends: Collection[int] = (),
    training_template: str | None = None,
) -> tuple[list[Encoded], int]:
    """`(examples, how many were dropped or cut for their length)`.

    Args:
        drop_long: leave conversations of more than `max_length` tokens out.
        cut_long: take their first `max_length` tokens instead. Long texts without turns are always cut, into windows.
        numbers: what conversations are known by.

    Raises:
        BadInput: conversations that cannot be cut into turns, that exceed `max_length` tokens, or of whose response
            nothing is left.
    """
    encoder = Encoder(tokenizer, prompt_template, rows, ends, training_template)
    kept: list[Encoded] = []
    long: dict[Number, int] = {}
    empty: dict[Number, int] = {}
    faults: dict[str, list[Number]] = {}
    for number, messages in zip(numbers or range(1, len(conversations) + 1), conversations, strict=True):
        try:
            examples = [encoder.encode(pieces) for pieces in encoder.sequences(messages)]
        except ValueError as error:
            faults.setdefault(str(error), []).append(number)
            continue
        if messages[0]["role"] == TEXT:
            kept += [window for example in examples for window in windows(example, max_length)]
            continue
        if (longest := max(len(example["input_ids"]) for example in examples)) > max_length:
            long[number] = longest
            if not cut_long:
                continue
            examples = [beginning(example, max_length) for example in examples]
            if any(not learned(example) for example in examples):
                empty[number] = longest
        kept += examples
    problems = [*row_problems(faults, where), *cut_to_nothing(empty, where, max_length)]
    if long and not (drop_long or cut_long):
        shown = listing(f"row {number} ({length})" for number, length in long.items())
        problems.append(
            f"{where}: {len(long)} of {len(conversations)} examples have more tokens than --max_length {max_length}: "
            f"{shown}; wanted a larger --max_length, --drop_long to train without them, or --cut_long to train on "
            "their beginnings"
        )
    if not kept and not problems:
        problems.append(f"{where}: no example fits into --max_length {max_length}")
    if problems:
        raise BadInput(problems)
    return kept, len(long)


def beginning(example: Encoded, length: int) -> Encoded:
    return Encoded(input_ids=example["input_ids"][:length], labels=example["labels"][:length], end=example["end"])


def windows(example: Encoded, length: int) -> list[Encoded]:
    """A text as pieces of at most `length` tokens, in order; a last piece of one token predicts nothing."""
    ids, labels = example["input_ids"], example["labels"]
    starts = [start for start in range(0, len(ids), length) if start == 0 or len(ids) - start > 1]
    return [
        Encoded(input_ids=ids[start : start + length], labels=labels[start : start + length], end=example["end"])
        for start in starts
    ]


def learned(example: Encoded) -> int:
    """Return the number of tokens that are predicted: all with a label but the first, which nothing precedes."""
    return sum(label != IGNORED for label in example["labels"][1:])


def cut_to_nothing(empty: Mapping[Number, int], where: str, max_length: int) -> Iterator[str]:
    """The problem of rows whose answer begins behind the last token that is learned. `empty`: tokens by row."""
    if empty:
        shown = listing(f"row {number} ({length} tokens)" for number, length in empty.items())
        yield (
            f"{where}: cut to --max_length {max_length}, nothing is left of an answer in {shown}; wanted a larger "
            "--max_length, or the rows left out (reslora train-llm: --drop_long)"
        )


def row_problems(faults: Mapping[str, Sequence[Number]], where: str) -> list[str]:
    """One problem for each kind of fault, with the rows that have it."""
    problems = [f"{where} row {listing(rows)}: {fault}" for fault, rows in faults.items()]
    more = [f"{where}: {len(problems) - SHOWN} more faults like these"] if len(problems) > SHOWN else []
    return problems[:SHOWN] + more


def pack_examples(examples: Sequence[Encoded], max_length: int) -> list[list[Encoded]]:
    """Examples in as few bins of at most `max_length` tokens as best fit by falling length finds.

    Bins with equally many free tokens stand together, so that a step costs at most `max_length`, however many bins
    there are.
    """
    bins: list[list[Encoded]] = []
    chosen: list[Encoded]
    free: dict[int, list[list[Encoded]]] = {}
    rooms: list[int] = []  # the keys of `free`, sorted
    for example in sorted(examples, key=lambda example: len(example["input_ids"]), reverse=True):
        length = len(example["input_ids"])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room = max_length
            bins.append(chosen := [])
        else:
            room = rooms[place]
            chosen = free[room].pop()
            if not free[room]:
                del free[room], rooms[place]
        chosen.append(example)
        if room > length:
            if room - length not in free:
                insort(rooms, room - length)
            free.setdefault(room - length, []).append(chosen)
    return bins


@dataclass(frozen=True)
class Collator:
    """A batch from examples, or from lists of them (packed): input_ids and labels [B, T], padded on the right, and

    - unpacked: attention_mask [B, T];
    - packed: position_ids [B, T] that start at 0 with each example; no mask and no cache, beside which transformers
      does not look at positions;
    - packed, with `lengths`: where each example starts among the B T tokens (cu_seq_lens_q and cu_seq_lens_k, int32,
      from 0 to B T) and the longest (max_length_q, max_length_k), since flash attention looks at the positions of
      batches of one row only;
    - packed, with `parts`: the lengths of each row's examples (part_lengths), for `packed_attention`.
    """

    pad_token_id: int
    multiple_of: int = 8
    lengths: bool = True
    parts: bool = False

    def __call__(self, items: Sequence[Encoded | list[Encoded]]) -> dict[str, Any]:
        packed = isinstance(items[0], list)
        rows = [item if isinstance(item, list) else [item] for item in items]
        longest = max(sum(len(example["input_ids"]) for example in row) for row in rows)
        width = -(-longest // self.multiple_of) * self.multiple_of
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
        parts: list[int] = []
        for row in rows:
            ids = [i for example in row for i in example["input_ids"]]
            labels = [i for example in row for i in first_unlearned(example["labels"])]
            lengths = [len(example["input_ids"]) for example in row]
            rest = width - len(ids)
            lengths += [rest] if rest else []
            batch["input_ids"].append(ids + [self.pad_token_id] * rest)
            batch["labels"].append(labels + [IGNORED] * rest)
            batch["attention_mask"].append([1] * len(ids) + [0] * rest)
            batch["position_ids"].append([position for length in lengths for position in range(length)])
            parts += lengths
        del batch["attention_mask" if packed else "position_ids"]
        tensors: dict[str, Any] = {name: torch.tensor(values) for name, values in batch.items()}
        if packed:
            tensors["use_cache"] = False
            if self.parts:
                tensors["part_lengths"] = [[len(example["input_ids"]) for example in row] for row in rows]
            if self.lengths:
                starts = torch.tensor([0, *accumulate(parts)], dtype=torch.int32)
                tensors |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
                tensors |= {"max_length_q": max(parts), "max_length_k": max(parts)}
        return tensors


def uses_flash_attention(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether attention is computed by a kernel that takes lengths instead of masks."""
    return "flash" in (getattr(model.config.get_text_config(), "_attn_implementation", None) or "")


@torch.no_grad()
def packing_problem(model: nn.Module, collate: Collator, examples: Sequence[Encoded]) -> str | None:
    """Return the problem of a model that lets packed examples see each other: the logits of two short ones, alone, and
    each behind the other in a batch of two rows, differ."""
    shortest = sorted(examples, key=lambda example: len(example["input_ids"]))
    pair = (shortest[0], shortest[min(1, len(shortest) - 1)])
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()

    def logits(items: list) -> Tensor:
        batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in collate(items).items() if k != "labels"}
        return model(**batch).logits.float()

    packed = logits([list(pair), list(reversed(pair))])
    problem = None
    for row, (before, example) in enumerate((pair, pair[::-1])):
        start, length = len(before["input_ids"]), len(example["input_ids"])
        alone = logits([example])[0, :length]
        if (packed[row, start : start + length] - alone).norm() >= 0.02 * alone.norm():
            problem = f"{type(model).__name__} lets the examples of a pack see each other; wanted --packing false"
    model.train(was_training)
    return problem and f"--packing: {problem}"


def first_unlearned(labels: list[int]) -> list[int]:
    """The first token of an example has no context to be predicted from; in a pack its context would be another's."""
    return [IGNORED, *labels[1:]]
