"""Qwen-Image: a transformer over packed latents, trained by flow matching, with Qwen2.5-VL as its text encoder.

    hidden = last states of Qwen2.5-VL for the prompt in the pipeline's template, without the template's own beginning
    latents = (z - mean_c) / std_c of each channel c; its autoencoder is one of videos, and an image one frame

Classifier-free guidance is `true_cfg_scale` of the pipeline. Follows diffusers' `train_dreambooth_lora_qwen_image.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .flow import NUM_TRAIN_TIMESTEPS
from .frozen_text import FrozenTextFamily
from .latent_tokens import CELL, packed, unpacked
from .texts import Texts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn


class QwenImage(FrozenTextFamily):
    title = "Qwen-Image"
    tag = "qwen-image"
    pipeline_class = "QwenImagePipeline"
    denoiser_class = "QwenImageTransformer2DModel"
    vae_class = "AutoencoderKLQwenImage"
    guidance_scale = 4.0
    guidance_name = "true_cfg_scale"
    is_packed = True

    def vae_scale_factor(self, vae: Mapping[str, Any]) -> int:
        return 2 ** len(vae["temperal_downsample"])

    def vae_channels(self, vae: Mapping[str, Any]) -> int:
        return vae["z_dim"]

    def moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = super().moments(vae, pixels[:, :, None])
        return mean[:, :, 0], logvar[:, :, 0]

    def normalisation(self, vae: Any) -> tuple[Tensor, Tensor]:
        import torch

        mean, std = (torch.tensor(vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
        return 1 / std, mean

    def tokens_read(self, pipeline: Any, prompt: str, length: int) -> int:
        """The pipeline drops the beginning of the template, and cuts what is left."""
        pipeline.tokenizer_max_length = max(length, pipeline.tokenizer_max_length)
        read = super().tokens_read(pipeline, prompt, length) - pipeline.prompt_template_encode_start_idx
        return min(length, read)

    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": texts.hidden, "encoder_hidden_states_mask": texts.mask}

    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditions: dict[str, Any]) -> Tensor:
        height, width = (side // CELL for side in latents.shape[2:])
        tokens = model(
            hidden_states=packed(latents),
            timestep=times / NUM_TRAIN_TIMESTEPS,
            img_shapes=[[(1, height, width)]] * len(latents),
            **conditions,
            return_dict=False,
        )[0]
        return unpacked(tokens, latents)

    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Any]:
        return {
            "prompt_embeds": texts.hidden,
            "prompt_embeds_mask": texts.given_mask.long(),
            "negative_prompt_embeds": negative.hidden,
            "negative_prompt_embeds_mask": negative.given_mask.long(),
        }
