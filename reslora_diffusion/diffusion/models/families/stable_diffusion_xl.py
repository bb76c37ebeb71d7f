"""Stable Diffusion XL: two CLIP text encoders, side by side.

    hidden = [second to last hidden states of encoder 1, of encoder 2]       [P, L, D1 + D2]
    pooled = projected end-of-text state of encoder 2                        [P, D2]    of a long prompt's first piece

The UNet also takes the image's original size, the corner of the crop, and the size that it is trained at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .long_prompts import joined
from .not_here import OF_ONE_CLIP
from .texts import Texts, Tokens
from .unet import UNetFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn


class StableDiffusionXL(UNetFamily):
    title = "Stable Diffusion XL"
    tag = "stable-diffusion-xl"
    pipeline_class = "StableDiffusionXLPipeline"
    denoiser_class = "UNet2DConditionModel"
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    embedding_keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    not_here = UNetFamily.not_here | OF_ONE_CLIP

    def encode(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> Texts:
        import torch

        pieces = self.pieces(text_encoders[0], tokens.ids)
        outputs = [
            encoder(tokens.ids[:, place].unflatten(-1, (pieces, -1)).flatten(0, 1), output_hidden_states=True)
            for place, encoder in enumerate(text_encoders)
        ]
        states = [joined(output.hidden_states[-2], pieces) for output in outputs]
        hidden = torch.cat([tokens.weighed(one, place, pieces) for place, one in enumerate(states)], dim=-1)
        return Texts(hidden, outputs[-1].text_embeds[::pieces])

    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        extra = {"text_embeds": texts.pooled, "time_ids": time_ids}
        return {"encoder_hidden_states": texts.hidden, "added_cond_kwargs": extra}

    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Tensor | None]:
        if empty and pipeline.config.get("force_zeros_for_empty_prompt"):  # as the pipeline itself, without a prompt
            assert negative.pooled is not None, "the second text encoder pools"
            negative = Texts(*(part.new_zeros(part.shape) for part in (negative.hidden, negative.pooled)))
        return {
            "prompt_embeds": texts.hidden,
            "pooled_prompt_embeds": texts.pooled,
            "negative_prompt_embeds": negative.hidden,
            "negative_pooled_prompt_embeds": negative.pooled,
        }
