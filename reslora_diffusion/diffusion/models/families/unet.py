"""The common part of Stable Diffusion 1.x, 2.x and XL: a UNet that is trained by diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...data.buckets import Grid
from ...options import DreamBoothOptions
from .base import Family
from .not_here import OF_FLOWS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ...objective.noise import Process


def scheduler_changes(options: DreamBoothOptions) -> dict[str, str | bool]:
    """Return the settings of the noise schedule that the options change; all others are the base's own."""
    given = {name: getattr(options, name) for name in ("prediction_type", "rescale_betas_zero_snr")}
    given = {name: value for name, value in given.items() if value is not None}
    return given | ({"timestep_spacing": "trailing"} if given.get("rescale_betas_zero_snr") else {})


class UNetFamily(Family):
    """A UNet, whose attention layers and convolutions can be adapted."""

    denoiser = "unet"
    target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    of_kohya = ("attentions",)  # each is a Transformer2DModel
    convolutions = ("resnets", "downsamplers", "upsamplers")
    not_here = (
        OF_FLOWS
        | dict.fromkeys(("max_sequence_length", "skip_t5", "enable_t5_ti"), "belongs to T5, which this family lacks")
        | {"lora_blocks": "counts the blocks of a transformer; name layers of a UNet by --target_modules"}
    )

    def grid(self, config: Mapping[str, Any], vae_scale_factor: int) -> Grid:
        return Grid(vae_scale_factor, vae_scale_factor * 2 ** (len(config["block_out_channels"]) - 1))

    def process(self, pipeline: DiffusionPipeline, options: DreamBoothOptions) -> Process:
        """Prediction type and zero-terminal SNR are the base's own if not given."""
        from diffusers import DDPMScheduler

        from ...objective.noise import Diffusion

        if changes := scheduler_changes(options):
            pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **changes)
        return Diffusion(
            DDPMScheduler.from_config(pipeline.scheduler.config), options.min_timestep, options.max_timestep
        )
