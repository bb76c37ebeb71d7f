"""Stable Diffusion 3 and 3.5: a transformer over patches, trained by flow matching, with three text encoders.

    hidden = [ [CLIP 1, CLIP 2] padded with zeros to T5's width ; T5 ]       [P, L + L2, D]
    pooled = [projected end-of-text states of CLIP 1, of CLIP 2]             [P, D1 + D2]

Both CLIPs can be trained. T5 never is, unless it has new tokens: what it makes of a prompt is computed once. A pipeline
without T5 has zeros in its place, as diffusers' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...data.buckets import Grid
from ...options import DreamBoothOptions
from .flow import FlowFamily
from .not_here import OF_CLIP_ALONE, OF_DIFFUSION, OF_ONE_CLIP
from .texts import Texts, Tokens

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn


class StableDiffusion3(FlowFamily):
    title = "Stable Diffusion 3"
    tag = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    denoiser_class = "SD3Transformer2DModel"
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    fixed_encoder, fixed_tokenizer = "text_encoder_3", "tokenizer_3"
    embedding_keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"}
    target_modules = (
        *("to_k", "to_q", "to_v", "to_out.0"),
        *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
    )
    of_kohya = ("transformer_blocks",)
    not_here = OF_DIFFUSION | OF_CLIP_ALONE | OF_ONE_CLIP

    def grid(self, config: Mapping[str, Any], vae_scale_factor: int) -> Grid:
        patch = vae_scale_factor * config["patch_size"]
        return Grid(patch, patch, patch * config["pos_embed_max_size"])

    def fixed(self, pipeline: DiffusionPipeline, prompts: list[str], options: DreamBoothOptions) -> Tensor:
        if pipeline.text_encoder_3 is not None:
            return super().fixed(pipeline, prompts, options)
        import torch

        length, transformer = self.t5_length(options), pipeline.transformer
        width = transformer.config.joint_attention_dim
        return torch.zeros(len(prompts), length, width, dtype=transformer.dtype, device=transformer.device)

    def encode(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> Texts:
        import torch
        import torch.nn.functional as F

        outputs = [
            encoder(tokens.ids[:, place], output_hidden_states=True, return_dict=True)
            for place, encoder in enumerate(text_encoders[: len(self.text_encoders)])
        ]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        fixed = self.states_of(text_encoders, tokens.fixed)
        clip = F.pad(clip, (0, fixed.shape[-1] - clip.shape[-1]))
        hidden = torch.cat([clip, fixed.to(clip.dtype)], dim=1)
        return Texts(hidden, torch.cat([output.text_embeds for output in outputs], dim=-1))

    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": texts.hidden, "pooled_projections": texts.pooled}

    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Tensor | None]:
        return {
            "prompt_embeds": texts.hidden,
            "pooled_prompt_embeds": texts.pooled,
            "negative_prompt_embeds": negative.hidden,
            "negative_pooled_prompt_embeds": negative.pooled,
        }
