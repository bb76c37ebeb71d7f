"""Presets and saved settings of kohya_ss, the graphical program around kohya's scripts: one flat JSON object.

It has names of its own for some options, numbers in quotes, and 0, "" or false where an option is not used.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from .translation import is_off

OF_GUI = ("LoRA_type", "max_resolution", "lr_warmup", "optimizer_args")
# Name in the program -> name in the scripts.
RENAMED = {
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "lora_network_weights": "network_weights",
    "sdxl_no_half_vae": "no_half_vae",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "flux1_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "flux1_cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs_to_disk",
    "stop_text_encoder_training_pct": "stop_text_encoder_training",
}
# What belongs to the program, or says how it starts the scripts.
OF_THE_PROGRAM = (
    *("model_list", "save_as_bool", "sdxl", "sd3_checkbox", "flux1_checkbox", "LoRA_type", "epoch", "lr_warmup"),
    *("num_cpu_threads_per_process", "num_processes", "num_machines", "multi_gpu", "gpu_ids", "main_process_port"),
    *("extra_accelerate_launch_args", "dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph", "dynamo_backend"),
    *("use_wandb", "noise_offset_type", "LyCORIS_preset", "train_blocks", "no_token_padding", "training_preset"),
)
# Settings of adapters other than plain LoRA; the program writes them whatever is trained.
OF_OTHER_ADAPTERS = (
    *("conv_block_alphas", "conv_block_dims", "factor", "use_cp", "use_tucker", "use_scalar", "decompose_both"),
    *("bypass_mode", "constrain", "rescaled", "train_norm", "train_on_input", "unit", "rank_dropout_scale"),
)
LYCORIS_LOCON = ("LyCORIS/LoCon", "LoCon")
MODULES = {
    "Standard": "networks.lora",
    "Kohya LoCon": "networks.lora",
    "Flux1": "networks.lora_flux",
    "SD3": "networks.lora_sd3",
    "LoRA-FA": "networks.lora_fa",
    "Lumina": "networks.lora_lumina",
    **dict.fromkeys(LYCORIS_LOCON, "lycoris.kohya"),
}
WITH_CONVOLUTIONS = {"Kohya LoCon", *LYCORIS_LOCON}
IN_NETWORK_ARGS = (
    *("conv_dim", "conv_alpha", "rank_dropout", "module_dropout", "down_lr_weight", "mid_lr_weight", "up_lr_weight"),
    *("block_dims", "block_alphas", "block_lr_zero_threshold", "loraplus_lr_ratio", "loraplus_unet_lr_ratio"),
    "loraplus_text_encoder_lr_ratio",
)


def is_preset(content: Mapping[str, Any]) -> bool:
    """Return whether an object is a preset of kohya_ss."""
    return sum(name in content for name in OF_GUI) >= 2


def plain_number(value: Any) -> Any:
    """A number that was written in quotes, and a whole number that was written as 64.0."""
    try:
        found = float(value) if isinstance(value, (str, float)) else value
    except ValueError:
        return value
    return int(found) if isinstance(found, float) and found.is_integer() and abs(found) < 2**53 else found


def further(text: str) -> dict[str, Any]:
    """Options that stand as words of a command line in `additional_parameters`; a quote may be open: `ValueError`."""
    found: dict[str, Any] = {}
    name = ""
    for word in shlex.split(text):
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            found[name] = plain_number(value) if equals else True
        elif name:
            before, value = found[name], plain_number(word)
            found[name] = value if before is True else [*(before if isinstance(before, list) else [before]), value]
    return found


def as_script(preset: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the program would start kohya's scripts with."""
    kind = preset.get("LoRA_type")  # presets that train a whole model have none
    given = {RENAMED.get(name, name): plain_number(value) for name, value in preset.items() if not is_off(value)}
    given = {name: value for name, value in given.items() if name not in OF_OTHER_ADAPTERS}
    pairs = {name: given.pop(name) for name in IN_NETWORK_ARGS if name in given}
    if kind not in WITH_CONVOLUTIONS:
        pairs.pop("conv_dim", None)
        pairs.pop("conv_alpha", None)
    if kind:
        given["network_module"] = MODULES.get(kind, kind)
    if kind == "Standard" and preset.get("sd3_checkbox"):
        given["network_module"] = MODULES["SD3"]
    if share := given.get("stop_text_encoder_training"):
        given["stop_text_encoder_training"] = f"{share}%"
    dora = given.pop("dora_wd", False)
    if kind in LYCORIS_LOCON:
        pairs |= {"algo": "locon", "preset": preset.get("LyCORIS_preset") or "full"} | (
            {"dora_wd": True} if dora else {}
        )
    given["network_args"] = [f"{name}={value}" for name, value in pairs.items()]
    if not given.get("max_train_epochs") and not given.get("max_train_steps") and preset.get("epoch"):
        given["max_train_epochs"] = int(float(preset["epoch"]))
    given["lr_warmup_steps"] = float(preset.get("lr_warmup") or 0) / 100
    text, unet = (plain_number(preset.get(name)) for name in ("text_encoder_lr", "unet_lr"))
    if text == 0 and unet:
        given["network_train_unet_only"] = True
    if unet == 0 and text:
        given["network_train_text_encoder_only"] = True
    if isinstance(words := given.get("optimizer_args"), str):
        given["optimizer_args"] = shlex.split(words)
    unused: tuple[str, ...] = ("multires_noise_iterations", "multires_noise_discount")
    if str(preset.get("noise_offset_type", "")).lower() == "multires":
        unused = ("noise_offset", "adaptive_noise_scale", "noise_offset_random_strength")
    given = {name: value for name, value in given.items() if name not in unused}
    if preset.get("use_wandb"):
        given["log_with"] = "wandb"
    if isinstance(resolution := given.get("resolution"), int):
        given["resolution"] = str(resolution)
    given |= further(str(given.pop("additional_parameters", "")))
    for name in ("output_name", "training_comment"):
        if name in given:
            given[name] = str(given[name])
    return {name: value for name, value in given.items() if name not in OF_THE_PROGRAM}
