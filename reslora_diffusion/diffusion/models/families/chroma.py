"""Chroma: FLUX.1's double- and single-stream blocks, with modulations that one small network computes for all of them.

    hidden = T5, of the prompt's tokens, its end and one token of padding                  [P, L, D]
    packed = each 2 x 2 cell of the latents as one token                                   [B, h w / 4, 4 C]

There is no CLIP and no guidance as an input; images are guided by a negative prompt. All further padding is masked, as
it was when the model was trained. In two places diffusers 0.42 does not mask it, and this module does:

    ChromaPipeline passes its mask as numbers, which attention adds (its issue 13619)
    ChromaTransformer2DModel recomputes single-stream blocks without the mask under gradient checkpointing
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reslora_diffusion.export.geometry import CHROMA

from .flow import NUM_TRAIN_TIMESTEPS
from .flux import Flux
from .frozen_text import T5_ALONE, FrozenTextFamily
from .latent_tokens import packed, places, unpacked
from .texts import Texts

if TYPE_CHECKING:
    from torch import Tensor, nn


class Chroma(FrozenTextFamily):
    title = "Chroma"
    tag = "chroma"
    pipeline_class = "ChromaPipeline"
    denoiser_class = "ChromaTransformer2DModel"
    target_modules = Flux.target_modules
    of_kohya = Flux.of_kohya
    not_here = T5_ALONE
    has_template = False
    guidance_scale = 5.0
    architecture = f"{CHROMA}/lora"
    is_packed = True

    def states(self, pipeline: Any, prompt: str, length: int, negative: bool) -> Tensor:
        common = {"device": pipeline.text_encoder.device, "max_sequence_length": length}
        hidden, _, mask = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False, **common)[:3]
        return hidden[0, mask[0].bool()]

    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": texts.hidden, "attention_mask": texts.mask}

    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditions: dict[str, Any]) -> Tensor:
        import torch.nn.functional as F

        states, hidden, mask = packed(latents), conditions["encoder_hidden_states"], conditions["attention_mask"]
        if mask is not None and model.gradient_checkpointing:
            return self.denoise_by_length(model, latents, times, hidden, mask)
        tokens = model(
            hidden_states=states,
            encoder_hidden_states=hidden,
            timestep=times / NUM_TRAIN_TIMESTEPS,
            txt_ids=hidden.new_zeros(hidden.shape[1], 3),
            img_ids=places(latents).to(latents.dtype),
            attention_mask=None if mask is None else F.pad(mask, (0, states.shape[1]), value=True),
            return_dict=False,
        )[0]
        return unpacked(tokens, latents)

    def denoise_by_length(
        self, model: nn.Module, latents: Tensor, times: Tensor, hidden: Tensor, mask: Tensor
    ) -> Tensor:
        """The prediction of `denoise` without any mask: prompts that are equally long share a forward."""
        import torch

        lengths, prediction = mask.sum(1), torch.empty_like(latents)
        for length in lengths.unique().tolist():
            own = lengths == length
            conditions = {"encoder_hidden_states": hidden[own, :length], "attention_mask": None}
            prediction[own] = self.denoise(model, latents[own], times[own], conditions)
        return prediction
