"""One adapted linear layer of which some products go through matrices as large as its weight (`core.forms`):

    V = W + s sum_k U_k D_k     y = x V^T + b     dx = g V     G = g^T x     dD_k = s U_k^T G     dU_k = s G D_k^T

and the others through rank R, as in `core.fused_layer`. It equals that to rounding, for layers that nothing is carried
into and that publish nothing: plain LoRA, `block`, and the first of a chain. V is made again in backward where to keep
it would take more memory than what the low-rank form keeps.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .forms import Form
from .fused_layer import scaled_product, shaped, stacked, what_to_keep


def merged_weight(weight: Tensor, D: Sequence[Tensor], U: Sequence[Tensor], scaling: float) -> Tensor:
    """V [out, in]."""
    V = torch.addmm(weight, U[0], D[0], alpha=scaling)
    for down, up in zip(D[1:], U[1:], strict=True):
        V.addmm_(up, down, alpha=scaling)
    return V


class WholeLinear(torch.autograd.Function):
    """See the module; `parts` are D_1.. and then U_1.. Where anything goes through rank R, they are put together."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, form: Form, scaling: float, x: Tensor, weight: Tensor, bias: Tensor | None, *parts: Tensor
    ) -> Tensor:
        count, rows, V, z = len(parts) // 2, x.reshape(-1, x.shape[-1]), None, None
        pairs = parts if count == 1 or form.entirely else stacked(parts, count)
        if form.y:
            half = len(pairs) // 2
            V = merged_weight(weight, pairs[:half], pairs[half:], scaling)
            y = F.linear(rows, V, bias)
        else:
            z = F.linear(rows, pairs[0])
            y = F.linear(rows, weight, bias).addmm_(z, pairs[1].t(), alpha=scaling)
        ctx.remake, kept = what_to_keep(x)
        z, V = None if form.factors else z, V if form.keeps else None
        ctx.save_for_backward(kept, weight, V, z, *pairs, *(() if pairs is parts else parts))
        ctx.form, ctx.scaling, ctx.pairs = form, scaling, len(pairs)
        return shaped(y, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        kept, weight, V, z, *pairs = ctx.saved_tensors
        pairs, parts = pairs[: ctx.pairs], pairs[ctx.pairs :]
        x = kept if ctx.remake is None else ctx.remake(kept)
        form, scaling = ctx.form, ctx.scaling
        _, _, for_x, _, _, *for_parts = ctx.needs_input_grad
        for_factors = any(for_parts)
        if torch.is_grad_enabled():  # for a second derivative, which a value from inside forward would cut off
            V = z = None
            pairs = stacked(parts, len(parts) // 2) if parts else pairs
        D, U = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        rows, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, len(weight))
        low_factors, low_x = for_factors and not form.factors, for_x and not form.x
        if low_factors or low_x:
            t = scaled_product(g, U[0], scaling)
        dx = None
        if low_x:
            dx = torch.mm(g, weight).addmm_(t, D[0]).view(x.shape)
        elif for_x:
            dx = torch.mm(g, merged_weight(weight, D, U, scaling) if V is None else V).view(x.shape)
        if not for_factors:
            return None, None, dx, None, None, *[None] * len(for_parts)
        if low_factors:
            z = F.linear(rows, D[0]) if z is None else z
            dD, dU = [torch.mm(t.t(), rows)], [scaled_product(g.t(), z, scaling)]
        else:
            G = torch.mm(g.t(), rows)
            dD = [scaled_product(up.t(), G, scaling) for up in U]
            dU = [scaled_product(G, down.t(), scaling) for down in D]
        if not parts:
            return None, None, dx, None, None, *dD, *dU
        ranks = [len(part) for part in parts[: len(parts) // 2]]
        split = torch.split_with_sizes
        return None, None, dx, None, None, *split(dD[0], ranks), *split(dU[0], ranks, dim=1)
