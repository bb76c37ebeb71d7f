"""Jobs of ai-toolkit: a YAML file whose first process is an `sd_trainer`.

Its main fields are translated; everything else in it is named as not used. Its datasets are concepts, each once for
every resolution that it names.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ..model import LUMINA_2, PRECISIONS
from .kohya_families import FLOW_SHIFTS, from_noise
from .translation import OfFamily, Translation, is_off

DTYPES = {"float16": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32"}
# (section, name) -> name here, of values that are taken as they are.
SAME = {
    ("train", "batch_size"): "train_batch_size",
    ("train", "steps"): "max_train_steps",
    ("train", "gradient_accumulation_steps"): "gradient_accumulation_steps",
    ("train", "gradient_accumulation"): "gradient_accumulation_steps",
    ("train", "train_text_encoder"): "train_text_encoder",
    ("train", "gradient_checkpointing"): "gradient_checkpointing",
    ("train", "optimizer"): "optimizer",
    ("train", "lr"): "learning_rate",
    ("train", "lr_scheduler"): "lr_scheduler",
    ("train", "min_snr_gamma"): "snr_gamma",
    ("train", "noise_offset"): "noise_offset",
    ("train", "max_grad_norm"): "max_grad_norm",
    ("model", "name_or_path"): "pretrained_model_name_or_path",
    ("network", "rank"): "rank",
    ("network", "linear"): "rank",
    ("network", "conv"): "conv_rank",
    ("network", "conv_alpha"): "conv_alpha",
    ("save", "save_every"): "checkpointing_steps",
    ("save", "max_step_saves_to_keep"): "checkpoints_total_limit",
    ("sample", "sample_every"): "validation_steps",
    ("sample", "sample_steps"): "num_inference_steps",
}
# What says here by default what it says there, or is a part of what another field was translated to.
NOT_NEEDED = {
    ("train", "train_unet"),
    ("train", "noise_scheduler"),
    ("model", "is_flux"),
    ("model", "is_xl"),
    ("model", "is_v3"),
    ("model", "is_lumina2"),
    ("model", "arch"),
    ("train", "unload_text_encoder"),
    ("train", "cache_text_embeddings"),
    ("save", "save_format"),
    ("sample", "sampler"),
    ("sample", "sample_start_step"),
    ("network", "alpha"),
    ("network", "linear_alpha"),
    *(("sample", name) for name in ("width", "height", "prompts", "neg", "seed", "walk_seed", "guidance_scale")),
}
# `timestep_type` -> how noise levels are drawn; "shift" is the base's own schedule.
SAMPLINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {"timestep_sampling": "sigmoid"},
    "linear": {"timestep_sampling": "uniform"},
    "weighted": {"timestep_sampling": "uniform"},
    **dict.fromkeys(
        ("shift", "lumina2_shift", "flux_shift"), {"timestep_sampling": "sigma", "weighting_scheme": "none"}
    ),
}
UNLIKE = {
    "weighted": "it also weights the loss by a table; here no noise level weighs more",
    "flux_shift": "it shifts the levels by the image's size; here they are those of the base's own schedule",
}
LOSSES = {"mse": "l2", "mae": "l1"}
UNETS = ("sd1", "sd15", "sd2", "sdxl", "ssd", "vega")
TRAINERS = ("sd_trainer", "diffusion_trainer", "ui_trainer")
# Why something has no counterpart, where more is to be said than that.
REASONS = {
    ("model", "quantize"): "--quantization float8wo is closest to its qfloat8",
    ("model", "quantize_te"): "text encoders are freed once they have encoded",
    ("model", "low_vram"): "see --quantization and --gradient_checkpointing",
    ("train", "bypass_guidance_embedding"): "a model that takes guidance is given it, see --training_guidance_scale",
}
SECTIONS = ("network", "save", "train", "model", "sample")
OF_PROCESS = ("type", "datasets", "trigger_word", "training_folder", "embedding")  # read apart from the sections
ABOUT_RUNNING = ("device", "performance_log_every", "log_dir", "logging", "sqlite_db_path")  # not about what is trained
OF_EMBEDDING = {
    "trigger": "token_abstraction",
    "tokens": "num_new_tokens_per_abstraction",
    "init_words": "initializer_concept",
}
DATASET = (
    *("folder_path", "caption_ext", "resolution", "flip_x", "mask_path", "num_repeats"),
    *("shuffle_tokens", "keep_tokens", "token_dropout_rate"),
)
SHARED = ("caption_dropout_rate", "cache_latents_to_disk")


def process_of(content: Any) -> dict[str, Any] | None:
    """The training in a job; None if there is none."""
    config = content.get("config") if isinstance(content, dict) else None
    processes = config.get("process") if isinstance(config, dict) else None
    first = processes[0] if isinstance(processes, list) and processes else None
    return first if isinstance(first, dict) and isinstance(first.get("datasets"), list) else None


def is_job(content: Mapping[str, Any]) -> bool:
    """Return whether a file is a job of ai-toolkit, of whatever kind."""
    config = content.get("config")
    return "job" in content and isinstance(config, dict) and isinstance(config.get("process"), list)


def refused(content: Mapping[str, Any], source: str) -> Translation:
    """The answer to a job that trains nothing that is trained here."""
    kinds = [str(one.get("type")) for one in content["config"]["process"] if isinstance(one, dict)]
    out = Translation(source)
    out.problems.append(f"process: got type {', '.join(kinds) or 'none'}, wanted {', '.join(TRAINERS)}, with datasets")
    return out


def entries(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Concepts as `--concepts` holds them."""
    process, found = process_of(content) or {}, []
    for dataset in process.get("datasets", []):
        entry: dict[str, Any] = {
            "instance_data_dir": dataset.get("folder_path", ""),
            "caption_extension": "." + str(dataset.get("caption_ext", "txt")).removeprefix("."),
            "aspect_ratio_buckets": "auto",
        }
        entry |= {"mask_data_dir": dataset["mask_path"]} if dataset.get("mask_path") else {}
        entry |= {"repeats": dataset["num_repeats"]} if dataset.get("num_repeats") else {}
        entry |= {"shuffle_caption": True} if dataset.get("shuffle_tokens") else {}
        if rate := dataset.get("token_dropout_rate"):
            entry["caption_tag_dropout_rate"] = float(rate)
        if (dataset.get("shuffle_tokens") or rate) and dataset.get("keep_tokens"):
            entry["keep_tokens"] = dataset["keep_tokens"]
        entry |= {"random_flip": True} if dataset.get("flip_x") else {}
        entry |= {"caption_prefix": process["trigger_word"]} if process.get("trigger_word") else {}
        sides = dataset.get("resolution", 512)
        found += [entry | {"resolution": side} for side in (sides if isinstance(sides, list) else [sides])]
    return found


