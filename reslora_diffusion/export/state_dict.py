"""`merged_state_dict`: what `get_peft_model_state_dict` would return if the adapter were the plain LoRA it merges into.

    get_peft_model_state_dict(unet)   the factors as they are trained; no plain LoRA while a shortcut joins them
    merged_state_dict(unet)           lora_A [R, in], lora_B [out, R] of the plain LoRA, under the same names

One rank R for all layers, filled up with zeros, and the scaling inside lora_B, so that alpha = R: every loader reads
the tensors alike, with no configuration beside them.
"""

import warnings
from typing import Any

import torch.nn.functional as F
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from reslora_diffusion.core.functional import LoraFactors
from reslora_diffusion.core.merging.factors import MORE_THAN_FACTORS, factors_of, refuse_more_than_factors
from reslora_diffusion.core.merging.merge import merged_factors
from reslora_diffusion.core.peft.model import is_mark
from reslora_diffusion.core.peft.variant import find_adapter
from reslora_diffusion.rules import DEFAULT_ADAPTER, VARIANTS
from reslora_diffusion.utils.problems import listing


def merged_state_dict(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, Tensor]:
    """The state dict of the plain LoRA that an adapter merges into, for diffusers' `save_lora_weights` and the like.

    >>> StableDiffusionPipeline.save_lora_weights("out", unet_lora_layers=merged_state_dict(unet))

    It replaces `get_peft_model_state_dict(unet)`; `*_lora_adapter_metadata` must not be given beside it, as alpha is in
    the tensors. A plain LoRA (`LoraConfig`) is returned in the same form. Modules that are trained in full
    (`modules_to_save`) are there as PEFT has them.

    Returns:
        `<path>.lora_A.weight` [R, in] and `<path>.lora_B.weight` [out, R] of every adapted layer, with the path that
        the layer has in `model`. Copies, without gradients.

    Raises:
        ValueError: there is no such adapter, it has to be calibrated first, or no plain LoRA can hold it.
    """
    factors = adapter_factors(model, adapter_name)
    paths = dict(zip(factors, paths_in(model, list(factors)), strict=True))
    rank = max(len(f.lora_A) for f in factors.values())
    merged: dict[str, Tensor] = {}
    for name, found in factors.items():
        (lora_A, lora_B, scaling), magnitude = found, found.magnitude
        more = rank - len(lora_A)
        rows, columns = (0, 0) * (lora_A.ndim - 1) + (0, more), (0, 0) * (lora_B.ndim - 2) + (0, more)
        merged[f"{paths[name]}.lora_A.weight"] = F.pad(lora_A.detach(), rows).clone()
        merged[f"{paths[name]}.lora_B.weight"] = F.pad(scaling * lora_B.detach(), columns).clone()
        if magnitude is not None:
            shape = (-1,) if lora_B.ndim == 2 else (1, -1, *lora_B.shape[2:])
            merged[f"{paths[name]}.lora_magnitude_vector"] = magnitude.values.reshape(shape).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the factors among them are not used
        stored = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return merged | {key: value for key, value in stored.items() if ".lora_" not in key and not is_mark(key)}


def adapter_factors(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, LoraFactors]:
    """`merged_factors` of a ResLoRA adapter, the factors themselves of a plain LoRA; by the path of the layer.

    Raises:
        ValueError: as above.
    """
    if find_adapter(model, adapter_name) is not None:
        return merged_factors(model, adapter_name)
    return plain_lora_factors(model, adapter_name)


def plain_lora_factors(model: nn.Module, adapter_name: str) -> dict[str, LoraFactors]:
    """The factors of a plain LoRA adapter, made by PEFT's `LoraConfig`, by module path.

    Raises:
        ValueError: there is no such adapter, or it is more than factors of linear layers and convolutions.
    """
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in {*layer.lora_A, *layer.lora_embedding_A}
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA adapter {adapter_name!r}")
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    refuse_more_than_factors(config)
    more = [name for name in VARIANTS if getattr(config, name, None)]
    more += [
        name
        for name, layer in layers.items()
        if adapter_name in layer.lora_embedding_A or isinstance(layer, ParamWrapper) or layer.lora_bias[adapter_name]
    ]
    if more:
        raise ValueError(f"{MORE_THAN_FACTORS.format(adapter=adapter_name)}: {listing(more)}")
    return {name: factors_of(layer, adapter_name) for name, layer in layers.items()}


def paths_in(model: nn.Module, names: list[str]) -> list[str]:
    """The paths that adapted layers have in `model`, which may wrap the model that they are named after."""
    own = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    found = {name: next((path for path in own if path == name or path.endswith(f".{name}")), name) for name in names}
    return [found[name] for name in names]
