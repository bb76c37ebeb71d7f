"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, whose last hidden states the UNet attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .long_prompts import joined
from .texts import Texts, Tokens
from .unet import UNetFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn


class StableDiffusion(UNetFamily):
    title = "Stable Diffusion 1.x or 2.x"
    tag = "stable-diffusion"
    pipeline_class = "StableDiffusionPipeline"
    denoiser_class = "UNet2DConditionModel"
    text_encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    embedding_keys = {"text_encoder": "clip_l"}

    def encode(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> Texts:
        encoder, ids = text_encoders[0], tokens.ids[:, 0]
        pieces = self.pieces(encoder, ids)
        states = encoder(ids.reshape(len(ids) * pieces, -1), return_dict=False)[0]
        return Texts(tokens.weighed(joined(states, pieces), 0, pieces))

    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": texts.hidden}

    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Tensor | None]:
        return {"prompt_embeds": texts.hidden, "negative_prompt_embeds": negative.hidden}
