"""Scores say how much the loss depends on each head and channel, from the gradients of LoRA's factors alone.

The importance of an element of V = W + s B A is its first-order share in the loss, squared: (dL/dV V)^2. dL/dV is never
computed; what one step of gradient descent does to s B A stands for it (LoRAPrune, section 3):

    G    = s (g_B A + B g_A - g_B g_A)          B - g_B and A - g_A are the factors after a step of size 1
         = s [g_B, B] [A - g_A; g_A]            one product of rank 2 r
    I    = (G * V)^2                            elementwise, [out, in]
    I_g  = sum of I over the rows and columns of group g

    A, g_A [r, in]    B, g_B [out, r]    W [out, in]

With shortcut `block` a layer adds s B A of earlier blocks too, so V and G have one such term for each of them. I is
made for a few rows at a time.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.adapter import Adapter
from .structures import COLUMNS, Structure

ELEMENTS = 1 << 22  # of I that exist at one time


class Term(NamedTuple):
    """One low-rank term of a layer, and its gradients."""

    A: Tensor
    B: Tensor
    grad_A: Tensor
    grad_B: Tensor
    scaling: float


def row_and_column_sums(W: Tensor, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Sums of I along both axes: [out], [in]."""
    scaled = [(term.B * term.scaling, term.grad_B * term.scaling, term) for term in terms]
    up, down = torch.cat([B for B, _, _ in scaled], 1), torch.cat([term.A for term in terms])
    moved_up = torch.cat([part for B, grad_B, _ in scaled for part in (grad_B, B)], 1)
    moved_down = torch.cat([part for _, _, t in scaled for part in (t.A - t.grad_A, t.grad_A)])
    rows, columns = up.new_empty(len(W)), up.new_zeros(W.shape[1])
    for start in range(0, len(W), step := max(1, ELEMENTS // W.shape[1])):
        part = slice(start, start + step)
        V = torch.addmm(W[part].to(up.dtype), up[part], down)
        importance = (moved_up[part] @ moved_down).mul_(V).square_()
        rows[part] = importance.sum(1)
        columns += importance.sum(0)
    return rows, columns


def terms_of(adapter: Adapter, name: str, gradient_scale: float) -> list[Term] | None:
    """The terms of an adapted layer; None if one has no gradient."""
    terms = []
    for block in adapter.layer(name).blocks:
        A, B = adapter.factors(block.name)
        if A.grad is None or B.grad is None:
            return None
        A, B, grad_A, grad_B = (
            value.detach().to(torch.float64 if value.dtype == torch.float64 else torch.float32)
            for value in (A, B, A.grad, B.grad)
        )
        grad_A, grad_B = grad_A / gradient_scale, grad_B / gradient_scale
        terms.append(Term(A, B, grad_A, grad_B, adapter.layers[name].scaling[adapter.adapter_name]))
    return terms


@torch.no_grad()
def score(adapter: Adapter, structures: Iterable[Structure], gradient_scale: float = 1.0) -> list[Tensor]:
    """I_g of every group [count], by structure. Layers without an adapter count for nothing.

    Args:
        gradient_scale: what the loss was multiplied by, against underflow.
    """
    structures = list(structures)
    wanted = {name for structure in structures for name in structure.layers}
    sums = {}
    for name in adapter.sites:
        if name in wanted and (terms := terms_of(adapter, name, gradient_scale)):
            sums[name] = row_and_column_sums(adapter.layer(name).base.get_parameter("weight").detach(), terms)
    found = []
    for structure in structures:
        total: Tensor | None = None
        for layer, axis, group in structure.slices:
            if layer in sums:
                values = sums[layer][1 if axis == COLUMNS else 0]
                total = values.new_zeros(structure.count) if total is None else total
                owned, place = group >= 0, group.clamp(min=0)
                total.index_add_(0, place.to(values.device), torch.where(owned.to(values.device), values, 0).to(total))
        found.append(torch.zeros(structure.count) if total is None else total)
    return found