def is_flux(model: Mapping[str, Any]) -> bool:
    return bool(model.get("is_flux")) or model.get("arch") in ("flux", "flux_schnell")


def is_flow(process: Mapping[str, Any]) -> bool:
    """Return whether the model is a transformer, which is trained by flow matching."""
    model, train = process.get("model") or {}, process.get("train") or {}
    other = str(model.get("arch", UNETS[0])).partition(":")[0] not in UNETS
    return (
        is_flux(model)
        or bool(model.get("is_v3") or model.get("is_lumina2"))
        or other
        or train.get("noise_scheduler") == "flowmatch"
    )


def take_scale(out: Translation, process: Mapping[str, Any]) -> None:
    """Take alpha, which is that of linear layers, else `alpha`, else 1; for transformers the program ignores all of
    these, and has the rank in their place."""
    network = process.get("network") or {}
    given = [name for name in ("linear_alpha", "alpha") if not is_off(network.get(name))]
    if not is_flow(process):
        out.values["lora_alpha"] = network[given[0]] if given else 1.0
    elif rank := network.get("rank") or network.get("linear") or 4:
        out.values["lora_alpha"] = rank
        if given and network[given[0]] != rank:
            out.not_used[f"network, {given[0]}"] = f"its program takes the rank, {rank}, for alpha of this model"
    if given:
        out.names[f"network, {given[0]}"] = "--lora_alpha"
    else:
        out.assumed.append("lora_alpha")


def prompts(process: Mapping[str, Any]) -> Iterator[str]:
    """Lines as `--sample_prompts` reads them."""
    sample, trigger = process.get("sample") or {}, process.get("trigger_word") or ""
    letter = "g" if is_flux(process.get("model") or {}) else "l"
    for number, prompt in enumerate(sample.get("prompts") or []):
        seed = sample.get("seed")
        seed = None if seed is None else seed + number * bool(sample.get("walk_seed"))
        own = {"w": sample.get("width"), "h": sample.get("height"), "d": seed, letter: sample.get("guidance_scale")}
        own |= {"n": sample.get("neg") or None}
        switches = [f" --{switch} {value}" for switch, value in own.items() if value is not None]
        yield str(prompt).replace("[trigger]", trigger) + "".join(switches)


