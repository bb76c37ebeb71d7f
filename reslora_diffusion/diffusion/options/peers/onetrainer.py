"""Configurations of OneTrainer: a flat JSON object with its presets' names, and its files of concepts.

Its main fields are translated; everything else that is in use is named as not used.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ....utils.option_parser import parse_file
from ....utils.problems import BadInput
from ..adapter import KOHYA
from .translation import Translation, is_off

MODELS = tuple(f"STABLE_DIFFUSION_{name}" for name in ("15", "20", "21", "XL", "3"))
FLOWS = ("FLUX_DEV_1", "CHROMA_1", "STABLE_DIFFUSION_3", "FLUX_2", "QWEN", "SANA", "Z_IMAGE")
OTHER_TASKS = ("INPAINTING", "DEPTH")
LARGEST_TIMESTEP = 1000
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
    "dataloader_threads": "dataloader_num_workers",
    "compile": "compile",
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
    *("unmasked_probability", "unmasked_weight", "save_after_unit", "sample_after_unit"),
    *("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"),  # see `take_parts`
    *("output_model_destination", "train_text_encoder_epochs", "tensorboard", "__version"),
    *("layer_filter", "layer_filter_preset", "layer_filter_regex"),  # see `take_layers`
    *("mse_strength", "mae_strength", "loss_weight_fn", "loss_weight_strength"),  # see `take_loss`
    *("min_noising_strength", "max_noising_strength"),  # see `take_span`
}


def is_config(content: Mapping[str, Any]) -> bool:
    return "training_method" in content and "model_type" in content


def is_concepts(content: Any) -> bool:
    """Return whether a list is a file of concepts of OneTrainer's."""
    return isinstance(content, list) and bool(content) and all(isinstance(c, dict) and "path" in c for c in content)


