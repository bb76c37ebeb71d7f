"""The one operation that every adapted layer computes, and the arithmetic it is made of.

    y = W x + b + sum_j s_j U_j z_j        z = D r + c

    x [..., in]     input of the layer            W [out, in], b [out]     the frozen layer
    D_j [r_j, in]   down-projections              U_j [out, r_j]           up-projections, lora_A and lora_B of PEFT
    r [..., in]     what D reads: x, or x and what a shortcut or dropout makes of it
    c [..., R]      what a shortcut carries in at rank R = sum_j r_j
    s_j             alpha / r, times the gate of block j: a float, or a scalar on the device

A shortcut (`core.shortcuts`) builds the `LinearOp` of a layer, a kernel (`core.kernels`) computes it. Nothing here
knows of adapters, chains or models.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Publish(Enum):
    """The second result of an operation, besides y, which a later layer of the chain reads."""

    NOTHING = auto()
    AHEAD = auto()  # `ahead` x: the down-projection of the next layer, of this layer's input
    OWN = auto()  # D r, without what was carried in
    SUM = auto()  # z = D r + c


class LinearOp(NamedTuple):
    """The operation of one adapted layer; see the module for the fields.

    Where the frozen layer must compute its own output (quantised, hooked, trained), `base` is that output, and `weight`
    and `bias` are None. `transform` is applied to W x + sum_j s_j U_j z_j, before the bias is added (DoRA).
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    D: Sequence[Tensor]
    U: Sequence[Tensor]
    scalings: Sequence[float | Tensor]
    read: Tensor | None = None  # r, where it is not x
    carry: Tensor | None = None
    publish: Publish = Publish.NOTHING
    ahead: Tensor | None = None  # [r of the next layer, in], for Publish.AHEAD
    base: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None


Kernel = Callable[[LinearOp], tuple[Tensor, Tensor | None]]  # y, and what is published


class Magnitude(NamedTuple):
    """The vector that DoRA trains: the length of each row of the weight, [out, 1], or of each column, [1, in].

    The weight is W + delta_weight; with `of_base` it is W, as ComfyUI reads rows of a file (`export.dora`).
    """

    values: Tensor
    of_base: bool = False


WITHOUT_FLOAT64 = frozenset({"mps"})  # types of devices


def to_float64(x: Tensor) -> Tensor:
    """x in float64, on its own device, or on the CPU where that device has no float64 (Apple's GPU)."""
    return (x.cpu() if x.device.type in WITHOUT_FLOAT64 else x).double()


class ThreeFactors(NamedTuple):
    """The fields of `LoraFactors`, which unpacks into them."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


class LoraFactors(ThreeFactors):
    """A plain LoRA of one layer: delta_weight = scaling * lora_B @ lora_A.

    Shapes: lora_A [r, in], lora_B [out, r]. For a convolution lora_A [r, in, kh, kw], lora_B [out, r, 1, 1].
    The factors of a DoRA have a `magnitude` too; `core.dora.decomposed_weight` is the weight that they make.
    """

    magnitude: Magnitude | None = None

    def _replace(self, **changes: Any) -> "LoraFactors":  # type: ignore[override]
        return with_magnitude(super()._replace(**changes), self.magnitude)


def with_magnitude(factors: ThreeFactors, magnitude: Magnitude | None) -> LoraFactors:
    """Factors with this magnitude, or without any."""
    made = LoraFactors(*factors)
    made.magnitude = magnitude
    return made


def delta_weight(factors: LoraFactors) -> Tensor:
    """The dense update [out, in] of a linear layer.

    Raises:
        ValueError: it is a DoRA's, which depends on the base weight.
    """
    if factors.magnitude is not None:
        raise ValueError("the change of a DoRA depends on the base weight; wanted decomposed_weight")
    return factors.scaling * (factors.lora_B @ factors.lora_A)


def concatenated(blocks: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`(A, B)` of sum_k B_k A_k, exactly: [R, in] and [out, R] with R the sum of the ranks."""
    return side_by_side(*zip(*blocks, strict=True))


def side_by_side(D: Sequence[Tensor], U: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`(A, B)` of down-projections [r_j, in] and up-projections [out, r_j], likewise."""
    return D[0] if len(D) == 1 else torch.cat(tuple(D)), U[0] if len(U) == 1 else torch.cat(tuple(U), dim=1)


def scaled_parts(op: LinearOp) -> tuple[Sequence[Tensor], float]:
    """`(U, s)` with one s for all parts: scalings that differ, or are on the device, are multiplied into U."""
    scaling = op.scalings[0]
    for other in op.scalings:
        if other is not scaling or isinstance(scaling, Tensor):
            return [s * up for s, up in zip(op.scalings, op.U, strict=True)], 1.0
    return op.U, scaling  # type: ignore[return-value]


def up_add(result: Tensor, z: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """result + scaling * B z, in one operation: [..., out], [..., r] -> [..., out]."""
    if result.dtype != z.dtype:
        return result + (scaling * F.linear(z, lora_B)).to(result.dtype)
    flat = torch.addmm(result.reshape(-1, result.shape[-1]), z.reshape(-1, z.shape[-1]), lora_B.T, alpha=scaling)
    return flat.view(result.shape)


def scaled_product(a: Tensor, b: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """scaling * a b, without a pass of its own for the scaling."""
    if scaling == 1:
        return torch.mm(a, b, out=out)
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling, out=out)


def version_of(value: Tensor) -> int | None:
    """The number of times that a tensor was changed in place; None where torch does not count."""
    return None if torch.compiler.is_compiling() or value.is_inference() else value._version
