"""Operations that read one x, as one node of the autograd graph: q, k and v of an attention, for instance.

    z    = D x             D [R, in]: the down-projections of all operations, one above the other
    z_i  = its rows of z + c_i
    y_i  = W_i x + b_i + s_i U_i z_i

and what each hands on (`Publish`). Backward, with g_i = dL/dy_i, h_i = dL/d(published):

    t_i = s_i g_i U_i (+ h_i)     dc_i = t_i     dU_i = s_i g_i^T z_i     dD = t^T x     dx = sum_i g_i W_i + t D

All operations of a group carry in and hand on the same kind of thing, which is one tensor for all of them then.

x is read by one down-projection instead of one per layer, and the gradients with respect to it meet in one buffer. That
saves launches, so it is for a GPU alone, and has not been timed on one; a CPU takes longer by it (docs/LOG.md). Factors
and values that lie side by side in memory (`core.packed`) are put together without a copy.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import LinearOp, Publish, scaled_parts, scaled_product, side_by_side
from .fused import shaped, what_to_keep


def grouped_linear(op: LinearOp) -> tuple[Tensor, Tensor | None]:
    """y, and what is published; a kernel: a group of one."""
    return grouped_linears([op])[0]


def can_be_grouped(ops: Sequence[LinearOp]) -> bool:
    """Return whether operations read one tensor, and nothing else, and all carry in and hand on alike."""
    kinds = {(op.publish, op.carry is None) for op in ops}
    alike = all(op.x is ops[0].x and op.read is ops[0].read and op.base is op.transform is None for op in ops)
    return alike and len(kinds) == 1


def grouped_linears(ops: Sequence[LinearOp]) -> list[tuple[Tensor, Tensor | None]]:
    """y and what is published, of operations that can be grouped."""
    first, pairs, scalings = ops[0], [], []
    for op in ops:
        ups, scaling = scaled_parts(op)
        pairs.append(side_by_side(op.D, ups))
        scalings.append(scaling)
    tensors = [part for side in zip(*pairs, strict=True) for part in side]
    for column in ("weight", "bias", "carry", "ahead"):
        tensors += [getattr(op, column) for op in ops]
    found = GroupedLinears.apply(first.publish, tuple(scalings), first.x, first.read, *tensors)
    return list(zip(found[: len(ops)], found[len(ops) :] or [None] * len(ops), strict=True))


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat(parts, dim)` of matrices, without a copy where they lie side by side in memory already."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if torch.is_grad_enabled():
        return torch.cat(tuple(parts), dim)
    at, storage = first.storage_offset(), first.untyped_storage()._cdata
    for part in parts:
        if part.untyped_storage()._cdata != storage or part.storage_offset() != at or part.stride() != first.stride():
            return torch.cat(tuple(parts), dim)
        at += part.shape[dim] * part.stride(dim)
    size = list(first.shape)
    size[dim] = sum(part.shape[dim] for part in parts)
    if dim == 1 and first.stride(0) < size[1]:  # rows that overlap: not one matrix
        return torch.cat(tuple(parts), dim)
    return first.as_strided(size, first.stride(), first.storage_offset())


def side(parts: Sequence[Tensor | None], sizes: Sequence[int], rows: Tensor) -> Tensor | None:
    """[..., size_i] each, with zeros for what is not there, side by side: [T, sum]; None if nothing is there."""
    if all(part is None for part in parts):
        return None
    flat = [
        rows.new_zeros(len(rows), size) if part is None else part.reshape(len(rows), size)
        for part, size in zip(parts, sizes, strict=True)
    ]
    return joined(flat, 1)


class GroupedLinears(torch.autograd.Function):
    """The group as one node; `tensors` are D_1.. U_1.. W_1.. b_1.. c_1.. and the rows ahead."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, publish: Publish, scalings: tuple[float, ...], x: Tensor, read: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        count, lead = len(scalings), x.shape[:-1]
        D, U, W, bias, carried, ahead = (tensors[at : at + count] for at in range(0, 6 * count, count))
        rows = x.reshape(-1, x.shape[-1])
        r = rows if read is None else read.reshape(rows.shape)
        ranks = [len(part) for part in D]
        down = joined([part for part in (*D, *ahead) if part is not None], 0)
        carry = side(carried, ranks, rows)
        if carry is not None and publish in (Publish.NOTHING, Publish.SUM):
            z = total = torch.addmm(carry, r, down.T)
        else:
            z = F.linear(r, down)
            total = z[:, : sum(ranks)]
            if carry is not None:
                total = total + carry if publish is Publish.OWN else total.add_(carry)
        ys = [
            shaped(F.linear(rows, weight, offset).addmm_(own, up.T, alpha=scaling), lead)
            for own, up, weight, offset, scaling in zip(total.split(ranks, 1), U, W, bias, scalings, strict=True)
        ]
        published: Sequence[Tensor] = ()
        if publish is Publish.AHEAD:
            published = z[:, sum(ranks) :].split([len(part) for part in ahead], 1)
        elif publish is not Publish.NOTHING:
            published = (z if publish is Publish.OWN else total).split(ranks, 1)
        ctx.remake, kept = what_to_keep(x) if read is None else (None, read)
        ctx.save_for_backward(kept, total, *D, *U, *W, *carried, *ahead)
        ctx.publish, ctx.scalings, ctx.apart = publish, scalings, read is not None
        ctx.set_materialize_grads(False)
        return *ys, *(part.unflatten(0, lead) for part in published)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        kept, total, *tensors = ctx.saved_tensors
        read = kept if ctx.remake is None else ctx.remake(kept)
        count, rows = len(ctx.scalings), read.reshape(-1, read.shape[-1])
        D, U, W, carried, ahead = (tensors[at : at + count] for at in range(0, 5 * count, count))
        downs = [part for part in (*D, *ahead) if part is not None]
        ranks, down = [len(part) for part in D], joined(downs, 0)
        if torch.is_grad_enabled():  # for a second derivative, which a value from inside forward would cut off
            carry, total = side(carried, ranks, rows), rows @ down[: sum(ranks)].T
            total = total if carry is None else total + carry
        g = [
            rows.new_zeros(len(rows), len(up)) if each is None else each.reshape(len(rows), len(up))
            for each, up in zip(gradients[:count], U, strict=True)
        ]
        h = side(gradients[count:], [len(part) for part in downs[count:]] or ranks, rows)
        t = t_carried = up_gradients(g, U, ctx.scalings, h if ctx.publish is Publish.SUM else None)
        if ctx.publish is Publish.AHEAD:
            t = torch.cat((t, rows.new_zeros(len(rows), len(down) - sum(ranks)) if h is None else h), dim=1)
        elif ctx.publish is Publish.OWN and h is not None:
            t = t + h
        _, _, for_x, for_read, *needed = ctx.needs_input_grad
        for_D, for_U, _, _, for_carry, for_ahead = (needed[at : at + count] for at in range(0, 6 * count, count))
        dx = None
        if for_x:
            dx = g[0] @ W[0]
            for each, weight in zip(g[1:], W[1:], strict=True):
                dx.addmm_(each, weight)
            dx = (dx if ctx.apart else dx.addmm_(t, down)).view(read.shape)
        dr = (t @ down).view(read.shape) if for_read else None
        none = [None] * count
        dD, dA = none, none
        if any(for_D) or any(for_ahead):
            dD = (t.T @ rows).split([len(part) for part in downs])
            dD, dA = dD[:count], dD[count:] or none
        dU = [
            scaled_product(each.T, z, scaling) if wanted else None
            for each, z, scaling, wanted in zip(g, total.split(ranks, 1), ctx.scalings, for_U, strict=True)
        ]
        dc = [
            part.unflatten(0, read.shape[:-1]) if wanted else None
            for part, wanted in zip(t_carried.split(ranks, 1), for_carry, strict=True)
        ]
        return None, None, dx, dr, *dD, *dU, *none, *none, *dc, *dA


def up_gradients(g: Sequence[Tensor], U: Sequence[Tensor], scalings: Sequence[float], h: Tensor | None) -> Tensor:
    """t [T, sum of ranks], with h added to it."""
    ranks, differentiable = [up.shape[1] for up in U], torch.is_grad_enabled()  # `out=` has no derivative
    t = None if differentiable else g[0].new_empty(len(g[0]), sum(ranks))
    places = [None] * len(g) if t is None else t.split(ranks, 1)
    added = [None] * len(g) if h is None else h.split(ranks, 1)
    parts = [
        scaled_product(each, up, s, out) if plus is None else torch.addmm(plus, each, up, alpha=s, out=out)
        for each, up, s, plus, out in zip(g, U, scalings, added, places, strict=True)
    ]
    return torch.cat(parts, dim=1) if t is None else t
