"""The RunLoRA kernel (arXiv 2312.03415) computes an adapted layer in that of several equal forms which takes the least
arithmetic. Its operations read x itself, and neither carry nor publish anything: plain LoRA, `block`, and the last
layers of a chain.

With x [T, in], W [out, in], D [R, in], U [out, R], V = W + s U D and g = dL/dy [T, out], multiplications beside x W^T
and g W:

                through rank R                                  through matrices as large as W
    y           z = x D^T, z U^T           T R (in + out)       x V^T                        R in out
    dD, dU      t = s g U, t^T x, s g^T z  T R (in + 2 out)     G = g^T x, s U^T G, s G D^T  (T + 2 R) in out
    dx          t D                        T R in               g V                          R in out

and where one of them needs a z, t or V that no other has left behind, that too. The paper calls y by these F1 and F2,
and the eight combinations of dD, dU and dx B1 to B8 (`named`); one of dD and dU through G and the other through rank R
is never the least (tests), so `cheapest` does not look at those. Large matrices win where there are many
more rows than features and R is not small beside these: small models, long sequences, and `block`, whose R is the sum
over its window. The choice is a function of shapes, the same in every run; nothing is timed. Passes over memory and
launches are counted as well, as so many multiplications: that ranks the forms as they rank when measured (docs/LOG.md).

Only for weights and factors in float32 or float64: in bf16, W + s U D loses most of a small update.
"""

import time
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import LinearOp, Publish, scaled_parts, scaled_product, side_by_side
from .fused import shaped, split, what_to_keep

PRECISE = (torch.float32, torch.float64)
PASS = 20  # multiplications in the time that it takes to write an element of V beside computing it
LAUNCH = 1e5  # multiplications in the time that it takes to begin an operation: 2 us at 50 a nanosecond
ROUNDS = 6  # of which the quickest counts
SMALL = 2**16  # elements of a V that may be kept for backward whatever the low-rank form keeps: 256 KiB in float32


class Form(NamedTuple):
    """A form says which of y, dD, dU and dx go through large matrices, and whether V is kept from y for dx.

    A gradient that is not wanted is said to go through them: nothing goes through rank R for it.
    """

    y: bool
    dD: bool
    dU: bool
    dx: bool
    keeps: bool = False

    @property
    def entirely(self) -> bool:
        """Return whether nothing goes through rank R."""
        return self.y and self.dD and self.dU and self.dx

    def __str__(self) -> str:
        large = [name for name, yes in zip(("y", "dD", "dU", "dx"), self, strict=False) if yes]
        return f"{', '.join(large) or 'nothing'} through matrices as large as W"


LOW_RANK = Form(False, False, False, False)
QUICKEST: dict[tuple, Form] = {}  # by precision, device and shapes
FORWARDS = {"F1": False, "F2": True}  # the paper's names: whether y goes through V
BACKWARDS = {  # whether dD and dU go through G, and dx through V
    "B1": (False, False, False),
    "B2": (False, True, False),
    "B3": (True, True, False),
    "B4": (True, True, True),
    "B5": (False, False, True),
    "B6": (True, False, False),
    "B7": (True, False, True),
    "B8": (False, True, True),
}


def named(name: str) -> Form:
    """The form that the paper calls so, such as `F2B5`; V is made again for dx, as there.

    Raises:
        ValueError: there is none of that name.
    """
    forward, backward = name[:2].upper(), name[2:].upper()
    if forward not in FORWARDS or backward not in BACKWARDS:
        raise ValueError(f"got the form {name!r}, wanted F1 or F2 and B1 to B8 in one word, such as F2B5")
    return Form(FORWARDS[forward], *BACKWARDS[backward])


def forms(for_x: bool, for_factors: bool) -> list[Form]:
    """The forms that go one way to dD and dU, for the gradients that are wanted."""
    every = [Form(y, factors, factors, x) for y, factors, x in product((False, True), repeat=3)]
    return [form for form in every if (form.dD or for_factors) and (form.dx or for_x)]


def cost(
    form: Form, rows: int, width: int, out: int, rank: int, parts: int = 1, for_x: bool = True, for_factors: bool = True
) -> float:
    """Multiplications of a forward and backward beside those of the frozen layer, with what `PASS` and `LAUNCH` add."""
    z, t, V = rows * rank * width, rows * rank * out, (rank + PASS) * width * out
    stack, products = (0, parts) if parts == 1 or form.entirely else (2, 1)  # D and U are put together, or not
    total, launches = (V, stack + products) if form.y else (z + t, stack + 2)
    if for_factors:
        large = (form.dD, form.dU)
        total += rows * width * out * any(large) + rank * width * out * sum(large)
        launches += any(large) + parts * sum(large)
        total += (0 if form.dD else z + t) + (0 if form.dU else t + (z if form.y else 0))
        launches += (0 if form.dD else 2) + (0 if form.dU else 1 + form.y) + (0 if all(large) else stack)
    if for_x and form.dx:
        total += 0 if form.keeps else V
        launches += 0 if form.keeps else products
    elif for_x:
        total += z + (t if form.dD else 0)
        launches += 2 if form.dD else 1
    return total + LAUNCH * launches


@lru_cache(maxsize=4096)
def cheapest(
    rows: int, width: int, out: int, rank: int, parts: int = 1, for_x: bool = True, for_factors: bool = True
) -> Form:
    """The form that costs least, of those that keep no more for backward than the low-rank form, or little.

    Args:
        rank: R, the sum over all parts.
        parts: how many factors D is put together from, and U.
        for_x, for_factors: which gradients will be wanted.
    """
    low_rank_keeps = (rows * rank if for_factors else 0) + (rank * (width + out) if parts > 1 else 0)
    may_keep = for_x and width * out <= max(low_rank_keeps, SMALL)
    allowed = [form._replace(keeps=may_keep and form.y and form.dx) for form in forms(for_x, for_factors)]
    return min(allowed, key=lambda form: cost(form, rows, width, out, rank, parts, for_x, for_factors))


