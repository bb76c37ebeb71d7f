"""Adapted linear layers that read one x, as one node of the autograd graph (`core.fused_layer`, several at once):

    z   = D x                     D [R, in]: the down-projections of the group, stacked
    z_i = its rows of z + c_i     c_i [..., r_i]: what the shortcut carries into layer i, if anything
    y_i = W_i x + b_i + s_i U_i z_i

and what each hands on (`Publishes`). Backward, with g_i = dL/dy_i, h_i = dL/d(published):

    t_i = s_i g_i U_i (+ h_i)     dc_i = t_i     dU_i = s_i g_i^T z_i     dD = t^T x     dx = sum_i g_i W_i + t D

x is read by one down-projection instead of one per layer, and the gradients with respect to it meet in one buffer.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused_layer import Publishes, scaled_product, shaped, what_to_keep


def joined(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat(parts, dim=1)`, without a copy where the parts lie side by side in memory already."""
    first = parts[0]
    if len(parts) == 1:
        return first
    at, storage = first.storage_offset(), first.untyped_storage()._cdata
    for part in parts:
        if part.untyped_storage()._cdata != storage or part.storage_offset() != at or part.stride() != first.stride():
            return torch.cat(tuple(parts), dim=1)
        at += part.shape[1]
    size = (len(first), at - first.storage_offset())
    return first.as_strided(size, first.stride(), first.storage_offset()) if first.stride(0) >= size[1] else first


