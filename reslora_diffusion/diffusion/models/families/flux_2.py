"""FLUX.2: a transformer over patches of latents, trained by flow matching, with a language model as its text encoder.

    hidden = states of three layers side by side, of all of the prompt's places with padding        [P, L, 3 D]
    latents = (patches of 2 x 2 - mean_c) / sqrt(var_c + eps), by the statistics of its autoencoder's batch norm
    a token has a place (time, row, column, number in the text)

The denoiser sees padding too, so every prompt is `max_sequence_length` long. FLUX.2-dev reads Mistral and takes the
guidance as an input; klein reads Qwen3. Follows diffusers' `train_dreambooth_lora_flux2.py` and `..._klein.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...data.buckets import Grid
from .flow import NUM_TRAIN_TIMESTEPS
from .frozen_text import FrozenTextFamily, mode
from .latent_tokens import CELL, places
from .texts import Texts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn


class Flux2Klein(FrozenTextFamily):
    title = "FLUX.2 klein"
    tag = "flux2-klein"
    pipeline_class = "Flux2KleinPipeline"
    denoiser_class = "Flux2Transformer2DModel"
    vae_class = "AutoencoderKLFlux2"
    target_modules = ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj")
    guidance_scale = 4.0
    flow: Mapping[str, Any] = {**FrozenTextFamily.flow, "cell": 1}

    def default_targets(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """`to_out` of a single-stream block is a layer, of a double-stream block a list of them."""
        singles = (f"single_transformer_blocks.{n}.attn.to_out" for n in range(config["num_single_layers"]))
        return *self.target_modules, *singles

    def vae_scale_factor(self, vae: Mapping[str, Any]) -> int:
        return CELL * super().vae_scale_factor(vae)

    def vae_channels(self, vae: Mapping[str, Any]) -> int:
        return CELL**2 * super().vae_channels(vae)

    def grid(self, config: Mapping[str, Any], vae_scale_factor: int) -> Grid:
        return Grid(vae_scale_factor, vae_scale_factor)

    def moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        import torch.nn.functional as F

        mean, _ = super().moments(vae, pixels)
        return mode(F.pixel_unshuffle(mean, CELL))

    def normalisation(self, vae: Any) -> tuple[Tensor, Tensor]:
        mean, variance = (part.float().cpu()[:, None, None] for part in (vae.bn.running_mean, vae.bn.running_var))
        return (variance + vae.config.batch_norm_eps).rsqrt(), mean

    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        import torch
        import torch.nn.functional as F

        number = torch.arange(texts.hidden.shape[1], device=texts.hidden.device)[:, None]
        return {
            "encoder_hidden_states": texts.hidden,
            "txt_ids": F.pad(number, (3, 0)).expand(len(texts.hidden), -1, -1),
        }

    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditions: dict[str, Any]) -> Tensor:
        import torch.nn.functional as F

        tokens = model(
            hidden_states=latents.flatten(2).mT,
            timestep=times / NUM_TRAIN_TIMESTEPS,
            img_ids=F.pad(places(latents, cell=1), (0, 1)).expand(len(latents), -1, -1),
            **conditions,
            return_dict=False,
        )[0]
        return tokens.mT.unflatten(2, latents.shape[2:])

    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Any]:
        return {"prompt_embeds": texts.hidden, "negative_prompt_embeds": negative.hidden}


class Flux2(Flux2Klein):
    title = "FLUX.2"
    tag = "flux2"
    pipeline_class = "Flux2Pipeline"
    guidance_scale = 3.5
    is_guided = True

    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Any]:
        return {"prompt_embeds": texts.hidden}
