"""Kernels compute operations, and `choose` says which one does and why. A kernel is a function

    LinearOp -> (y, what is published)

that knows nothing of adapters. `plain` is the definition, and the others are equal to it to rounding.

    plain      torch's own functions                       under autocast, functorch, tracing; odd bases, torch.compile
    fused      one node of the autograd graph              everywhere else
    runlora    the form with the least arithmetic          float32 and float64 on a CPU, where nothing crosses layers
               runlora:F2B5, runlora:time: by name, by time    where it is asked for (`Adapter.kernel`)
    grouped    several operations that read one x          attention on a GPU (`core.grouping`)
    closed     nothing of low rank                         blocks whose gate is the number 0

`runlora` computes the operations that `runlora.fits` accepts, every other kernel computes all. docs/LOG.md, "Kernels
against the plain one", has what each gains: `grouped` is for a GPU alone, by counts of launches and bytes.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..functional import Kernel, LinearOp
from . import runlora
from .fused import fused_linear
from .grouped import can_be_grouped, grouped_linear, grouped_linears
from .plain import closed_linear, plain_linear
from .runlora import LOW_RANK, fits, named, quickest, runlora_linear, shape_of

__all__ = ["KERNELS", "Choice", "can_be_grouped", "choose", "grouped_linears", "plain_reason"]

KERNELS: dict[str, Kernel] = {
    "plain": plain_linear,
    "fused": fused_linear,
    "runlora": runlora_linear,
    "grouped": grouped_linear,
    "closed": closed_linear,
}
ORDINARY = (nn.Parameter, Tensor)


class Choice(NamedTuple):
    """A kernel, its name, and the reason why it was chosen."""

    name: str
    reason: str
    kernel: Kernel


def choose(op: LinearOp, reason: str | None = None, wanted: str | None = None) -> Choice:
    """The kernel for an operation, a function of its shapes and of torch's modes.

    Args:
        reason: why the frozen layer computes its own output, where it does.
        wanted: the kernel to choose wherever it can compute the operation, to compare kernels: a name in `KERNELS`,
            `runlora:` and a form (`runlora.named`), or `runlora:time`.

    Raises:
        ValueError: there is no such kernel or form.
    """
    if op.base is None:
        reason = plain_reason(op.x, op.weight, op.bias)
    else:
        reason = reason or "the frozen layer computes its own output"
    if is_closed(op):
        choice = CLOSED
    elif reason is not None:
        choice = Choice("plain", reason, plain_linear)
    elif op.read is not None and op.ahead is not None:
        choice = Choice("plain", "it reads another tensor than the next layer wants projected", plain_linear)
    elif wanted is not None and (asked := asked_for(wanted, op)):
        choice = asked
    elif op.x.is_cpu and fits(op):
        choice = by_cost(*shape_of(op))
    else:
        choice = FUSED
    return choice if op.transform is None else choice._replace(kernel=partial(with_transform, choice.kernel))


def asked_for(wanted: str, op: LinearOp) -> Choice | None:
    """The kernel of a name; None where RunLoRA's forms do not fit the operation."""
    kernel, _, form = wanted.partition(":")
    if kernel not in KERNELS or (form and kernel != "runlora"):
        raise ValueError(f"got the kernel {wanted!r}, wanted {', '.join(KERNELS)}, runlora:time or runlora:F2B5")
    if kernel == "runlora" and not fits(op):
        return None
    if not form:
        return Choice(kernel, "it was asked for", KERNELS[kernel])
    found = quickest(op) if form == "time" else named(form)
    return Choice(kernel, f"asked for {wanted}: {found}", partial(runlora_linear, form=found))


def is_closed(op: LinearOp) -> bool:
    """Return whether no part of an operation adds anything, as far as that is known without asking the device."""
    for scaling in op.scalings:
        if isinstance(scaling, Tensor) or scaling != 0:
            return False
    return True


def plain_reason(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str | None:
    """The reason why only `plain` can compute operations on x and a frozen layer; None if all can."""
    if under_autocast(x):
        return "autocast"
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return "functorch or forward-mode differentiation"
    if torch._C._is_tracing():
        return "torch.jit.trace"
    if weight is None or weight.requires_grad or (bias is not None and bias.requires_grad):
        return "a base layer that is trained"
    if weight.dtype != x.dtype or type(weight) not in ORDINARY:
        return "a base layer that is sharded or of another precision than its input"
    return None


def under_autocast(x: Tensor) -> bool:
    """Return whether autocast decides the precision of operations on x."""
    if x.is_cpu:  # to ask for the name of the device takes longer than the rest
        return torch.is_autocast_enabled("cpu")
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@lru_cache(maxsize=4096)
def by_cost(*shape: int) -> Choice:
    """The form with the least arithmetic for these arguments of `cheapest`."""
    form = runlora.cheapest(*shape)
    if form == LOW_RANK:
        return Choice("fused", "the least arithmetic goes through rank R", fused_linear)
    return Choice("runlora", f"the least arithmetic: {form}", partial(runlora_linear, form=form))


FUSED = Choice("fused", "one node for each layer", fused_linear)
CLOSED = Choice("closed", "its gate is 0", closed_linear)


def with_transform(kernel: Kernel, op: LinearOp) -> tuple[Tensor, Tensor | None]:
    """transform(W x + sum_j s_j U_j z_j) + b."""
    assert op.transform is not None
    base = op.base if op.base is None or op.bias is None else op.base - op.bias.to(op.base.dtype)
    y, value = kernel(op._replace(base=base, bias=None, transform=None))
    y = op.transform(y)
    return y if op.bias is None else y + op.bias.to(y.dtype), value
