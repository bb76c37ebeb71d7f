"""AuraFlow: joint blocks of image and text, then blocks that see both as one, trained by flow matching, with T5 alone.

    hidden = T5, of all of the prompt's places; zeros in place of padding                     [P, L, D]

The denoiser sees the zeros too, so every prompt is `max_sequence_length` long. A learned embedding tells the place of
each patch, up to as many as the base was made for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...data.buckets import Grid
from .flow import NUM_TRAIN_TIMESTEPS
from .frozen_text import T5_ALONE, FrozenTextFamily
from .texts import Texts

if TYPE_CHECKING:
    from torch import Tensor, nn


class AuraFlow(FrozenTextFamily):
    title = "AuraFlow"
    tag = "aura-flow"
    pipeline_class = "AuraFlowPipeline"
    denoiser_class = "AuraFlowTransformer2DModel"
    not_here = T5_ALONE
    has_template = False
    max_sequence_length = 256
    guidance_scale = 3.5
    encoding: ClassVar[Mapping[str, Any]] = {"do_classifier_free_guidance": False}

    def grid(self, config: Mapping[str, Any], vae_scale_factor: int) -> Grid:
        patch = vae_scale_factor * config["patch_size"]
        return Grid(patch, patch, patch * math.isqrt(config["pos_embed_max_size"]))

    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": texts.hidden}

    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditions: dict[str, Any]) -> Tensor:
        return model(latents, timestep=times / NUM_TRAIN_TIMESTEPS, **conditions, return_dict=False)[0]
