"""The hooks that PEFT's LoRA layers call: their forward, and the merge of their weights."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from ..adapter import Adapter
from ..arrivals import settle
from ..dora import SHARDED, exact_dtype, row_norms
from ..functional import LoraFactors, delta_weight
from ..merging.factors import corrections_while_merging, plain_factors
from ..sharding import is_sharded, placed_like


class ResLoraVariant(LoraVariant):
    """Layer `name` of an adapter, in the place where PEFT looks for what is not plain LoRA."""

    def __init__(self, adapter: Adapter, name: str) -> None:
        self.adapter, self.name = adapter, name
        self.merged_delta: Tensor | None = None

    def supports_lora_conversion(self) -> bool:
        return False  # B A alone is not what was trained; `export` writes the plain LoRA that is

    def init(self, module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Do nothing, as the layer's factors are PEFT's own."""

    def forward(  # type: ignore[override]
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        return self.adapter.layer(self.name).forward(x, result)

    def delta(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Change of `orig_weight` by merging, in its precision, orientation and placement."""
        correction = corrections_while_merging(self.adapter)[self.name]
        factors = plain_factors(self.adapter, self.adapter.sites[self.name], correction)
        factors = factors._replace(scaling=module.scaling[active_adapter])
        transposed = getattr(module, "fan_in_fan_out", False)
        if factors.magnitude is not None:
            delta = decomposed_change(module, factors, orig_weight.T if transposed else orig_weight)
        else:
            delta = delta_weight(factors).to(torch.promote_types(factors.lora_A.dtype, orig_weight.dtype))
        delta = delta.T if transposed else delta
        return placed_like(delta.to(orig_weight.dtype), orig_weight)

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        self.merged_delta = self.delta(module, active_adapter, orig_weight)
        return orig_weight + self.merged_delta

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        """Merge in place, as FSDP goes on gathering the storage that it knows."""
        self.merged_delta = self.delta(module, active_adapter, orig_weight)
        orig_weight.data.add_(self.merged_delta)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """Inverse of `merge_unsafe`: takes away what was added, whatever the factors are by now."""
        assert self.merged_delta is not None
        delta, self.merged_delta = self.merged_delta, None
        return orig_weight.data.sub_(delta.to(orig_weight.device))


def decomposed_change(module: Any, factors: LoraFactors, weight: Tensor) -> Tensor:
    """Change of `weight` [out, in] by merging a DoRA. Its norms leave out other adapters that are merged already."""
    if is_sharded(weight):
        raise RuntimeError(SHARDED)
    (A, B, scaling), magnitude = factors, factors.magnitude
    assert magnitude is not None
    with module._unmerged_base_weight() as base:
        base = base.T if getattr(module, "fan_in_fan_out", False) else base
        factor = magnitude.values.flatten() / row_norms(base, [A], [B], [scaling])
    exact = weight.to(exact_dtype(weight))
    return factor[:, None] * (exact + (scaling * (B @ A)).to(exact)) - exact


class KeepInputDtype:
    """Replaces `LoraLayer._cast_input_dtype`: our layers cast the small factors to x, not x to the factors."""

    def __init__(self, layer: LoraLayer) -> None:
        self.layer = layer

    def __call__(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        active = [name for name in self.layer.active_adapters if name in self.layer.lora_A]
        if all(isinstance(self.layer.lora_variant.get(name), ResLoraVariant) for name in active):
            return x
        return type(self.layer)._cast_input_dtype(self.layer, x, dtype)


class LayerForward:
    """Replaces the `forward` of PEFT's `lora.Linear`: the whole layer as one operation.

    Where the frozen layer must compute its own output, or adapters add up, PEFT's own forward runs, and comes to
    `ResLoraVariant.forward`.
    """

    def __init__(self, layer: LoraLayer) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self.layer
        if not (torch.compiler.is_compiling() or args or kwargs):
            active = layer.active_adapters
            variant = layer.lora_variant.get(active[0]) if len(active) == 1 else None
            if isinstance(variant, ResLoraVariant):
                adapter = variant.adapter
                adapted = adapter.adapted.get(variant.name) or adapter.layer(variant.name)
                adapted.reason = adapted.own_output_reason()
                if adapted.reason is None:
                    if adapter.prepared and (output := adapted.take_prepared(x)) is not None:
                        return output
                    return adapted.forward(x)
        return type(layer).forward(layer, x, *args, **kwargs)


def find_adapter(model: nn.Module, adapter_name: str) -> Adapter | None:
    """The ResLoRA adapter of that name, if `model` has it."""
    for module in model.modules():
        variant = getattr(module, "lora_variant", {}).get(adapter_name)
        if isinstance(variant, ResLoraVariant):
            variant.adapter.refresh()
            settle(variant.adapter)
            return variant.adapter
    return None


def put_variant(layer: Any, adapter: Adapter, name: str) -> None:
    """Make a PEFT layer compute as layer `name` of `adapter`."""
    layer.lora_variant[adapter.adapter_name] = ResLoraVariant(adapter, name)
    layer._cast_input_dtype = KeepInputDtype(layer)
    if type(layer).__name__ == "Linear":
        layer.forward = LayerForward(layer)
