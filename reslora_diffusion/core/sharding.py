"""Weights of which a process holds only a part: FSDP2's `DTensor`, and what DeepSpeed ZeRO-3 leaves behind.

whole          shard -> full weight, a collective: every process must call it, for the same weights in one order
placed_like    its inverse: full value -> as another tensor is sharded; nothing for tensors that are not
"""

from typing import Any

import torch
from torch import Tensor, nn

PARTITIONED = (
    "DeepSpeed ZeRO-3 has partitioned the factors of the adapter, which are read outside their own layer; set "
    'stage3_param_persistence_threshold above rank x the widest layer, so that they stay whole ("auto" is too low), or '
    "use ZeRO-2 or FSDP2"
)


def whole(weight: Any) -> Tensor:
    """All of a weight; its gradient is then averaged over processes."""
    if is_sharded(weight):
        from torch.distributed.tensor import Partial

        return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
    if not weight.numel():
        raise RuntimeError(PARTITIONED)
    return weight


def is_distributed() -> bool:
    """Return whether this process is one of several that talk to each other."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(weight: Any) -> bool:
    return hasattr(weight, "full_tensor")


def are_whole(weights: list[Any]) -> bool:
    """Return whether every weight is an ordinary tensor with all of its elements, not a shard or a parametrisation."""
    return {type(weight) for weight in weights} <= {nn.Parameter, torch.Tensor} and all([w.numel() for w in weights])


def placed_like(value: Tensor, weight: Any) -> Tensor:
    """This process's share of `value`, which all processes hold in full."""
    if not is_sharded(weight):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
