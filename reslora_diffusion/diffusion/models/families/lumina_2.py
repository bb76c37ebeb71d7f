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

from .base import NUM_TRAIN_TIMESTEPS, Texts
from .frozen_text import FrozenTextFamily, equally_long

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn


class Lumina2(FrozenTextFamily):
    title = "Lumina 2"
    tag = "lumina2"
    pipeline_class = "Lumina2Pipeline"
    denoiser_class = "Lumina2Transformer2DModel"
    of_kohya = ("layers", "noise_refiner", "context_refiner", "norm_out")
    max_sequence_length = 256
    guidance_scale = 4.0
    flow: Mapping[str, Any] = {**FrozenTextFamily.flow, "from_data": True}

    def text_width(self, config: Mapping[str, Any]) -> int:
        return config["cap_feat_dim"]

    def states(self, pipeline: Any, prompt: str, length: int, negative: bool) -> Tensor:
        common = {"device": pipeline.text_encoder.device, "max_sequence_length": length}
        if negative:
            hidden, mask = pipeline.encode_prompt([""], negative_prompt=[prompt], **common)[2:]
        else:
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
        return -model(latents, timestep=1 - times / NUM_TRAIN_TIMESTEPS, **conditions, return_dict=False)[0]

    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Any]:
        return equally_long(texts, negative)
