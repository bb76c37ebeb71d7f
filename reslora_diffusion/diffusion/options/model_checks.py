"""Options that do not fit the model, whether its architecture was read from files or made by the libraries."""

import re
from collections.abc import Iterator
from typing import Any

from ...rules import faults
from ...utils.problems import listing
from ..models.architecture import BLOCKS, CONVOLUTION, LINEAR, Architecture, blocks_of, ends_of, matches, rank_of
from . import DreamBoothOptions
from .adapter import KOHYA

# What autoencoders of one family have in common, and what a configuration means that leaves it out.
LATENT_SPACE = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None}
PREDICTION_TYPES = ("epsilon", "v_prediction")
PATTERNS = ("rank_pattern", "alpha_pattern", "lr_pattern")
CHECKED_BEFORE = ("shortcut:", "merge_method:", "r:", "lora_dropout:")  # by `checks`, in the words of the options


def adapter_settings(options: DreamBoothOptions) -> dict[str, Any]:
    """Arguments of either method's configuration, targets apart. Options that were not given keep its own defaults."""
    settings: dict[str, Any] = {
        "r": options.rank,
        "lora_alpha": options.lora_alpha or options.rank,
        "lora_dropout": options.lora_dropout,
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
        "rank_pattern": dict(options.rank_pattern),
        "alpha_pattern": dict(options.alpha_pattern),
        "init_lora_weights": "gaussian",
    }
    if options.method == "lora":
        return settings | {"shortcut": "none"}
    settings |= {
        name: getattr(options, name) for name in ("shortcut", "merge_method") if getattr(options, name) is not None
    }
    if options.num_previous is not None:
        settings["num_previous"] = None if options.num_previous == "all" else options.num_previous
    return settings


def adapter_problems(options: DreamBoothOptions) -> Iterator[str]:
    """Problems with an adapter for whatever model."""
    yield from (f"--{fault}" for fault in faults(adapter_settings(options)) if not fault.startswith(CHECKED_BEFORE))
    for option in PATTERNS:
        for pattern in getattr(options, option):
            if fault := fault_of_pattern(pattern):
                yield f"--{option}: {pattern!r} is no regular expression: {fault}"


