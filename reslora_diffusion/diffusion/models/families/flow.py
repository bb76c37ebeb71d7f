"""The common part of all transformers: flow matching, and one large text encoder that is never trained.

It reads each prompt once, whatever the number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...data.buckets import Grid
from ...options import DreamBoothOptions
from .base import Family
from .latent_tokens import CELL
from .not_here import OF_FLOWS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from ...objective.noise import Process

# Of a flow's schedule: times / NUM_TRAIN_TIMESTEPS is the share of the noise, which most transformers are given.
NUM_TRAIN_TIMESTEPS = 1000


class FlowFamily(Family):
    """A transformer, with `fixed_encoder` and `fixed_tokenizer` for the prompts."""

    denoiser = "transformer"
    flow: Mapping[str, Any] = {}  # what differs from `FlowMatching` where options do not say it
    is_packed = False  # whether the transformer itself is given each cell of latents as one token

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        return super().latent_channels(config) // (CELL**2 if self.is_packed else 1)

    def grid(self, config: Mapping[str, Any], vae_scale_factor: int) -> Grid:
        return Grid(vae_scale_factor * CELL, vae_scale_factor * CELL)

    def process(self, pipeline: DiffusionPipeline, options: DreamBoothOptions) -> Process:
        """Noise levels are shifted as the base's scheduler shifts them for every size alike, or as options say."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        from ...objective.noise import FlowMatching

        names = (*OF_FLOWS, "min_timestep", "max_timestep")
        given = {name: value for name in names if (value := getattr(options, name)) is not None}
        replaced = options.discrete_flow_shift is not None
        shift = {"shift": options.discrete_flow_shift, "use_dynamic_shifting": False} if replaced else {}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, **shift)
        return FlowMatching(scheduler, **{**self.flow, **given})

    def fixed(self, pipeline: DiffusionPipeline, prompts: list[str], options: DreamBoothOptions) -> Tensor:
        import torch

        encoder, tokenizer = (getattr(pipeline, str(name)) for name in (self.fixed_encoder, self.fixed_tokenizer))
        ids = self.tokenize([tokenizer], prompts, self.t5_length(options))[:, 0].to(encoder.device)
        if options.enable_t5_ti:
            return ids
        return torch.cat([encoder(part, return_dict=False)[0] for part in ids.split(1)])

    def states_of(self, text_encoders: Sequence[nn.Module], fixed: Tensor | None) -> Tensor:
        """The states [P, L2, D] that the last encoder computes from `Tokens.fixed`."""
        assert fixed is not None, "zeros stand there without T5"
        return fixed if fixed.is_floating_point() else text_encoders[-1](fixed, return_dict=False)[0]
