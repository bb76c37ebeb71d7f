"""CLIP's text encoders: the layers that kohya's scripts train, and those that `skip_clip_layers` leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...options.adapter import KOHYA

if TYPE_CHECKING:
    from torch import nn

TEXT_ENCODER_LAYERS = {KOHYA: ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")}  # of all that CLIP has


def leave_out_layers(text_encoder: nn.Module, count: int) -> None:
    """`skip_clip_layers`: the final norm reads what came before the last layers, as in diffusers' pipelines."""
    encoder: Any = getattr(text_encoder, "text_model", text_encoder).encoder
    encoder.layers = encoder.layers[:-count]