class FusedLinears(torch.autograd.Function):
    """See the module; called through `fused_linears`. `rest` is U_1.. W_1.. b_1.. c_1.."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        publishes: Publishes,
        scalings: tuple[float, ...],
        ranks: tuple[int, ...],
        later: tuple[int, ...],
        x: Tensor,
        D: Tensor,
        *rest: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count, lead, own = len(scalings), x.shape[:-1], sum(ranks)
        U, W, bias, carried = (rest[at : at + count] for at in range(0, 4 * count, count))
        rows = x.reshape(-1, x.shape[-1])
        carry = bundle(carried, ranks, rows)
        if carry is not None and publishes is Publishes.SUM:
            published = total = torch.addmm(carry, rows, D.T)
        else:
            z = F.linear(rows, D)
            published, total = (z[:, own:], z[:, :own]) if publishes is Publishes.NEXT else (z, z)
            if carry is not None:
                total = total + carry if publishes is Publishes.OWN else total.add_(carry)
        outputs, at = [], 0
        for scaling, rank, up, weight, offset in zip(scalings, ranks, U, W, bias, strict=True):
            y = F.linear(rows, weight, offset)  # type: ignore[arg-type]
            y.addmm_(total[:, at : at + rank], up.T, alpha=scaling)  # type: ignore[union-attr]
            outputs.append(shaped(y, lead))
            at += rank
        ctx.remake, kept = what_to_keep(x)
        ctx.save_for_backward(kept, D, total, *U, *W, *carried)
        ctx.publishes, ctx.scalings, ctx.ranks, ctx.later = publishes, scalings, ranks, later
        ctx.set_materialize_grads(False)
        if publishes is Publishes.NOTHING:
            return tuple(outputs)
        sizes = later if publishes is Publishes.NEXT else ranks
        return *outputs, *(part.unflatten(0, lead) for part in published.split(sizes, dim=1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        kept, D, total, *rest = ctx.saved_tensors
        x = kept if ctx.remake is None else ctx.remake(kept)
        count, ranks, scalings = len(ctx.scalings), ctx.ranks, ctx.scalings
        U, W, carried = (rest[at : at + count] for at in range(0, 3 * count, count))
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():  # for a second derivative, which a value from inside forward would cut off
            carry, total = bundle(carried, ranks, rows), rows @ D[: sum(ranks)].T
            total = total if carry is None else total + carry
        g = [None if each is None else each.reshape(len(rows), each.shape[-1]) for each in gradients[:count]]
        handed = gradients[count:]
        t = t_c = up_gradients(g, U, scalings, ranks, rows, handed if ctx.publishes is Publishes.SUM else ())
        if ctx.publishes is Publishes.NEXT:
            later = bundle(handed, ctx.later, rows)
            t = torch.cat((t, rows.new_zeros(len(rows), sum(ctx.later)) if later is None else later), dim=1)
        elif ctx.publishes is Publishes.OWN:
            own = bundle(handed, ranks, rows)
            t = t if own is None else t + own
        wanted = dict(zip(("x", "D"), ctx.needs_input_grad[4:6], strict=True))
        dx = None
        if wanted["x"]:
            for each, weight in zip(g, W, strict=True):
                if each is not None:
                    dx = each @ weight if dx is None else dx.addmm_(each, weight)
            dx = (t @ D if dx is None else dx.addmm_(t, D)).view_as(x)
        dD = t.T @ rows if wanted["D"] else None
        dU = [
            scaled_product(each.T, z, scaling) if needed and each is not None else None
            for each, z, scaling, needed in zip(
                g, total.split(ranks, dim=1), scalings, ctx.needs_input_grad[6 : 6 + count], strict=True
            )
        ]
        dc = [
            part.unflatten(0, x.shape[:-1]) if needed else None
            for part, needed in zip(t_c.split(ranks, dim=1), ctx.needs_input_grad[6 + 3 * count :], strict=True)
        ]
        none = [None] * count
        return None, None, None, None, dx, dD, *dU, *none, *none, *dc


def bundle(parts: Sequence[Tensor | None], sizes: Sequence[int], rows: Tensor) -> Tensor | None:
    """[..., size_i] each, with zeros for what is not there, side by side: [T, sum]; None if nothing is there."""
    if all(part is None for part in parts):
        return None
    flat = [
        rows.new_zeros(len(rows), size) if part is None else part.reshape(len(rows), size)
        for part, size in zip(parts, sizes, strict=True)
    ]
    return joined(flat) if not torch.is_grad_enabled() else torch.cat(flat, dim=1)


def up_gradients(
    g: Sequence[Tensor | None],
    U: Sequence[Tensor],
    scalings: Sequence[float],
    ranks: Sequence[int],
    rows: Tensor,
    added: Sequence[Tensor | None],
) -> Tensor:
    """t [T, sum of ranks]."""
    differentiable = torch.is_grad_enabled()  # in a backward: of a second derivative, where `out=` may not be used
    t = None if differentiable or len(g) == 1 else rows.new_empty(len(rows), sum(ranks))
    parts: list[Tensor] = []
    at = 0
    for place, (each, up, scaling, rank) in enumerate(zip(g, U, scalings, ranks, strict=True)):
        out = None if t is None else t[:, at : at + rank]
        plus = added[place].reshape(len(rows), rank) if added and added[place] is not None else None  # type: ignore[union-attr]
        if each is None:
            part = rows.new_zeros(len(rows), rank) if plus is None else plus
            part = part if out is None else out.copy_(part)
        elif plus is None:
            part = scaled_product(each, up, scaling, out)
        else:
            part = torch.addmm(plus, each, up, alpha=scaling, out=out)
        parts.append(part)
        at += rank
    return t if t is not None else torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def fused_linears(
    x: Tensor,
    D: Tensor,
    U: Sequence[Tensor],
    linears: Sequence[Any],
    scalings: Sequence[float],
    carried: Sequence[Tensor | None],
    publishes: Publishes = Publishes.NOTHING,
    later: Sequence[int] = (),
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`(outputs, published)` of frozen `linears` that read `x` [..., in].

    Args:
        D: [R, in], own rows first, then with `Publishes.NEXT` as many as `later` says for the layer after each.
        U: [out_i, r_i] each.
        carried: [..., r_i] each, or None.
    """
    ranks = tuple(up.shape[1] for up in U)
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    results = FusedLinears.apply(publishes, tuple(scalings), ranks, tuple(later), x, D, *U, *weights, *biases, *carried)
    return results[: len(U)], results[len(U) :]
