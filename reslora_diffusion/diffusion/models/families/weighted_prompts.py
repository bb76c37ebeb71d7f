"""Words with weights in prompts, as kohya's scripts read them with `--weighted_captions`.

    (words)       1.1            [words]    1 / 1.1            inner brackets multiply; the last ones may be left open
    (words:1.3)   1.3            \\( \\) \\[ \\] \\\\    the characters themselves

The states of a word's tokens are multiplied by its weight. CLIP's pooled state is not, and there is no normalisation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .long_prompts import in_pieces

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

PIECE = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:([+-]?(?:\d+\.?\d*|\.\d+))\)|\)|]|[^\\()\[\]:]+|:")
FACTORS = {"(": 1.1, "[": 1 / 1.1}
CLOSED_BY = {")": "(", "]": "["}


def weighted_words(prompt: str) -> list[tuple[str, float]]:
    """Parts of a prompt and their weights; neighbours of one weight are one part."""
    texts, weights, opened = list[str](), list[float](), {"(": list[int](), "[": list[int]()}

    def weigh(first: int, factor: float) -> None:
        weights[first:] = [weight * factor for weight in weights[first:]]

    for match in PIECE.finditer(prompt):
        piece, number = match[0], match[1]
        bracket = "(" if number is not None else CLOSED_BY.get(piece)
        if piece in opened:
            opened[piece].append(len(texts))
        elif bracket and opened[bracket]:
            weigh(opened[bracket].pop(), FACTORS[bracket] if number is None else float(number))
        else:
            texts.append(piece[1:] if piece.startswith("\\") else piece)
            weights.append(1.0)
    for bracket, places in opened.items():
        for place in places:
            weigh(place, FACTORS[bracket])
    joined = list[tuple[str, float]]()
    for text, weight in zip(texts, weights, strict=True):
        if joined and joined[-1][1] == weight:
            text = joined.pop()[0] + text
        joined.append((text, weight))
    return joined


def without_weights(prompt: str) -> str:
    """The words of a prompt alone, for a pipeline that would read the brackets."""
    return "".join(text for text, _ in weighted_words(prompt))


def ids_and_weights(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[list[int], list[float]]:
    """Ids of a prompt without start and end, and the weight of each."""
    parts = [(tokenizer(text, verbose=False).input_ids[1:-1], weight) for text, weight in weighted_words(prompt)]
    return [i for ids, _ in parts for i in ids], [weight for ids, weight in parts for _ in ids]


def tokenize_weighted(
    tokenizers: Sequence[PreTrainedTokenizerBase], prompts: Sequence[str], length: int | None, pieces: int
) -> tuple[Tensor, Tensor]:
    """Ids [P, E, L] as `Family.tokenize` has them, and the weight of each."""
    import torch

    found = []
    for tokenizer in tokenizers:
        most = pieces * ((length or tokenizer.model_max_length) - 2)
        rows, factors = [], []
        for prompt in prompts:
            ids, weights = ids_and_weights(tokenizer, prompt)
            rest = most - len(ids)
            rows.append([tokenizer.bos_token_id, *ids[:most], tokenizer.eos_token_id, *[tokenizer.pad_token_id] * rest])
            factors.append([1.0, *weights[:most], 1.0, *[1.0] * rest])
        whole, weighed = torch.tensor(rows), torch.tensor(factors)
        if pieces > 1:
            whole = in_pieces(whole, pieces, tokenizer)
            inner = weighed[:, 1:-1].unflatten(1, (pieces, -1))
            weighed = torch.nn.functional.pad(inner, (1, 1), value=1.0).flatten(1)
        found.append((whole, weighed))
    every, factor = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
    return every, factor