def entries(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Concepts as `--concepts` holds them; those that are switched off are left out."""
    found = []
    for concept in content:
        if concept.get("enabled", True):
            repeats = concept.get("balancing", concept.get("repeating", 1)) or 1
            entry = {"instance_data_dir": concept["path"], "repeats": max(1, round(float(repeats)))}
            flipped = {"random_flip": True} if (concept.get("image") or {}).get("enable_random_flip") else {}
            found.append(entry | flipped | of_captions(concept.get("text") or {}))
    return found


def of_captions(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return options on the captions of a concept."""
    own: dict[str, Any] = {"shuffle_caption": True} if text.get("enable_tag_shuffling") else {}
    if drops_tags(text):
        own["caption_tag_dropout_rate"] = text["tag_dropout_probability"]
    return own | {"keep_tokens": text.get("keep_tags_count", 1)} if own else own


def drops_tags(text: Mapping[str, Any]) -> bool:
    """Return whether each tag is left out by itself; its other modes leave out all, or later tags more often."""
    plain = text.get("tag_dropout_special_tags_mode", "NONE") == "NONE" and text.get("tag_dropout_mode") == "RANDOM"
    return plain and bool(text.get("tag_dropout_enable")) and bool(text.get("tag_dropout_probability"))


def not_used_of(concepts: list[dict[str, Any]]) -> dict[str, str]:
    """Name switches of concepts that are on and have no counterpart here."""
    found = dict[str, str]()
    for concept in concepts:
        text, image = (concept.get(part) or {} for part in ("text", "image"))
        on = {f"concept, {name}" for name, value in image.items() if name.startswith("enable_") and value}
        on |= {f"concept, {name}" for name in ("tag_dropout_enable", "caps_randomize_enable") if text.get(name)}
        on -= {"concept, enable_random_flip", "concept, tag_dropout_enable" if drops_tags(text) else ""}
        found |= dict.fromkeys(sorted(on), "there is no such option here")
        if (source := text.get("prompt_source", "sample")) != "sample":
            found["concept, prompt_source"] = f"got {source}; captions stand beside the images, see --instance_prompt"
    return found


def translated(given: Mapping[str, Any], source: str) -> Translation:
    """Options here for a configuration."""
    out = Translation(source)
    if given["training_method"] != "LORA":
        out.problems.append(f"training_method: got {given['training_method']}; LORA is what is trained here")
    kind = str(given["model_type"])
    if not kind.startswith((*MODELS, *FLOWS)) or kind.endswith(OTHER_TASKS):
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
        elif name == "gradient_checkpointing":
            out.take(name, gradient_checkpointing=True)
        elif name == "quantization":
            out.not_used[name] = "--quantization chooses how the frozen base is stored"
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
    take_layers(out, given)
    take_loss(out, given)
    take_span(out, given)
    with suppress(BadInput):  # said where the concepts are read
        if Path(file := str(given.get("concept_file_name"))).is_file():
            concepts = parse_file("concept_file_name", Path(file))
            out.not_used |= not_used_of(concepts) if is_concepts(concepts) else {}
    if is_flow(given):
        take_noise_levels(out, given)
    elif given.get("timestep_distribution", "UNIFORM") != "UNIFORM":
        out.not_used["timestep_distribution"] = f"got {given['timestep_distribution']}; timesteps are drawn uniformly"
    if "adamw" in str(out.values.get("optimizer", "adamw")):
        out.assume(adam_weight_decay=0.01)
    out.assume(**{ours: value for name, (ours, value) in DEFAULTS.items() if name not in given})
    if "learning_rate_warmup_steps" in given:
        out.values["lr_warmup_steps"] = given["learning_rate_warmup_steps"] or 0
    out.assume(center_crop=True, report_to="none")
    return out


def is_flow(given: Mapping[str, Any]) -> bool:
    return str(given["model_type"]).startswith(FLOWS)


def take_layers(out: Translation, given: Mapping[str, Any]) -> None:
    """Take which layers are adapted: without a filter all linear layers and convolutions, at one rank."""
    out.assume(text_encoder_target_modules=[KOHYA])
    words = "" if is_off(given.get("layer_filter")) else str(given["layer_filter"])
    unet = not is_flow(given)
    blocks = str(given["model_type"]).startswith(("FLUX_DEV_1", "CHROMA_1", "STABLE_DIFFUSION_3"))
    if given.get("layer_filter_regex"):
        out.not_used["layer_filter"] = f"got {words!r}; --target_modules names layers"
    elif unet and words in ("", "attentions"):
        out.assume(target_modules=[KOHYA])
        if not words:
            rank, alpha = (given.get(name, DEFAULTS[name][1]) for name in ("lora_rank", "lora_alpha"))
            out.assume(conv_rank=rank, conv_alpha=alpha)
            out.different["layer_filter"] = "without one, conv_in, conv_out and time_embedding are adapted there too"
    elif unet and words == "attn":
        out.not_needed.append("layer_filter")
    elif blocks and words in ("", "transformer_block"):
        out.assume(target_modules=[KOHYA])
        if not words:
            out.different["layer_filter"] = "without one, layers outside of the blocks are adapted there too"
    else:
        out.not_used["layer_filter"] = f"got {words!r}; the default layers are adapted, see --target_modules"


def take_loss(out: Translation, given: Mapping[str, Any]) -> None:
    """Take how errors are measured and weighted."""
    square, absolute = given.get("mse_strength", 1.0), given.get("mae_strength", 0.0)
    if (square, absolute) == (0, 1):
        out.take("mae_strength", loss_type="l1")
    elif (square, absolute) != (1, 0):
        out.not_used["mse_strength, mae_strength"] = (
            f"got {square} and {absolute}, of which one is to be 1, the other 0"
        )
    weight, strength = given.get("loss_weight_fn", "CONSTANT"), given.get("loss_weight_strength", 5.0)
    if weight == "MIN_SNR_GAMMA":
        out.take("loss_weight_fn", snr_gamma=strength)
    elif weight == "DEBIASED_ESTIMATION":
        out.take("loss_weight_fn", debiased_estimation_loss=True)
    elif weight != "CONSTANT":
        out.not_used["loss_weight_fn"] = f"got {weight}; see --snr_gamma, --debiased_estimation_loss"


def take_span(out: Translation, given: Mapping[str, Any]) -> None:
    """Take the least and the largest noise level, shares of all."""
    for name, ours, all_of_it in (
        ("min_noising_strength", "min_timestep", 0.0),
        ("max_noising_strength", "max_timestep", 1.0),
    ):
        if (share := given.get(name, all_of_it)) != all_of_it:
            out.take(name, **{ours: int(LARGEST_TIMESTEP * share)})


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


def last_pass_of_encoders(said: Mapping[str, Any], passes: Any, out: Translation) -> None:
    """Translate `stop_training_after`, of `passes` over the data."""
    name, after = "text_encoder, stop_training_after", said.get("stop_training_after")
    unit = said.get("stop_training_after_unit", "EPOCH")
    if not after or unit == "NEVER":
        return
    if unit != "EPOCH" or not isinstance(after, int | float) or not isinstance(passes, int | float):
        out.not_used[name] = f"got {after} {unit}; wanted EPOCH, or --train_text_encoder_frac"
    elif after < passes:
        out.take(name, train_text_encoder_frac=after / passes)
    else:
        out.not_needed.append(name)


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
        out.not_used[f"{denoiser}, weight_dtype"] = f"got {precision}; see --quantization"
    if "train_text_encoder" not in given:
        said = parts["text_encoder"]
        if said.get("include", True) and said.get("train", True):
            out.take("text_encoder, train", train_text_encoder=True)
            out.values["text_encoder_lr"] = said.get("learning_rate") or base
            last_pass_of_encoders(said, given.get("epochs", DEFAULTS["epochs"][1]), out)
            if parts["text_encoder_2"].get("train", True) is False and "XL" in str(given["model_type"]):
                out.not_used["text_encoder_2, train"] = "text encoders are trained together, or none"
    if name := parts["vae"].get("model_name"):
        out.take("vae, model_name", pretrained_vae_model_name_or_path=name)
    if str(given["model_type"]).startswith("FLUX"):
        out.assume(training_guidance_scale=parts["transformer"].get("guidance_scale", 1.0))
