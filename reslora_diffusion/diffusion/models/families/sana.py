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
from .base import Texts
from .frozen_text import FrozenTextFamily, equally_long, mode

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn


class Sana(FrozenTextFamily):
    title = "SANA"
    tag = "sana"
    pipeline_class = "SanaPipeline"
    denoiser_class = "SanaTransformer2DModel"
    vae_class = "AutoencoderDC"
    target_modules = ("to_k", "to_q", "to_v")
    max_sequence_length = 300
    guidance_scale = 4.5
    as_asked = {"use_resolution_binning": False}

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

    def states(self, pipeline: Any, prompt: str, length: int, negative: bool) -> Tensor:
        instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        common = {"device": pipeline.text_encoder.device, "max_sequence_length": length}
        if negative:
            hidden, mask = pipeline.encode_prompt([""], negative_prompt=prompt, **common)[2:]
        else:
            common["complex_human_instruction"] = instruction
            hidden, mask = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False, **common)[:2]
        return hidden[0, mask[0].bool()]

    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": texts.hidden, "encoder_attention_mask": texts.given_mask}

    def denoise(
        self,
        model: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditions: dict[str, Any],
        guidance_scale: float | None = None,
    ) -> Tensor:
        config: Any = model.config
        found = model(latents, timestep=times * config.timestep_scale, **conditions, return_dict=False)[0]
        return found[:, : latents.shape[1]]  # a learned variance comes after

    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Any]:
        return {"negative_prompt": None, **equally_long(texts, negative)}
