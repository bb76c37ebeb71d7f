"""What kohya's scripts refuse of their options together, and what they take where an option says nothing."""

from collections.abc import Mapping
from typing import Any

from .translation import Translation, is_off

FLUX_SHIFT = 3.0  # their discrete_flow_shift
RANK = 4  # their network_dim


def contradictions(given: Mapping[str, Any], out: Translation) -> None:
    """Add what they refuse to the problems of a translation."""
    say = out.problems.append

    def has(name: str) -> Any:
        return None if is_off(given.get(name)) else given[name]

    if has("network_train_unet_only") and has("network_train_text_encoder_only"):
        say("network_train_unet_only and network_train_text_encoder_only leave nothing to train")
    if has("use_8bit_adam") and str(given.get("optimizer_type") or "AdamW8bit").lower() != "adamw8bit":
        say(f"use_8bit_adam and optimizer_type {given['optimizer_type']} are two optimizers; wanted one")
    if has("min_snr_gamma") and has("debiased_estimation_loss"):
        say("min_snr_gamma and debiased_estimation_loss both weight the loss; wanted one of them")
    if has("max_train_epochs") and has("save_every_n_epochs"):
        if int(has("save_every_n_epochs")) > int(has("max_train_epochs")):
            out.not_used["save_every_n_epochs"] = "it is more than max_train_epochs: the last file alone is saved"
    for name, wanted in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if has(name) and given.get("mixed_precision") != wanted:
            say(f"{name} wants mixed_precision {wanted}; got {given.get('mixed_precision')!r}")


def unsaid(given: Mapping[str, Any], out: Translation) -> None:
    """Take the rank for an alpha of 0, and their shift for noise levels of FLUX.1 that have one."""
    alpha, sampling = given.get("network_alpha"), given.get("timestep_sampling")
    if alpha is not None and is_off(alpha):
        out.take("network_alpha", lora_alpha=given.get("network_dim") or RANK)
    if given.get("network_module") == "networks.lora_flux" and sampling in (None, "", "sigma", "shift"):
        out.assume(discrete_flow_shift=FLUX_SHIFT)
