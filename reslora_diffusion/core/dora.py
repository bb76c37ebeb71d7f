"""DoRA (arXiv 2402.09353): the low-rank update turns the rows of a weight, and a trained vector says how long they are.

    V = W + sum_j s_j U_j D_j            W [out, in] frozen; D_j, U_j, s_j as in `core.functional`
    c = norm of each row of V, [out]     a constant to the gradient (section 4.3 of the paper)
    W' = (m / c) V                       m [out]: `lora_magnitude_vector`, which starts as the c of the fresh adapter
    y = (m / c) (W x + sum_j s_j U_j D_j x) + b

With dropout d, W' is applied to d(x) and W to the rest, as in PEFT: y = W (x - d(x)) + (m / c) V d(x) + b.

Neither V nor any other matrix of its size is made: with U = [s_1 U_1, ..] and D = [D_1; ..] of R rows,

    c_i^2 = |W_i|^2 + 2 (W D^T)_i . U_i + (U D D^T)_i . U_i              [out] + [out, R] + [out, R]

m and c are float32 or float64, whatever W is: m / c is close to 1, which bfloat16 knows to 2 or 3 digits.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import LinearOp, LoraFactors, Magnitude, side_by_side
from .kernels import under_autocast
from .sharding import is_sharded

CHUNK = 2**20  # elements of W that are cast to float32 at a time
SHARDED = (
    "DoRA needs norms of whole rows of the base weights, and each process holds a part of them; use DDP or one process"
)


# ------------------------------------------------------------------------------------------------------ arithmetic


def exact_dtype(weight: Tensor) -> torch.dtype:
    """The precision of norms of a weight."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@torch.no_grad()
def row_norms(weight: Tensor, D: Sequence[Tensor], U: Sequence[Tensor], scalings: Sequence[float | Tensor]) -> Tensor:
    """c [out], the norms of the rows of W + sum_j s_j U_j D_j; that of a row of zeros is just above 0.

    Shapes: W [out, in], D_j [r_j, in], U_j [out, r_j].
    """
    if under_autocast(weight):
        with torch.autocast(weight.device.type, enabled=False):
            return row_norms(weight, D, U, scalings)
    dtype, s = exact_dtype(weight), scalings[0]
    if isinstance(s, Tensor) or any(other != s for other in scalings):
        U, s = [each * up.to(dtype) for each, up in zip(scalings, U, strict=True)], 1.0
    down, up = side_by_side([d.to(dtype) for d in D], [u.to(dtype) for u in U])
    if weight.dtype == dtype:
        own, cross = torch.linalg.vector_norm(weight, dim=1), weight @ down.T
    else:
        parts = (part.to(dtype) for part in weight.split(max(1, CHUNK // weight.shape[1])))
        found = [(torch.linalg.vector_norm(part, dim=1), part @ down.T) for part in parts]
        own, cross = (torch.cat(column) for column in zip(*found, strict=True))
    low = torch.addmm(cross, up, down @ down.T, beta=2, alpha=s).mul_(up).sum(1)
    return own.square_().add_(low, alpha=s).clamp_min_(torch.finfo(dtype).tiny).sqrt_()


def lengthened(factor: Tensor, h: Tensor) -> Tensor:
    """(m / c) h [..., out] in the precision of h, computed in that of the factor."""
    return (factor * h).to(h.dtype)


def decomposed_weight(weight: Tensor, factors: LoraFactors) -> Tensor:
    """W' [out, in, ...] of a base weight and the factors of a DoRA, in float32 or float64.

    A magnitude [out, 1] is the length of rows, one of [1, in] that of columns, as LyCORIS has it with
    `wd_on_out=False`; `Magnitude.of_base` divides by norms of W instead of V.
    """
    dtype = exact_dtype(weight)
    flat = weight.to(dtype)
    delta = factors.scaling * (factors.lora_B.to(dtype).flatten(1) @ factors.lora_A.to(dtype).flatten(1))
    V = flat + delta.reshape(flat.shape)
    if factors.magnitude is None:
        return V
    values, of_base = factors.magnitude
    over = flat if of_base else V
    kept = 0 if values.shape[1] == 1 and len(values) == len(V) else 1
    norms = torch.linalg.vector_norm(over, dim=[d for d in range(V.ndim) if d != kept], keepdim=True)
    return values.to(flat).reshape(norms.shape) / norms.clamp_min(torch.finfo(dtype).tiny) * V


# ------------------------------------------------------------------------------------------------ of a PEFT layer


def base_weight(layer: Any) -> Tensor:
    """W [out, in, ...] of a LoRA layer, dequantised where it is packed.

    Raises:
        RuntimeError: a process holds only a part of it.
    """
    base = layer.get_base_layer()
    weight: Any = getattr(base, "weight", None)
    if weight is not None and (is_sharded(weight) or not weight.numel()):
        raise RuntimeError(SHARDED)
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        from peft.utils.integrations import dequantize_module_weight  # seconds, which readers of files do not need

        weight = dequantize_module_weight(base)
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight


def magnitude_of(layer: Any, adapter_name: str) -> Magnitude | None:
    """The magnitude of one of PEFT's layers as [out, 1]; None where the adapter is no DoRA."""
    if adapter_name not in layer.lora_magnitude_vector:
        return None
    weight: Any = layer.lora_magnitude_vector[adapter_name].weight
    return Magnitude(weight.detach().reshape(-1, 1))


@torch.no_grad()
def start_at_the_base(layer: Any, adapter_name: str) -> None:
    """Give a fresh layer the magnitude at which it computes what its base computes.

    PEFT takes it in the precision of the base, which puts a bfloat16 model up to 0.4 % off its base.
    """
    side = layer.lora_magnitude_vector[adapter_name]
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    weight = base_weight(layer).flatten(1)
    if weight.is_meta or A.is_meta or weight.shape[1] != A[0].numel():
        return  # values come from a file; or a convolution in groups
    norms = row_norms(weight, [A.flatten(1)], [B.flatten(1)], [layer.scaling[adapter_name]])
    side.weight = nn.Parameter(norms.reshape(side.weight.shape), requires_grad=side.weight.requires_grad)


# --------------------------------------------------------------------------------------------- of an adapted layer


def transform_of(layer: Any, op: LinearOp) -> Callable[[Tensor], Tensor] | None:
    """The transform of h = W x + sum_j s_j U_j D_j d(x), the output of an `AdaptedLayer` without its bias:

        (m / c) h + (1 - m / c) W (x - d(x))

    A gate of the layer's own block acts on m / c - 1 too: a block that is closed leaves rows as long as they are.
    """
    gate = layer.own_gate
    if isinstance(gate, float) and gate == 0:
        return None
    norms = row_norms(base_weight(layer.module), op.D, op.U, op.scalings)
    factor = layer.module.lora_magnitude_vector[layer.shared.adapter_name].weight / norms
    if isinstance(gate, Tensor) or gate != 1:
        factor = 1 + gate * (factor - 1)
    if op.read is None:
        return partial(lengthened, factor)
    if op.base is None:
        dropped = F.linear(op.x - op.read, op.weight)  # type: ignore[arg-type]
    else:
        dropped = op.base - layer.base(op.read)
    return lambda h: lengthened(factor, h) + lengthened(1 - factor, dropped)