def quickest(op: LinearOp) -> Form:
    """The form that is the quickest on an operation, measured once in a process for its shapes.

    It may be another in the next run, and forms differ in rounding: a run that has to be repeated or resumed bit for
    bit leaves the choice to the count of operations, or names a form.
    """
    kind = op.x.dtype, op.x.device, op.bias is None, *shape_of(op)
    if kind not in QUICKEST:
        x, *parts = (part.detach().requires_grad_(part.requires_grad) for part in (op.x, *op.D, *op.U))
        op = op._replace(x=x, D=parts[: len(op.D)], U=parts[len(op.D) :])
        times = {form: min(seconds(op, form) for _ in range(ROUNDS)) for form in forms(*shape_of(op)[-2:])}
        QUICKEST[kind] = min(times, key=times.__getitem__)
    return QUICKEST[kind]


def seconds(op: LinearOp, form: Form) -> float:
    """The time of a forward and backward: of this thread on a CPU, where a busy machine does not count."""
    if op.x.is_cpu:
        clock = time.thread_time
    else:
        clock = time.perf_counter
        torch.get_device_module(op.x.device).synchronize()
    began = clock()
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):  # not those of checkpointing
        y, _ = runlora_linear(op, form)
        if y.requires_grad:
            wanted = [tensor for tensor in (op.x, *op.D, *op.U) if tensor.requires_grad]
            torch.autograd.grad(y, wanted, torch.ones_like(y))
    if not op.x.is_cpu:
        torch.get_device_module(op.x.device).synchronize()
    return clock() - began


def fits(op: LinearOp) -> bool:
    """Return whether the operation is one that can go through large matrices at all."""
    return op.publish is Publish.NOTHING and op.carry is None and op.read is None and op.x.dtype in PRECISE


def shape_of(op: LinearOp) -> tuple[int, int, int, int, int, bool, bool]:
    """The arguments of `cheapest` for an operation that fits."""
    x, D = op.x, op.D
    parts, (rank, width) = len(D), D[0].shape
    if parts > 1:
        rank += sum([len(part) for part in D[1:]])
    with_grad = torch.is_grad_enabled()
    return (
        x.numel() // width, width, len(op.U[0]), rank, parts,
        with_grad and x.requires_grad, with_grad and D[0].requires_grad,
    )  # fmt: skip


def runlora_linear(op: LinearOp, form: Form | None = None) -> tuple[Tensor, None]:
    """y, in a form or in the cheapest; a kernel, for operations that fit."""
    U, scaling = scaled_parts(op)
    return WholeLinear.apply(form or cheapest(*shape_of(op)), scaling, op.x, op.weight, op.bias, *op.D, *U), None


def merged_weight(weight: Tensor, D: Sequence[Tensor], U: Sequence[Tensor], scaling: float) -> Tensor:
    """V [out, in]."""
    V = torch.addmm(weight, U[0], D[0], alpha=scaling)
    for down, up in zip(D[1:], U[1:], strict=True):
        V.addmm_(up, down, alpha=scaling)
    return V


class WholeLinear(torch.autograd.Function):
    """The form as one node; `parts` are D_1.. and then U_1.. If anything goes through rank R, they are put together.

    V is made again in backward where to keep it would take more memory than what the low-rank form keeps.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, form: Form, scaling: float, x: Tensor, weight: Tensor, bias: Tensor | None, *parts: Tensor
    ) -> Tensor:
        count, rows, V, z = len(parts) // 2, x.reshape(-1, x.shape[-1]), None, None
        pairs = parts if count == 1 or form.entirely else side_by_side(parts[:count], parts[count:])
        if form.y:
            half = len(pairs) // 2
            V = merged_weight(weight, pairs[:half], pairs[half:], scaling)
            y = F.linear(rows, V, bias)
        else:
            z = F.linear(rows, pairs[0])
            y = F.linear(rows, weight, bias).addmm_(z, pairs[1].t(), alpha=scaling)
        ctx.remake, kept = what_to_keep(x)
        z, V = None if form.dU else z, V if form.keeps else None
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
        for_factors, half = any(for_parts), len(for_parts) // 2
        if torch.is_grad_enabled():  # for a second derivative, which a value from inside forward would cut off
            V = z = None
            pairs = side_by_side(parts[:half], parts[half:]) if parts else pairs
        D, U = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        rows, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, len(weight))
        low_D, low_U, low_x = for_factors and not form.dD, for_factors and not form.dU, for_x and not form.dx
        if low_D or low_x:
            t = scaled_product(g, U[0], scaling)
        dx = None
        if low_x:
            dx = torch.mm(g, weight).addmm_(t, D[0]).view(x.shape)
        elif for_x:
            dx = torch.mm(g, merged_weight(weight, D, U, scaling) if V is None else V).view(x.shape)
        if not for_factors:
            return None, None, dx, None, None, *[None] * len(for_parts)
        if not (low_D and low_U):
            G = torch.mm(g.t(), rows)
        if low_U and z is None:
            z = F.linear(rows, D[0])
        dD = [torch.mm(t.t(), rows)] if low_D else [scaled_product(up.t(), G, scaling) for up in U]
        dU = [scaled_product(g.t(), z, scaling)] if low_U else [scaled_product(G, down.t(), scaling) for down in D]
        if not parts:
            return None, None, dx, None, None, *dD, *dU
        return None, None, dx, None, None, *split(dD[0], dU[0], parts[:half], parts[half:])
