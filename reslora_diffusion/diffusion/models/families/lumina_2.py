"""Lumina 2: one transformer over image and text, trained by flow matching, with Gemma 2 as its text encoder.

    hidden = second to last states of Gemma 2 for the prompt after the pipeline's system prompt;
             a negative prompt has none
    model(x, 1 - t, hidden) = -(eps - x_0)

The model's time runs from noise to data, and its output points to the data. Follows diffusers'
`train_dreambooth_lora_lumina2.py`, whose schedule has the share of the data where others have that of the noise
(`FlowMatching.from_data`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .base import MOST_TOKENS
from .flow import NUM_TRAIN_TIMESTEPS
from .gemma import GemmaFamily

if TYPE_CHECKING:
    from torch import Tensor, nn


class Lumina2(GemmaFamily):
    title = "Lumina 2"
    tag = "lumina2"
    pipeline_class = "Lumina2Pipeline"
    denoiser_class = "Lumina2Transformer2DModel"
    of_kohya = ("layers", "noise_refiner", "context_refiner", "norm_out")
    max_sequence_length = 256
    guidance_scale = 4.0
    flow: Mapping[str, Any] = {**GemmaFamily.flow, "from_data": True}

    def text_width(self, config: Mapping[str, Any]) -> int:
        return config["cap_feat_dim"]

    def most_tokens(self, config: Mapping[str, Any]) -> int:
        """Images have the place after the last token in a table of rotary embeddings."""
        return min(MOST_TOKENS, config["axes_lens"][0] - 1)

    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditions: dict[str, Any]) -> Tensor:
        return -model(latents, timestep=1 - times / NUM_TRAIN_TIMESTEPS, **conditions, return_dict=False)[0]
