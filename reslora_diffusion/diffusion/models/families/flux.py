"""FLUX.1: a transformer over packed latents, trained by flow matching, with CLIP and T5.

    hidden = T5                                                              [P, L2, D]
    pooled = end-of-text state of CLIP                                       [P, D2]
    packed = each 2 x 2 cell of the latents as one token                     [B, h w / 4, 4 C]

CLIP can be trained. A token has a place (0, row, column), those of the text (0, 0, 0); FLUX.1-dev also
takes the guidance that was distilled into it. Training has the noise levels of `FlowMatching` for every size; the
pipeline shifts them by the size of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .flow import NUM_TRAIN_TIMESTEPS, FlowFamily
from .latent_tokens import packed, places, unpacked
from .not_here import NEEDS_T5, OF_CLIP_ALONE, OF_DIFFUSION, OF_ONE_CLIP
from .texts import Texts, Tokens

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn


class Flux(FlowFamily):
    title = "FLUX.1"
    tag = "flux"
    pipeline_class = "FluxPipeline"
    denoiser_class = "FluxTransformer2DModel"
    text_encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    fixed_encoder, fixed_tokenizer = "text_encoder_2", "tokenizer_2"
    embedding_keys = {"text_encoder": "clip_l", "text_encoder_2": "t5"}
    target_modules = (
        *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    of_kohya = ("transformer_blocks", "single_transformer_blocks")
    not_here = OF_DIFFUSION | OF_CLIP_ALONE | OF_ONE_CLIP | NEEDS_T5
    max_sequence_length = 512
    guidance_scale = 3.5
    is_guided = has_true_cfg = is_packed = True
    flow = {"weighting_scheme": "none", "precondition_outputs": False}

    def encode(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> Texts:
        pooled = text_encoders[0](tokens.ids[:, 0], return_dict=True).pooler_output
        return Texts(self.states_of(text_encoders, tokens.fixed).to(pooled.dtype), pooled)

    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        return {
            "encoder_hidden_states": texts.hidden,
            "pooled_projections": texts.pooled,
            "txt_ids": texts.hidden.new_zeros(texts.hidden.shape[1], 3),
        }

    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditions: dict[str, Any]) -> Tensor:

        tokens = model(
            hidden_states=packed(latents),
            timestep=times / NUM_TRAIN_TIMESTEPS,
            img_ids=places(latents).to(latents.dtype),
            **conditions,
            return_dict=False,
        )[0]
        return unpacked(tokens, latents)

    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Tensor | None]:
        return {"prompt_embeds": texts.hidden, "pooled_prompt_embeds": texts.pooled}
