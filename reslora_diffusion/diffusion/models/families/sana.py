"""SANA: a linear-attention transformer that reads Gemma 2 by cross-attention, trained by flow matching.

    hidden = last states of Gemma 2 for the prompt, after an instruction of how to read prompts that the pipeline begins
             with; a negative prompt has none
    latents = factor * z of a deep-compression autoencoder, which gives no distribution

Follows diffusers' `train_dreambooth_lora_sana.py`. Images are generated at the size that is asked for, without the
pipeline's bins.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...data.buckets import Grid
from .frozen_text import mode
from .gemma import GemmaFamily

if TYPE_CHECKING:
    from torch import Tensor, nn


class Sana(GemmaFamily):
    title = "SANA"
    tag = "sana"
    pipeline_class = "SanaPipeline"
    denoiser_class = "SanaTransformer2DModel"
    vae_class = "AutoencoderDC"
    target_modules = ("to_k", "to_q", "to_v")
    max_sequence_length = 300
    guidance_scale = 4.5
    as_asked = {"use_resolution_binning": False}
    flow: Mapping[str, Any] = {**GemmaFamily.flow, "cell": 1}

    def grid(self, config: Mapping[str, Any], vae_scale_factor: int) -> Grid:
        return Grid(vae_scale_factor, vae_scale_factor)

    def vae_scale_factor(self, vae: Mapping[str, Any]) -> int:
        return 2 ** (len(vae["encoder_block_out_channels"]) - 1)

    def text_width(self, config: Mapping[str, Any]) -> int:
        return config["caption_channels"]

    def moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return mode(vae.encode(pixels).latent)

    def normalisation(self, vae: Any) -> tuple[float, float]:
        return vae.config.scaling_factor, 0.0

    def words_before(self, pipeline: Any) -> dict[str, Any]:
        name = "complex_human_instruction"
        return {name: inspect.signature(type(pipeline).__call__).parameters[name].default}

    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditions: dict[str, Any]) -> Tensor:
        config: Any = model.config
        found = model(latents, timestep=times * config.timestep_scale, **conditions, return_dict=False)[0]
        return found[:, : latents.shape[1]]  # a learned variance comes after
