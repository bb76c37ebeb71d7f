"""Configurations of OneTrainer: a flat JSON object with its presets' names, and its files of concepts.

Its main fields are translated; everything else that is in use is named as not used.
"""

from collections.abc import Mapping
from typing import Any

from .translation import Translation, is_off

MODELS = tuple(f"STABLE_DIFFUSION_{name}" for name in ("15", "20", "21", "XL", "3"))
DTYPES = {"FLOAT_16": "fp16", "BFLOAT_16": "bf16", "FLOAT_32": "fp32"}
OPTIMIZERS = {"ADAMW_8BIT": "adamw8bit", "ADAM_8BIT": "adam8bit", "LION_8BIT": "lion8bit", "DADAPT_ADAM": "dadaptadam"}
SCHEDULES = {"CONSTANT": "constant_with_warmup", "LINEAR": "linear", "COSINE": "cosine"}
SAME = {
    "base_model_name": "pretrained_model_name_or_path",
    "learning_rate_warmup_steps": "lr_warmup_steps",
    "epochs": "num_train_epochs",
    "batch_size": "train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "offset_noise_weight": "noise_offset",
    "lora_rank": "rank",
    "lora_alpha": "lora_alpha",
    "seed": "seed",
    "concept_file_name": "concepts",
    "workspace_dir": "output_dir",
    "clip_grad_norm": "max_grad_norm",
}
# Its defaults, which its presets leave out: name there -> name here, and value.
DEFAULTS: dict[str, tuple[str, Any]] = {
    "lora_rank": ("rank", 16),
    "lora_alpha": ("lora_alpha", 1.0),
    "learning_rate": ("learning_rate", 3e-6),
    "learning_rate_scheduler": ("lr_scheduler", "constant_with_warmup"),
    "learning_rate_warmup_steps": ("lr_warmup_steps", 200),
    "epochs": ("num_train_epochs", 100),
    "batch_size": ("train_batch_size", 1),
    "resolution": ("resolution", 512),
    "aspect_ratio_bucketing": ("aspect_ratio_buckets", "auto"),
}
NOISE_LEVELS = ("timestep_distribution", "timestep_shift", "dynamic_timestep_shifting")
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "vae")
NOT_NEEDED = {
    *("debug_mode", "debug_dir", "cache_dir", "latent_caching", "latent_caching_epochs", "clear_cache_before_training"),
    *("output_model_format", "train_device", "temp_device", "attention_mechanism", "train_unet", "weight_dtype"),
    *("train_unet_epochs", "unet_weight_dtype", "text_encoder_weight_dtype", "vae_weight_dtype", "lora_weight_dtype"),
    *(
        "text_encoder_learning_rate",
        "unet_learning_rate",
        "learning_rate",
        "model_type",
        "training_method",
        "tensorboard",
    ),
    *("ema_decay", "ema_update_step_interval", "learning_rate_cycles", "token_count", "initial_embedding_text"),
    *("embedding_weight_dtype", "sample_image_format", "backup_after", "backup_after_unit", "backup_before_save"),
    *("unmasked_probability", "unmasked_weight", "max_noising_strength", "save_after_unit", "sample_after_unit"),
    *("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"),  # see `take_parts`
    *("output_model_destination", "train_text_encoder_epochs", "tensorboard", "__version"),
}


def is_config(content: Mapping[str, Any]) -> bool:
    return "training_method" in content and "model_type" in content


def is_concepts(content: Any) -> bool:
    """Whether a list is a file of concepts of OneTrainer's."""
    return isinstance(content, list) and bool(content) and all(isinstance(c, dict) and "path" in c for c in content)


