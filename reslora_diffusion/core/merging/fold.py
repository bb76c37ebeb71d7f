"""Folding a shortcut into plain LoRA in the middle of training, and training on; `methods.schedules.Fold` says when.

After `handover` the adapter is plain LoRA (shortcut none) that computes what `merged_forward` computed, so what is
exported at the end is exactly what was trained. `input` and `middle` change A in place, A <- A + C: parameters,
optimizer and moments stay. `block` becomes its concatenation, of rank (m + 1) r: its parameters are new, and with
`optimizer` given their moments are the old ones, concatenated likewise. Some optimizers keep points among the weights
too (`points_of`), which go where the weights go.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...rules import DEFAULT_ADAPTER, Shortcut
from ..adapter import Adapter
from ..attach import get_adapter
from ..functional import LoraFactors
from ..sharding import is_sharded, placed_like
from .factors import joined_factors


@torch.no_grad()
def handover(
    model: nn.Module, adapter_name: str = DEFAULT_ADAPTER, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Fold the shortcut into plain LoRA, in place.

    Args:
        optimizer: of the adapter. It gets the new parameters of `block` instead of the old ones; make a new one if not
            given.

    Raises:
        ValueError: the merge method needs `calibrate` first.
        RuntimeError: `block`, and FSDP has sharded its factors: a wider layer cannot take their place; or there are
            frozen factors in the windows.
    """
    adapter = get_adapter(model, adapter_name)
    if adapter.path.merges_exactly and adapter.shortcut is not Shortcut.NONE:
        if adapter.frozen:
            name = str(adapter.shortcut)
            raise RuntimeError(f"{name!r} cannot be folded once there are frozen factors; it merges exactly as it is")
        concatenate_blocks(adapter, optimizer)
    else:
        factors = joined_factors(adapter)
        for name, layer in adapter.layers.items():
            weight: Any = layer.lora_A[adapter_name].weight
            folded = placed_like(factors[name].lora_A.to(weight.dtype), weight)
            for point in points_of(optimizer, weight):
                point.add_((folded - weight).to(point))
            weight.copy_(folded)
    adapter.own_config().shortcut = Shortcut.NONE
    adapter.calibration, adapter.calibrated_A = {}, {}
    adapter.link()


def points_of(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> Iterator[Tensor]:
    """The tensors of an optimizer's state that are points among the weights, as a parameter is, rather than moments: z
    and x of schedule-free optimizers, and where Prodigy has begun."""
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    yield from (state[name] for name in ("z", "x", "p0") if name in state and state[name].shape == parameter.shape)


def concatenate_blocks(adapter: Adapter, optimizer: torch.optim.Optimizer | None) -> None:
    """Give each layer the factors of its whole window as its own."""
    own_name = adapter.adapter_name
    old: dict[str, tuple[Any, Any]] = {
        name: (layer.lora_A[own_name], layer.lora_B[own_name]) for name, layer in adapter.layers.items()
    }
    if any(is_sharded(module.weight) for modules in old.values() for module in modules):
        raise RuntimeError(
            "handover of 'block' makes wider factors, and FSDP has sharded those that are; hand over before sharding, "
            "use DistributedDataParallel, or export without handover: block merges exactly"
        )
    config, fresh = adapter.own_config(), {}
    for name, layer in adapter.layers.items():
        window = [name, *adapter.windows[name]]
        scaling = layer.scaling[own_name]
        own, *earlier = (LoraFactors(old[n][0].weight, old[n][1].weight, scaling) for n in window)
        A, B, _ = adapter.path.plain(own, earlier, None)
        grown = (
            nn.Linear(A.shape[1], A.shape[0], bias=False, device="meta"),
            nn.Linear(B.shape[1], B.shape[0], bias=False, device="meta"),
        )
        for module, weight, before in zip(grown, (A, B), old[name], strict=True):
            module.weight = nn.Parameter(weight.clone(), requires_grad=before.weight.requires_grad)
            module.train(before.training)
        if optimizer is not None:
            for side, module in enumerate(grown):
                move_state(optimizer, [old[n][side].weight for n in window], module.weight, side)
        fresh[name] = grown
        layer.r[own_name] = len(A)
        adapter.sites[name] = replace(adapter.sites[name], rank=len(A))
        layer.lora_alpha[own_name] = scaling * (len(A) ** 0.5 if config.use_rslora else len(A))
        config.rank_pattern = {**(config.rank_pattern or {}), f"^{name}": len(A)}
        config.alpha_pattern = {**(config.alpha_pattern or {}), f"^{name}": layer.lora_alpha[own_name]}
    for name, (lora_A, lora_B) in fresh.items():
        layer = adapter.layers[name]
        layer.lora_A[own_name], layer.lora_B[own_name] = lora_A, lora_B
        if optimizer is not None:  # only now: a block's moments go into those of every block that reaches it
            for module in old[name]:
                optimizer.state.pop(module.weight, None)


def move_state(optimizer: torch.optim.Optimizer, old: list[Any], new: Any, dim: int) -> None:
    """Put `new`, the concatenation of `old` along `dim`, in the place of the first of them, with their moments."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old[0] else parameter for parameter in group["params"]]
    states = [optimizer.state.get(parameter, {}) for parameter in old]
    if not all(states):
        return
    optimizer.state[new] = {
        key: torch.cat([state[key].to(value.device) for state in states], dim)
        if torch.is_tensor(value) and value.ndim == 2
        else value
        for key, value in states[0].items()
    }
