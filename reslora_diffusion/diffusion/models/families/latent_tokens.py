"""Latents as the tokens of a transformer: each cell of 2 x 2 latents is one token with four times the channels.

packed      [B, C, h, w] -> [B, h w / 4, 4 C]
unpacked    its inverse
places      (0, row, column) of each token, [h w / 4, 3]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CELL = 2  # latents that a token is wide and high


def packed(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] as tokens [B, h w / 4, 4 C]."""
    import torch.nn.functional as F

    return F.pixel_unshuffle(latents, CELL).flatten(2).mT


def unpacked(tokens: Tensor, latents: Tensor) -> Tensor:
    """Inverse of `packed`, in the shape of `latents`."""
    import torch.nn.functional as F

    height, width = latents.shape[2:]
    return F.pixel_shuffle(tokens.mT.unflatten(2, (height // CELL, width // CELL)), CELL)


def places(latents: Tensor, cell: int = CELL) -> Tensor:
    """Place (0, row, column) of each token of latents [B, C, h, w], whose cells are `cell` latents wide and high."""
    import torch
    import torch.nn.functional as F

    rows, columns = (torch.arange(side // cell, device=latents.device) for side in latents.shape[2:])
    return F.pad(torch.cartesian_prod(rows, columns), (1, 0))
