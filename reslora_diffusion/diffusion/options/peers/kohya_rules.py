"""Rules of kohya's scripts: combinations that they refuse, and defaults that depend on other options."""

from collections.abc import Mapping
from typing import Any

from ..model import FLUX
from .kohya_families import FLOW_SHIFTS, USED_BY
from .translation import Translation, is_off

RANK = 4  # their network_dim
OF_VELOCITIES = ("scale_v_pred_loss_like_noise_pred", "v_pred_like_loss")


def contradictions(given: Mapping[str, Any], out: Translation) -> None:
    """Add what they refuse to the problems of a translation."""

    def say(problem: str, *without: str) -> None:
        """Add a problem; the options `without` are dropped, so that checks of their own do not say it again."""
        out.problems.append(problem)
        out.values = {name: value for name, value in out.values.items() if name not in without}

    def has(name: str) -> Any:
        return None if is_off(given.get(name)) else given[name]

    if has("network_train_unet_only") and has("network_train_text_encoder_only"):
        say("network_train_unet_only and network_train_text_encoder_only leave nothing to train")
    if has("use_8bit_adam") and str(given.get("optimizer_type") or "AdamW8bit").lower() != "adamw8bit":
        say(
            f"use_8bit_adam and optimizer_type {given['optimizer_type']} are two optimizers; wanted one",
            "use_8bit_adam",
        )
    if has("min_snr_gamma") and has("debiased_estimation_loss"):
        problem = "min_snr_gamma and debiased_estimation_loss both weight the loss; wanted one of them"
        say(problem, "debiased_estimation_loss")
    if has("scale_v_pred_loss_like_noise_pred") and not has("v_parameterization"):
        say("scale_v_pred_loss_like_noise_pred wants v_parameterization", "scale_v_pred_loss_like_noise_pred")
    if has("v_pred_like_loss") and has("v_parameterization"):
        say("v_pred_like_loss and v_parameterization contradict each other", "v_pred_like_loss")
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
    if given.get("network_module") == "networks.lora_flux" and sampling in (None, "", *USED_BY["discrete_flow_shift"]):
        out.assume(discrete_flow_shift=FLOW_SHIFTS[FLUX])


def differences(given: Mapping[str, Any], out: Translation) -> None:
    """Say where an option that was translated does not quite do the same."""

    def has(name: str) -> Any:
        return None if is_off(given.get(name)) else given[name]

    weighted = [name for name in ("min_snr_gamma", "debiased_estimation_loss", *OF_VELOCITIES) if has(name)]
    if has("zero_terminal_snr") and weighted:
        out.different["zero_terminal_snr"] = f"{weighted[0]} has the new schedule's snr here, the old one's there"
    if has("network_dropout"):
        out.different["network_dropout"] = "it drops inputs of lora_A here, and its outputs there"
    for name in filter(has, ("shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard")):
        out.different[name] = "each caption has up to 8 or 16 wordings that are drawn once; there each step draws one"
    if has("reg_data_dir"):
        out.different["reg_data_dir"] = (
            "as many class images join each batch; there they are a part of train_batch_size"
        )
    if has("network_module") == "networks.lora_fa":
        out.different["network_module"] = "lora_A is trained too, which LoRA-FA leaves as it was drawn"
    if not has("network_module"):
        out.different["network_module"] = "it names none, as where a whole model is trained; a LoRA is trained here"
    if has("conditioning_data_dir") or has("alpha_mask"):
        out.assume(masked_mean="image")
