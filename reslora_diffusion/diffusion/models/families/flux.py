"""FLUX.1: a transformer over packed latents, trained by flow matching, with CLIP and T5.

    hidden = T5                                                              [P, L2, D]
    pooled = end-of-text state of CLIP                                       [P, D2]
    packed = each 2 x 2 cell of the latents as one token                     [B, h w / 4, 4 C]

CLIP can be trained. A token has a place (0, row, column), those of the text (0, 0, 0); FLUX.1-dev also
takes the guidance that was distilled into it. Training has the noise levels of `FlowMatching` for every size; the
pipeline shifts them by the size of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...data.buckets import Grid
from ...options import DreamBoothOptions
from .base import OF_CLIP_ALONE, OF_DIFFUSION, OF_ONE_CLIP, FlowFamily, Texts, Tokens

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

CELL = 2  # latents that a token is wide and high
TIME = 1000  # factor that the model applies to its timestep


class Flux(FlowFamily):
    title = "FLUX.1"
    tag = "flux"
    pipeline_class = "FluxPipeline"
    denoiser_class = "FluxTransformer2DModel"
    text_encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    fixed_encoder, fixed_tokenizer = "text_encoder_2", "tokenizer_2"
    target_modules = (
        *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    not_here = (
        OF_DIFFUSION
        | OF_CLIP_ALONE
        | OF_ONE_CLIP
        | {"skip_t5": "cannot do without T5, whose states are all that it reads of a prompt"}
    )
    max_sequence_length = 512
    guidance_scale = 3.5
    is_guided = True
    flow = {"weighting_scheme": "none", "precondition_outputs": False}

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        return config["in_channels"] // CELL**2

    def grid(self, config: Mapping[str, Any], vae_scale_factor: int) -> Grid:
        return Grid(vae_scale_factor * CELL, vae_scale_factor * CELL)

    def training_guidance(self, config: Mapping[str, Any], options: DreamBoothOptions) -> float | None:
        given = options.training_guidance_scale
        return (self.guidance_scale if given is None else given) if config.get("guidance_embeds") else None

    def encode(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> Texts:
        pooled = text_encoders[0](tokens.ids[:, 0], return_dict=True).pooler_output
        assert tokens.fixed is not None, "what T5 makes of a prompt is always computed"
        return Texts(tokens.fixed.to(pooled.dtype), pooled)

    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        return {
            "encoder_hidden_states": texts.hidden,
            "pooled_projections": texts.pooled,
            "txt_ids": texts.hidden.new_zeros(texts.hidden.shape[1], 3),
        }

    def denoise(
        self,
        model: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditions: dict[str, Any],
        guidance_scale: float | None = None,
    ) -> Tensor:
        import torch
        import torch.nn.functional as F

        rows, columns = (torch.arange(side // CELL, device=latents.device) for side in latents.shape[2:])
        places = F.pad(torch.cartesian_prod(rows, columns), (1, 0)).to(latents.dtype)
        packed = model(
            hidden_states=F.pixel_unshuffle(latents, CELL).flatten(2).mT,
            timestep=times / TIME,
            guidance=None if guidance_scale is None else torch.full_like(times, guidance_scale),
            img_ids=places,
            **conditions,
            return_dict=False,
        )[0]
        return F.pixel_shuffle(packed.mT.unflatten(2, (len(rows), len(columns))), CELL)

    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Tensor | None]:
        return {"prompt_embeds": texts.hidden, "pooled_prompt_embeds": texts.pooled}
