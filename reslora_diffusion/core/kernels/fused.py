"""The operation as one node of the autograd graph. With g = dL/dy and h = dL/d(published), and z = D r + c:

    t = s g U (+ h)     dc = t     dU = s g^T z     dD = t^T r     dr = t D     dx = g W (+ dr)

Nothing as wide as x is added up, stored or read twice: scaling and sums ride in matrix products (`addmm`), and only
references to r, the factors and z are kept. Where x says how it can be made again from a tensor that is kept anyway
(`can_be_remade`), not even x is. This is the form with the least host work, which is what a small layer on a CPU takes
most of its time for; `core.kernels.grouped` is the same for several layers that read one x.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import LinearOp, Publish, scaled_parts, scaled_product, side_by_side

UNSAFE_VIEW = torch.ops.aten._unsafe_view.default  # by its overload: to look that up takes longer than the rest
REMAKE = "remade_from"  # attribute of a tensor: (function, source, version of the tensor)


def can_be_remade(x: Tensor, function: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
    """`x`, with the note that it is `function(source)` and need not be kept."""
    if not x.is_inference():
        setattr(x, REMAKE, (function, source, x._version))
    return x


def what_to_keep(x: Tensor) -> tuple[Callable[[Tensor], Tensor] | None, Tensor]:
    """`(function, tensor)`: x is the function of the tensor, or the tensor itself. A note on an x that was changed in
    place since is void."""
    function, source, version = getattr(x, REMAKE, (None, x, None))
    return (function, source) if version is not None and x._version == version else (None, x)


def shaped(y: Tensor, lead: torch.Size) -> Tensor:
    """[T, n] -> [*lead, n], as no view of `y`: what comes after may change it in place."""
    return UNSAFE_VIEW(y, (*lead, y.shape[-1]))


def fused_linear(op: LinearOp) -> tuple[Tensor, Tensor | None]:
    """y, and what is published; a kernel."""
    U, scaling = scaled_parts(op)
    D = op.D if op.ahead is None else (*op.D, op.ahead)
    found = FusedLinear.apply(op.publish, scaling, len(D), op.x, op.weight, op.bias, op.read, op.carry, *D, *U)
    return found if op.publish is not Publish.NOTHING else (found, None)


class FusedLinear(torch.autograd.Function):
    """The node; `parts` are first `downs` matrices that make up D (the last of them `ahead`), then those of U."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        publish: Publish,
        scaling: float,
        downs: int,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        read: Tensor | None,
        carry: Tensor | None,
        *parts: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        D, U = side_by_side(parts[:downs], parts[downs:])
        rows, rank = x.reshape(-1, x.shape[-1]), U.shape[1]
        r = rows if read is None else read.reshape(-1, read.shape[-1])
        flat = None if carry is None else carry.reshape(-1, rank)
        if flat is not None and publish is Publish.SUM:
            published = z = torch.addmm(flat, r, D.t())
        else:
            published = z = F.linear(r, D)
            if publish is Publish.AHEAD:
                published, z = z[:, rank:], z[:, :rank]
            if flat is not None:
                z = z + flat if publish is Publish.OWN else z.add_(flat)
        y = F.linear(rows, weight, bias).addmm_(z, U.t(), alpha=scaling)
        ctx.remake, kept = what_to_keep(x) if read is None else (None, read)
        ctx.save_for_backward(kept, weight, carry, z, D, U, *(parts if len(parts) > 2 else ()))
        ctx.publish, ctx.scaling, ctx.downs, ctx.apart = publish, scaling, downs, read is not None
        ctx.set_materialize_grads(False)
        lead = x.shape[:-1]
        if publish is Publish.NOTHING:
            return shaped(y, lead)
        return shaped(y, lead), published.view(*lead, published.shape[-1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None = None) -> tuple[Any, ...]:  # type: ignore[override]
        kept, weight, carry, z, D, U, *parts = ctx.saved_tensors
        read = kept if ctx.remake is None else ctx.remake(kept)
        r, rank = read.reshape(-1, read.shape[-1]), U.shape[1]
        if torch.is_grad_enabled():  # for a second derivative, which a value from inside forward would cut off
            D, U = side_by_side(parts[: ctx.downs], parts[ctx.downs :]) if parts else (D, U)
            z = F.linear(r, D[:rank]) if carry is None else F.linear(r, D[:rank]) + carry.reshape(-1, rank)
        g = r.new_zeros(len(r), len(U)) if g is None else g.reshape(-1, len(U))
        h = None if h is None else h.reshape(len(r), h.shape[-1])
        if h is not None and ctx.publish is Publish.SUM:
            t_c = t = torch.addmm(h, g, U, alpha=ctx.scaling)
        else:
            t_c = t = scaled_product(g, U, ctx.scaling)
            if ctx.publish is Publish.AHEAD:
                t = torch.cat((t, r.new_zeros(len(r), len(D) - rank) if h is None else h), dim=1)
            elif h is not None:
                t = t + h
        _, _, _, for_x, _, _, for_read, for_carry, *for_parts = ctx.needs_input_grad
        dx = torch.mm(g, weight) if for_x else None
        dr = None
        if for_read:
            dr = torch.mm(t, D).view(read.shape)
        elif dx is not None and not ctx.apart:
            dx.addmm_(t, D)
        dx = None if dx is None else dx.view(read.shape)
        dc = t_c.view(carry.shape) if for_carry else None
        if not any(for_parts):
            return None, None, None, dx, None, None, dr, dc, *(None for _ in for_parts)
        dD, dU = torch.mm(t.t(), r), scaled_product(g.t(), z, ctx.scaling)
        if not parts:
            return None, None, None, dx, None, None, dr, dc, dD, dU
        return None, None, None, dx, None, None, dr, dc, *split(dD, dU, parts[: ctx.downs], parts[ctx.downs :])


def split(dD: Tensor, dU: Tensor, D: Sequence[Tensor], U: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the parts that matrices were put together from."""
    down = (dD,) if len(D) == 1 else torch.split_with_sizes(dD, [len(A) for A in D])
    up = (dU,) if len(U) == 1 else torch.split_with_sizes(dU, [B.shape[1] for B in U], dim=1)
    return *down, *up
