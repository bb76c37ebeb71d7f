"""ResLoRA's arithmetic as plain functions of tensors (arXiv 2402.18039, section 3.2).

Block n of a chain has the frozen weight W_n, lora_A = A_n [r, in], lora_B = B_n [out, r] and scaling s = alpha / r.
With x_n [..., in] the input of block n, what the adapter adds to W_n x_n is

    none     s B_n A_n x_n
    input    s B_n A_n (x_n + x_{n-1})
    block    s (sum_{k=0..m} B_{n-k} A_{n-k}) x_n           = s [B_n, B_{n-1}, ...] [A_n; A_{n-1}; ...] x_n
    middle   s B_n (sum_{k=0..m} A_{n-k} x_{n-k})

Everything is written so that no tensor as wide as x is added up, stored or differentiated twice: the two inputs of
`input` meet at rank r, the sum of `middle` is kept at rank r, and `block` is one LoRA of rank (m + 1) r.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LoraFactors(NamedTuple):
    """A plain LoRA of one layer: delta_weight = scaling * lora_B @ lora_A.

    Shapes: lora_A [r, in], lora_B [out, r]. For a convolution lora_A [r, in, kh, kw], lora_B [out, r, 1, 1].
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


def delta_weight(factors: LoraFactors) -> Tensor:
    """The dense update [out, in] of a linear layer."""
    return factors.scaling * (factors.lora_B @ factors.lora_A)


def down(x: Tensor, lora_A: Tensor) -> Tensor:
    """A x: [..., in] -> [..., r]."""
    return F.linear(x, lora_A)


def down_sum(x: Tensor, previous: Tensor, lora_A: Tensor) -> Tensor:
    """A (x + previous) without the sum: [..., in], [..., in] -> [..., r]."""
    return F.linear(x, lora_A) + F.linear(previous, lora_A)


def up_add(result: Tensor, z: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """result + scaling * B z, in one operation: [..., out], [..., r] -> [..., out]."""
    if result.dtype != z.dtype:
        return result + (scaling * F.linear(z, lora_B)).to(result.dtype)
    flat = torch.addmm(result.reshape(-1, result.shape[-1]), z.reshape(-1, z.shape[-1]), lora_B.T, alpha=scaling)
    return flat.view(result.shape)


def concatenated(blocks: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`(A, B)` of sum_k B_k A_k, exactly: [R, in] and [out, R] with R the sum of the ranks."""
    lora_A, lora_B = zip(*blocks, strict=True)
    if len(blocks) == 1:
        return lora_A[0], lora_B[0]
    return torch.cat(lora_A), torch.cat(lora_B, dim=1)
