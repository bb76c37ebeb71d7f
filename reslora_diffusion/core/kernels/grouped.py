"""Operations that read one x, as one node of the autograd graph: q, k and v of an attention, for instance.

    z    = D x             D [R, in]: the down-projections of all operations, one above the other
    z_i  = its rows of z + c_i
    y_i  = W_i x + b_i + s_i U_i z_i

and what each hands on (`Publish`). Backward, with g_i = dL/dy_i, h_i = dL/d(published):

    t_i = s_i g_i U_i (+ h_i)     dc_i = t_i     dU_i = s_i g_i^T z_i     dD = t^T x     dx = sum_i g_i W_i + t D

x is read by one down-projection instead of one per layer, and the gradients with respect to it meet in one buffer. That
saves launches, so it is for a GPU alone, and has not been timed on one; a CPU takes longer by it (docs/LOG.md). Factors
and values that lie side by side in memory (`core.packed`) are put together without a copy.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import LinearOp, Publish, scaled_parts, scaled_product, side_by_side
from .fused import shaped, what_to_keep


class Member(NamedTuple):
    """One operation of a group, without its tensors."""

    publish: Publish
    scaling: float
    rank: int
    ahead: int  # rows of the next layer's lora_A


def grouped_linear(op: LinearOp) -> tuple[Tensor, Tensor | None]:
    """y, and what is published; a kernel: a group of one."""
    return grouped_linears([op])[0]


def can_be_grouped(ops: Sequence[LinearOp]) -> bool:
    """Return whether operations read one tensor, and nothing else."""
    return all(op.x is ops[0].x and op.read is ops[0].read and op.base is op.transform is None for op in ops)


def grouped_linears(ops: Sequence[LinearOp]) -> list[tuple[Tensor, Tensor | None]]:
    """y and what is published, of operations that can be grouped."""
    members, D, U = [], [], []
    for op in ops:
        ups, scaling = scaled_parts(op)
        down, up = side_by_side(op.D, ups)
        D.append(down)
        U.append(up)
        members.append(Member(op.publish, scaling, len(down), 0 if op.ahead is None else len(op.ahead)))
    tensors = [*D, *U]
    for column in ("weight", "bias", "carry", "ahead"):
        tensors += [getattr(op, column) for op in ops]
    found = list(GroupedLinears.apply(tuple(members), ops[0].x, ops[0].read, *tensors))
    values = iter(found[len(ops) :])
    return [
        (y, next(values) if member.publish is not Publish.NOTHING else None)
        for y, member in zip(found, members, strict=False)
    ]


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
    """See the module; `tensors` are D_1.. U_1.. W_1.. b_1.. c_1.. and the rows ahead."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, members: tuple[Member, ...], x: Tensor, read: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        count, lead = len(members), x.shape[:-1]
        D, U, W, bias, carried, ahead = (tensors[at : at + count] for at in range(0, 6 * count, count))
        rows = x.reshape(-1, x.shape[-1])
        r = rows if read is None else read.reshape(rows.shape)
        ranks = [member.rank for member in members]
        own = sum(ranks)
        down = joined([part for part in (*D, *ahead) if part is not None], 0)
        carry = side(carried, ranks, rows)
        publishes = {member.publish for member in members}
        if carry is not None and not publishes & {Publish.OWN, Publish.AHEAD}:
            z = total = torch.addmm(carry, r, down.T)
        else:
            z = F.linear(r, down)
            total = z[:, :own] if len(down) > own else z
            if carry is not None:
                total = total + carry if Publish.OWN in publishes else total.add_(carry)
        outputs, handed, at, next_at = [], [], 0, own
        for member, up, weight, offset in zip(members, U, W, bias, strict=True):
            mine = slice(at, at + member.rank)
            y = F.linear(rows, weight, offset)  # type: ignore[arg-type]
            outputs.append(shaped(y.addmm_(total[:, mine], up.T, alpha=member.scaling), lead))  # type: ignore[union-attr]
            if member.publish is Publish.AHEAD:
                handed.append(z[:, next_at : next_at + member.ahead].unflatten(0, lead))
                next_at += member.ahead
            elif member.publish is not Publish.NOTHING:
                handed.append((z if member.publish is Publish.OWN else total)[:, mine].unflatten(0, lead))
            at += member.rank
        ctx.remake, kept = what_to_keep(x) if read is None else (None, read)
        ctx.save_for_backward(kept, total, *D, *U, *W, *carried, *ahead)
        ctx.members, ctx.apart = members, read is not None
        ctx.set_materialize_grads(False)
        return *outputs, *handed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        kept, total, *tensors = ctx.saved_tensors
        read = kept if ctx.remake is None else ctx.remake(kept)
        members: tuple[Member, ...] = ctx.members
        count, ranks, rows = len(members), [member.rank for member in members], read.reshape(-1, read.shape[-1])
        D, U, W, carried, ahead = (tensors[at : at + count] for at in range(0, 5 * count, count))
        down = joined([part for part in (*D, *ahead) if part is not None], 0)
        own = sum(ranks)
        if torch.is_grad_enabled():  # for a second derivative, which a value from inside forward would cut off
            carry, total = side(carried, ranks, rows), rows @ down[:own].T
            total = total if carry is None else total + carry
        g = [None if each is None else each.reshape(len(rows), each.shape[-1]) for each in gradients[:count]]
        given = iter(gradients[count:])
        h = [next(given) if member.publish is not Publish.NOTHING else None for member in members]
        sums, owns, later = (
            [value if member.publish is publish else None for value, member in zip(h, members, strict=True)]
            for publish in (Publish.SUM, Publish.OWN, Publish.AHEAD)
        )
        t = t_carried = up_gradients(g, U, members, rows, sums)
        if (direct := side(owns, ranks, rows)) is not None:
            t = t + direct
        if len(down) > own:
            forward = [(value, member.ahead) for value, member in zip(later, members, strict=True) if member.ahead]
            beyond = side([value for value, _ in forward], [size for _, size in forward], rows)
            t = torch.cat((t, rows.new_zeros(len(rows), len(down) - own) if beyond is None else beyond), dim=1)
        _, for_x, for_read, *needed = ctx.needs_input_grad
        for_D, for_U, _, _, for_carry, for_ahead = (needed[at : at + count] for at in range(0, 6 * count, count))
        dx = None
        if for_x:
            for each, weight in zip(g, W, strict=True):
                if each is not None:
                    dx = each @ weight if dx is None else dx.addmm_(each, weight)
            if not ctx.apart:
                dx = t @ down if dx is None else dx.addmm_(t, down)
            dx = None if dx is None else dx.view(read.shape)
        dr = (t @ down).view(read.shape) if for_read else None
        dD: list[Tensor | None] = [None] * count
        dA: list[Tensor | None] = [None] * count
        if any(for_D) or any(for_ahead):
            pieces = iter((t.T @ rows).split([*ranks, *(member.ahead for member in members if member.ahead)]))
            dD = [next(pieces) for _ in members]
            dA = [next(pieces) if member.ahead else None for member in members]
        dU = [
            scaled_product(each.T, z, member.scaling) if wanted and each is not None else None
            for each, z, member, wanted in zip(g, total.split(ranks, dim=1), members, for_U, strict=True)
        ]
        dc = [
            part.unflatten(0, read.shape[:-1]) if wanted else None
            for part, wanted in zip(t_carried.split(ranks, dim=1), for_carry, strict=True)
        ]
        none = [None] * count
        return None, dx, dr, *dD, *dU, *none, *none, *dc, *dA


def up_gradients(
    g: Sequence[Tensor | None],
    U: Sequence[Tensor],
    members: Sequence[Member],
    rows: Tensor,
    added: Sequence[Tensor | None],
) -> Tensor:
    """t [T, sum of ranks]."""
    differentiable = torch.is_grad_enabled()  # in a backward: of a second derivative, where `out=` may not be used
    t = None if differentiable or len(g) == 1 else rows.new_empty(len(rows), sum(member.rank for member in members))
    parts: list[Tensor] = []
    at = 0
    for each, up, member, more in zip(g, U, members, added, strict=True):
        out = None if t is None else t[:, at : at + member.rank]
        plus = None if more is None else more.reshape(len(rows), member.rank)
        if each is None:
            part = rows.new_zeros(len(rows), member.rank) if plus is None else plus
            part = part if out is None else out.copy_(part)
        elif plus is None:
            part = scaled_product(each, up, member.scaling, out)
        else:
            part = torch.addmm(plus, each, up, alpha=member.scaling, out=out)
        parts.append(part)
        at += member.rank
    return t if t is not None else torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