def translated(content: Mapping[str, Any], source: str, path: str) -> Translation:
    """Options here for a job; `path` is its file, whose datasets are the concepts."""
    process, out = process_of(content) or {}, Translation(source)
    name = str(content["config"].get("name", ""))
    out.take("datasets", concepts=path)
    if name:
        folder = process.get("training_folder", "output")
        out.take("name", output_dir=f"{folder}/{name}", export_name=name)
    for section in SECTIONS:
        for key, value in (process.get(section) or {}).items():
            translate_field(out, section, key, value)
    take_embedding(out, process.get("embedding"))
    for key, value in process.items():
        if key not in (*SECTIONS, *OF_PROCESS, *ABOUT_RUNNING) and not is_off(value):
            out.not_used[key] = "there is no such section here"
    if is_off(process.get("network")):
        out.problems.append("network: it has none, so that the whole model is trained; a LoRA is what is trained here")
    take_scale(out, process)
    if lines := list(prompts(process)):
        out.take("sample, prompts", sample_prompts="\n".join(lines))
    for dataset in process.get("datasets", []):
        for key, value in dataset.items():
            if key in SHARED and not is_off(value) and key == "caption_dropout_rate":
                out.take(f"datasets, {key}", caption_dropout_rate=value)
            elif key not in (*DATASET, *SHARED) and not is_off(value):
                out.not_used[f"datasets, {key}"] = "datasets have no such option here"
    if is_flux(process.get("model") or {}):
        out.assume(training_guidance_scale=1.0)
    if is_flow(process):
        out.assume(precondition_outputs=0, weighting_scheme="none")
        if "timestep_type" not in (process.get("train") or {}):
            out.assume(timestep_sampling="sigmoid")
    if out.values.get("timestep_sampling") == "sigma":
        out.of_families = {LUMINA_2: OfFamily(from_noise(FLOW_SHIFTS[LUMINA_2]))}
    out.assume(lr_warmup_steps=0, adam_weight_decay=0.01, center_crop=True, report_to="none")
    return out


def take_embedding(out: Translation, embedding: Any) -> None:
    """Take the section of a textual inversion, whose tokens are trained to the end."""
    if is_off(embedding) or not isinstance(embedding, dict):
        return
    out.take("embedding", train_text_encoder_ti=True, train_text_encoder_ti_frac=1.0)
    for key, value in embedding.items():
        if key in OF_EMBEDDING and not is_off(value):
            out.take(f"embedding, {key}", **{OF_EMBEDDING[key]: value})
        elif key == "save_format":
            out.not_needed.append(f"embedding, {key}")
        elif not is_off(value):
            out.not_used[f"embedding, {key}"] = f"got {value!r}; there is no such option here"


def translate_field(out: Translation, section: str, key: str, value: Any) -> None:
    """One field of a section."""
    where = f"{section}, {key}"
    if is_off(value):
        return
    if (section, key) in SAME:
        out.take(where, **{SAME[section, key]: value})
    elif (section, key) in NOT_NEEDED:
        out.not_needed.append(where)
    elif (section, key) == ("network", "type"):
        if value == "lora":
            out.not_needed.append(where)
        else:
            out.problems.append(f"{where}: {value} is no LoRA, which is what is trained here")
    elif (section, key) == ("save", "dtype") and value in DTYPES:
        out.take(where, save_precision=DTYPES[value])
    elif (section, key) == ("train", "dtype") and DTYPES.get(value) in PRECISIONS:
        out.take(where, mixed_precision=DTYPES[value])
    elif (section, key) == ("train", "optimizer_params") and isinstance(value, dict):
        for name, one in value.items():
            if name == "weight_decay":
                out.take(f"{where}, {name}", adam_weight_decay=one)
            else:
                out.not_used[f"{where}, {name}"] = f"got {one!r}; there is no such option here"
    elif (section, key) == ("train", "timestep_type") and value in SAMPLINGS:
        out.take(where, **SAMPLINGS[value])
        out.different |= {where: UNLIKE[value]} if value in UNLIKE else {}
    elif (section, key) == ("train", "loss_type") and value in LOSSES:
        out.take(where, loss_type=LOSSES[value])
    elif (section, key) == ("train", "content_or_style") and value == "balanced":
        out.not_needed.append(where)
    elif (section, key) == ("train", "ema_config") and isinstance(value, dict):
        if value.get("use_ema"):
            out.take(where, use_ema=True, ema_decay=value.get("ema_decay", 0.99))
    else:
        out.not_used[where] = f"got {value!r}; {REASONS.get((section, key), 'there is no such option here')}"