def entries(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Concepts as `--concepts` holds them; those that are switched off are left out."""
    found = []
    for concept in content:
        if concept.get("enabled", True):
            repeats = concept.get("balancing", concept.get("repeating", 1)) or 1
            found.append({"instance_data_dir": concept["path"], "repeats": max(1, round(float(repeats)))})
    return found


def translated(given: Mapping[str, Any], source: str) -> Translation:
    """Options here for a configuration."""
    out = Translation(source)
    if given["training_method"] != "LORA":
        out.problems.append(f"training_method: got {given['training_method']}; LORA is what is trained here")
    if not str(given["model_type"]).startswith((*MODELS, "FLUX_DEV_1")):
        out.problems.append(f"model_type: {given['model_type']} is of no family that is trained here")
    if given.get("peft_type", "LORA") != "LORA":
        out.problems.append(f"peft_type: got {given['peft_type']}; LORA is what is trained here")
    for name, value in given.items():
        if is_off(value) or value in ("NONE", "OFF", "NEVER"):
            continue
        if name in SAME:
            out.take(name, **{SAME[name]: value})
        elif name == "resolution":
            first, _, others = str(value).partition(",")
            out.take(name, resolution=int(first))
            if others:
                out.not_used[name] = f"one resolution for all images: got {value}, {first} is used"
        elif name == "aspect_ratio_bucketing":
            out.take(name, aspect_ratio_buckets="auto")
        elif name == "optimizer":
            kind = value.get("optimizer", "ADAMW") if isinstance(value, dict) else value
            decay = value.get("weight_decay") if isinstance(value, dict) else given.get("weight_decay")
            out.take(name, optimizer=OPTIMIZERS.get(kind, str(kind).lower().replace("_", "")))
            out.values |= {} if decay is None else {"adam_weight_decay": decay}
        elif name == "learning_rate_scheduler":
            if value in SCHEDULES:
                out.take(name, lr_scheduler=SCHEDULES[value])
            else:
                out.problems.append(f"{name}: got {value}, wanted {', '.join(SCHEDULES)}")
        elif name == "train_dtype" and DTYPES.get(value) in ("fp16", "bf16"):
            out.take(name, mixed_precision=DTYPES[value])
        elif name == "output_dtype" and value in DTYPES:
            out.take(name, save_precision=DTYPES[value])
        elif name == "ema":
            out.take(name, use_ema=True, ema_decay=given.get("ema_decay", 0.999))
        elif name == "train_text_encoder":
            rate = given.get("text_encoder_learning_rate") or given.get("learning_rate")
            out.take(name, train_text_encoder=True, text_encoder_lr=rate)
        elif name == "force_v_prediction":
            out.take(name, prediction_type="v_prediction")
        elif name == "rescale_noise_scheduler_to_zero_terminal_snr":
            out.take(name, rescale_betas_zero_snr=True)
        elif name in NOISE_LEVELS and is_flow(given):
            pass  # see `take_noise_levels`
        elif name == "text_encoder_layer_skip":
            out.take(name, skip_clip_layers=value)
        elif name == "lora_decompose" and given.get("lora_decompose_output_axis"):
            out.take(name, use_dora=True)
        elif name == "lora_decompose":
            out.not_used[name] = "its DoRA has the lengths of columns, and --use_dora those of rows"
        elif name == "peft_type" or name.startswith("lora_decompose_"):
            out.not_needed.append(name)
        elif name in NOT_NEEDED:
            out.not_needed.append(name)
        elif name != "weight_decay":
            out.not_used[name] = f"got {value!r}; there is no such option here"
    take_parts(out, given)
    if is_flow(given):
        take_noise_levels(out, given)
    if "adamw" in str(out.values.get("optimizer", "adamw")):
        out.assume(adam_weight_decay=0.01)
    out.assume(**{ours: value for name, (ours, value) in DEFAULTS.items() if name not in given})
    if "learning_rate_warmup_steps" in given:
        out.values["lr_warmup_steps"] = given["learning_rate_warmup_steps"] or 0
    out.assume(center_crop=True, report_to="none")
    return out


def is_flow(given: Mapping[str, Any]) -> bool:
    return str(given["model_type"]).startswith(("FLUX", "STABLE_DIFFUSION_3"))


def take_noise_levels(out: Translation, given: Mapping[str, Any]) -> None:
    """Take the distribution of noise levels, which is uniform by default, and its shift; velocities are compared."""
    out.assume(precondition_outputs=0)
    said = {name: given[name] for name in NOISE_LEVELS if not is_off(given.get(name))}
    kind, shift = said.get("timestep_distribution", "UNIFORM"), said.get("timestep_shift", 1.0)
    dynamic = "dynamic_timestep_shifting" in said
    normal = kind == "LOGIT_NORMAL" and is_off(given.get("noising_weight")) and is_off(given.get("noising_bias"))
    name, values = "timestep_distribution", dict[str, Any]()
    if kind == "UNIFORM" and shift == 1 and not dynamic:
        values = {"timestep_sampling": "uniform"}
    elif normal and dynamic and str(given["model_type"]).startswith("FLUX"):
        values = {"timestep_sampling": "flux_shift"}
    elif normal and not dynamic:
        values = {"timestep_sampling": "shift", "discrete_flow_shift": shift}
    if not values:
        out.not_used[name] = f"got {kind} with {said}; see --timestep_sampling"
    elif said:
        out.take(name, **values)
    else:
        out.assume(**values)


def take_parts(out: Translation, given: Mapping[str, Any]) -> None:
    """Take what is said of the parts of a model: each is a table of its own, or has fields before 2024."""
    parts = {name: given[name] if isinstance(given.get(name), dict) else {} for name in PARTS}
    denoiser = "transformer" if is_flow(given) else "unet"
    base = given.get("learning_rate", DEFAULTS["learning_rate"][1])
    rate = parts[denoiser].get("learning_rate") or given.get("unet_learning_rate") or base
    out.take("learning_rate", learning_rate=rate)
    if not parts[denoiser].get("train", True):
        out.not_used[f"{denoiser}, train"] = "the UNet or transformer is always trained"
    precision = parts[denoiser].get("weight_dtype", "NONE")
    if precision not in (*DTYPES, "NONE"):
        out.not_used[f"{denoiser}, weight_dtype"] = f"got {precision}; the frozen base is in --mixed_precision"
    if "train_text_encoder" not in given:
        said = parts["text_encoder"]
        if said.get("include", True) and said.get("train", True):
            out.take("text_encoder, train", train_text_encoder=True)
            out.values["text_encoder_lr"] = said.get("learning_rate") or base
            if said.get("stop_training_after"):
                out.not_used["text_encoder, stop_training_after"] = "text encoders are trained to the end"
            if parts["text_encoder_2"].get("train", True) is False and "XL" in str(given["model_type"]):
                out.not_used["text_encoder_2, train"] = "text encoders are trained together, or none"
    if name := parts["vae"].get("model_name"):
        out.take("vae, model_name", pretrained_vae_model_name_or_path=name)
    if str(given["model_type"]).startswith("FLUX"):
        out.assume(training_guidance_scale=parts["transformer"].get("guidance_scale", 1.0))
