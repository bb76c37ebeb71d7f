"""Prompts that are longer than CLIP reads at once: they are read in pieces of 75 tokens, each with a start and an end.

in_pieces   ids [P, n (L - 2) + 2] -> n pieces [P, n L]
joined      hidden states [P n, L, D] of the pieces -> those of one prompt [P, n (L - 2) + 2, D]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...options import DreamBoothOptions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SHORTEST = 75  # tokens of a prompt that CLIP reads at once, besides start and end


def pieces_of(options: DreamBoothOptions) -> int:
    """Return the number of pieces of 75 tokens in which a prompt is read."""
    return (options.max_token_length or SHORTEST) // SHORTEST


def in_pieces(ids: Tensor, pieces: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Ids [P, n (L - 2) + 2] as n pieces [P, n L], each with the start and an end, as kohya's scripts cut them: a piece
    that is full ends in the end of text; one with nothing but padding begins with it."""
    import torch

    start, end, pad = ids[:, :1], tokenizer.eos_token_id, tokenizer.pad_token_id
    cut = []
    for part in ids[:, 1:-1].chunk(pieces, dim=1):
        first, last = part[:, :1].clone(), ids[:, -1:].clone()
        if pad != end:
            last[(part[:, -1:] != end) & (part[:, -1:] != pad)] = end
            first[first == pad] = end
        cut.append(torch.cat([start, first, part[:, 1:], last], dim=1))
    return torch.cat(cut, dim=1)


def joined(states: Tensor, pieces: int) -> Tensor:
    """Hidden states [P n, L, D] of n pieces as those of one prompt [P, n (L - 2) + 2, D]: one start and one end."""
    import torch

    if pieces == 1:
        return states
    parts = states.unflatten(0, (-1, pieces))
    inner = parts[:, :, 1:-1].flatten(1, 2)
    return torch.cat([parts[:, 0, :1], inner, parts[:, -1, -1:]], dim=1)