def fault_of_pattern(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


def model_problems(architecture: Architecture, options: DreamBoothOptions) -> Iterator[str]:
    """Problems of fit with this model."""
    sound = {
        name: {pattern: value for pattern, value in getattr(options, name).items() if not fault_of_pattern(pattern)}
        for name in PATTERNS
    }
    options = options.changed(**sound, rank=max(1, options.rank))
    name, family, config = options.pretrained_model_name_or_path, architecture.family, architecture.denoiser_config
    channels, latent_channels = family.latent_channels(config), family.vae_channels(architecture.vae)
    if channels != latent_channels:
        yield (
            f"{name}: the {family.denoiser} takes {channels} channels and latents have {latent_channels}; "
            "wanted a text-to-image model"
        )
    for key in LATENT_SPACE if architecture.other_vae else ():
        own, other = (vae.get(key, LATENT_SPACE[key]) for vae in (architecture.vae, architecture.other_vae or {}))
        if own != other:
            yield (
                f"--pretrained_vae_model_name_or_path: {options.pretrained_vae_model_name_or_path} has {key} {other}, "
                f"the {family.title} model {name} has {own}: it is of another family"
            )
    if architecture.prediction_type not in PREDICTION_TYPES:
        yield f"{name} predicts {architecture.prediction_type!r}, wanted {' or '.join(PREDICTION_TYPES)}"
    yield from prediction_problems(options, architecture.prediction_type)
    grid = architecture.grid
    if options.resolution % 8 == 0 and not grid.fits(
        options.resolution
    ):  # what is no multiple of 8 fits no model: `checks`
        yield f"--resolution: got {options.resolution}, wanted {grid} for this model"
    for option, reason in family.not_here.items():
        value = getattr(options, option)
        if value is not None and value is not False:
            yield f"--{option} does not apply to {family.title}: it {reason}"
    guided = "training_guidance_scale" if family.is_guided else "validation_guidance_scale"
    if options.guidance_scale not in (None, getattr(options, guided)):
        yield (
            f"--guidance_scale and --{guided} are the same for {family.title}; got {options.guidance_scale:g} and "
            f"{getattr(options, guided):g}"
        )
    if options.training_guidance_scale is not None and family.training_guidance(config, options) is None:
        yield (
            f"--training_guidance_scale: {name} takes no guidance as an input; wanted a model such as FLUX.1-dev. The "
            "guidance of validation images is --validation_guidance_scale"
        )
    if family.fixed_encoder and family.t5_length(options) > (most := family.most_tokens(config)):
        yield f"--max_sequence_length: got {family.t5_length(options)}, wanted at most {most}"
    if options.tokenizer_max_length and options.tokenizer_max_length > architecture.max_length:
        yield f"--tokenizer_max_length: got {options.tokenizer_max_length}, wanted at most {architecture.max_length}"
    for component, targets in architecture.targets(options).items():
        yield from target_problems(architecture, component, targets, options)
    yield from pattern_problems(architecture, options)
    yield from block_problems(architecture, options)


def prediction_problems(options: DreamBoothOptions, predicts: str) -> Iterator[str]:
    """Weights of the loss that are for models which predict something else."""
    if options.scale_v_pred_loss_like_noise_pred and predicts == "epsilon":
        yield "--scale_v_pred_loss_like_noise_pred is for models of v_prediction; this one predicts epsilon"
    if options.v_pred_like_loss and predicts == "v_prediction":
        yield "--v_pred_like_loss is for models of epsilon; this one predicts v_prediction"


def pattern_problems(architecture: Architecture, options: DreamBoothOptions) -> Iterator[str]:
    """Patterns of ranks, alphas and learning rates that no adapted layer matches."""
    names = [name for _, name, _ in architecture.adapted(options)]
    for option in PATTERNS:
        for pattern in getattr(options, option):
            if names and not any(matches(pattern, name) for name in names):
                yield (
                    f"--{option}: {pattern!r} matches no adapted layer to its name's end (as in PEFT; wanted "
                    f"{pattern + '.*'!r}?); they are called like {names[0]}"
                )


def block_problems(architecture: Architecture, options: DreamBoothOptions) -> Iterator[str]:
    """Blocks that the model does not have."""
    names = architecture.layers[architecture.family.denoiser]
    blocks = {int(name.split(".")[1]) for name in names if re.fullmatch(rf"{BLOCKS}\.\d+", name)}
    if absent := [block for block in blocks_of(options) if blocks and block not in blocks]:
        yield f"--lora_blocks: got {listing(absent)}, wanted blocks from 0 to {max(blocks)}"


def target_problems(
    architecture: Architecture, component: str, targets: list[str], options: DreamBoothOptions
) -> Iterator[str]:
    """Names that match nothing, layers that are no linear layers, and layers that are narrower than their rank."""
    layers = architecture.layers[component]
    for target in sorted(set(targets) - {end for name in layers for end in ends_of(name)}):
        leaves = sorted({name.rsplit(".", 1)[-1] for name, layer in layers.items() if layer.kind == LINEAR})
        yield f"target module {target!r} matches nothing in the {component}; it has {listing(leaves, 12)}"
    adapted = {name: layer for part, name, layer in architecture.adapted(options) if part == component}
    if odd := [f"{name} ({layer.kind})" for name, layer in adapted.items() if layer.kind not in (LINEAR, CONVOLUTION)]:
        yield f"target modules of the {component} that are neither linear layers nor convolutions: {listing(odd)}"
    narrow = [
        f"{name} {layer.shape} of rank {rank}"
        for name, layer in adapted.items()
        if layer.kind in (LINEAR, CONVOLUTION) and (rank := rank_of(options, name, layer)) > min(layer.sides)
    ]
    if narrow:
        yield f"--rank is larger than layers of the {component}: {listing(narrow)}"
    family = architecture.family
    if component == family.denoiser and KOHYA in (options.target_modules or ()) and not family.of_kohya:
        yield f"--target_modules {KOHYA}: the layers that kohya's scripts train of {family.title} are not known here"
