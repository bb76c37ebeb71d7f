"""A frozen denoiser in 4 or 8 bits, by diffusers' own quantisation of a pipeline (`PipelineQuantizationConfig`).

Only linear layers are quantised (`options.quantisation` names the kinds). A UNet's convolutions keep
`--mixed_precision`, and so do text encoders and the autoencoder, which are freed once everything is encoded. Adapters
are float32. The export is a plain LoRA for the base in whatever precision; it was trained beside the rounded one.
"""

from typing import Any

import torch
from torch import nn

from ..options.quantisation import KINDS


def quantisation_of(name: str, dtype: torch.dtype) -> Any:
    """The configuration of a diffusers model, which computes in `dtype`."""
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if name == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao import quantization

    kinds = {"int8wo": "Int8WeightOnlyConfig", "float8wo": "Float8WeightOnlyConfig", "int4wo": "Int4WeightOnlyConfig"}
    return TorchAoConfig(getattr(quantization, kinds[name])())


def pipeline_quantisation(name: str, denoiser: str, dtype: torch.dtype) -> Any:
    """Make the argument of `DiffusionPipeline.from_pretrained`, for the denoiser alone."""
    from diffusers import PipelineQuantizationConfig

    return PipelineQuantizationConfig(quant_mapping={denoiser: quantisation_of(name, dtype)})


def stored_bytes(model: nn.Module, dtype: torch.dtype, name: str | None) -> int:
    """Bytes of a frozen model's weights, of which linear layers are quantised if there is a `name`."""
    total = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if name is None:
        return total
    kind = KINDS[name]
    for layer in model.modules():
        if type(layer) is nn.Linear:
            size = layer.weight.numel()
            total += round(size * kind.bits / 8) + kind.per_row * layer.out_features - size * dtype.itemsize
    return total
