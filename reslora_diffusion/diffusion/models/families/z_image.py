"""Z-Image: one transformer over image and text, trained by flow matching, with Qwen3 as its text encoder.

    hidden = second to last states of Qwen3 for the prompt as a chat, each prompt as long as it is
    model(latents [C, 1, h, w] of each image, 1 - t, hidden of each image) = -(eps - x_0)

The model's time runs from noise to data, and its output points to the data. Follows diffusers'
`train_dreambooth_lora_z_image.py`, which takes the mode of the autoencoder's distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from .flow import NUM_TRAIN_TIMESTEPS
from .frozen_text import FrozenTextFamily, each_by_itself, mode
from .texts import Texts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn


class ZImage(FrozenTextFamily):
    title = "Z-Image"
    tag = "z-image"
    pipeline_class = "ZImagePipeline"
    denoiser_class = "ZImageTransformer2DModel"
    guidance_scale = 5.0
    encoding: ClassVar[Mapping[str, Any]] = {"do_classifier_free_guidance": False}

    def text_width(self, config: Mapping[str, Any]) -> int:
        return config["cap_feat_dim"]

    def moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return mode(super().moments(vae, pixels)[0])

    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        return {"cap_feats": each_by_itself(texts)}

    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditions: dict[str, Any]) -> Tensor:
        import torch

        images = list(latents[:, :, None].unbind())
        share_of_data = (NUM_TRAIN_TIMESTEPS - times) / NUM_TRAIN_TIMESTEPS
        return -torch.stack(model(images, share_of_data, **conditions, return_dict=False)[0])[:, :, 0]

    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Any]:
        return {"prompt_embeds": each_by_itself(texts), "negative_prompt_embeds": each_by_itself(negative)}
