"""A pipeline without its weights: components on the meta device, made from their configurations.

It answers what can be wrong with a run before gigabytes are loaded: which family this is, whether every target module
matches something, whether a rank fits, what grid the resolution must be on, and what the parts weigh. Of a model on the
hub only the configuration files are fetched.
"""

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ModelMixin
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Tokenizer,
)

from reslora_diffusion.core.config import ResLoraConfig

from ..problems import BadInput, listing
from .buckets import Grid
from .families import FAMILIES, Family
from .families.base import t5_length

# What autoencoders of one family have in common, and what a configuration means that leaves it out.
LATENT_SPACE = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None}
CHECKED_BEFORE = ("shortcut:", "merge_method:", "r:", "lora_dropout:")  # by `checks`, in the words of the options
PREDICTION_TYPES = ("epsilon", "v_prediction")
TOKENIZERS = {
    f"{name}{fast}": kind
    for name, kind in (("CLIPTokenizer", CLIPTokenizer), ("T5Tokenizer", T5Tokenizer))
    for fast in ("", "Fast")
}
TEXT_ENCODERS = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection)}


@dataclass(frozen=True)
class Skeleton:
    """Components by name, and what configurations say of the rest."""

    family: Family
    denoiser: ModelMixin
    text_encoders: dict[str, nn.Module]
    windows: list[tuple[PreTrainedTokenizerBase, int]]  # and how many tokens of a prompt its encoder is given
    vae: Mapping[str, Any]
    other_vae: Mapping[str, Any] | None
    prediction_type: str
    max_length: int

    @property
    def vae_scale_factor(self) -> int:
        """Pixels to a latent."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def grid(self) -> Grid:
        return self.family.grid(self.denoiser.config, self.vae_scale_factor)

    def adapted(self, args: Namespace) -> dict[str, tuple[nn.Module, LoraConfig]]:
        """Component and adapter configuration, for each component that is trained; raises `ValueError`."""
        targets = {self.family.denoiser: (self.denoiser, args.target_modules or [*self.family.target_modules])}
        if args.train_text_encoder:
            targets |= {name: (model, args.text_encoder_target_modules) for name, model in self.text_encoders.items()}
        return {name: (model, lora_config(args, names)) for name, (model, names) in targets.items()}

    def adapter_size(self, args: Namespace) -> int:
        """How many parameters are trained."""
        return sum(
            rank_of(config, name) * sum(module.weight.shape)
            for model, config in self.adapted(args).values()
            for name, module in model.named_modules()
            if name and check_target_module_exists(config, name)
        )


def load_skeleton(args: Namespace) -> Skeleton:
    """Read the configurations of `--pretrained_model_name_or_path`.

    Raises:
        BadInput: they cannot be read, or are not of a family that is trained here.
    """
    name, where = args.pretrained_model_name_or_path, {"revision": args.revision}
    try:
        index = DiffusionPipeline.load_config(name, **where)
        kind = index.get("_class_name")
        if kind not in FAMILIES:
            wanted = ", ".join(f"{family.title} ({kind})" for kind, family in FAMILIES.items())
            raise BadInput([f"--pretrained_model_name_or_path: {name} is a {kind}; wanted {wanted}"])
        family = FAMILIES[kind]
        kind, part = family.denoiser_class, family.denoiser
        with torch.device("meta"):
            denoiser = kind.from_config(kind.load_config(name, subfolder=part, **where))
            configs = {
                part: CLIPTextConfig.from_pretrained(name, subfolder=part, **where) for part in family.text_encoders
            }
            encoders = {part: TEXT_ENCODERS[index[part][1]](config) for part, config in configs.items()}
        tokenizers = [
            TOKENIZERS[index[part][1]].from_pretrained(name, subfolder=part, **where) for part in family.tokenizers
        ]
        if args.tokenizer_name:
            tokenizers[0] = AutoTokenizer.from_pretrained(args.tokenizer_name, **where)
        windows = [(tokenizer, args.tokenizer_max_length or tokenizer.model_max_length) for tokenizer in tokenizers]
        part = family.fixed_tokenizer
        if part and index[part][1] and not args.skip_t5:
            fixed = TOKENIZERS[index[part][1]].from_pretrained(name, subfolder=part, **where)
            windows.append((fixed, t5_length(args)))
        vae = AutoencoderKL.load_config(name, subfolder="vae", **where)
        other = args.pretrained_vae_model_name_or_path
        other_vae = AutoencoderKL.load_config(other) if other else None
        scheduler = DDPMScheduler.load_config(name, subfolder="scheduler", **where)
    except (OSError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, BadInput):
            raise
        reason = f"lacks {error}" if isinstance(error, KeyError) else first_sentence(error)
        raise BadInput([f"--pretrained_model_name_or_path: {name} cannot be loaded: {reason}"]) from error
    return Skeleton(
        family,
        denoiser,
        encoders,
        windows,
        vae,
        other_vae,
        prediction_type=args.prediction_type or scheduler.get("prediction_type", "epsilon"),
        max_length=min(config.max_position_embeddings for config in configs.values()),
    )


def first_sentence(error: Exception) -> str:
    return (
        re.split(r"(?<=[.!])\s", str(error).strip().splitlines()[0])[0] if str(error).strip() else type(error).__name__
    )


def lora_config(args: Namespace, target_modules: list[str]) -> ResLoraConfig:
    """The configuration of either method. Options that were not given keep the configuration's own defaults."""
    common: dict[str, Any] = {
        "r": args.rank,
        "lora_alpha": args.lora_alpha or args.rank,
        "lora_dropout": args.lora_dropout,
        "use_rslora": args.use_rslora,
        "rank_pattern": dict(args.rank_pattern),
        "alpha_pattern": dict(args.alpha_pattern),
        "init_lora_weights": "gaussian",
        "target_modules": target_modules,
    }
    if args.method == "lora":
        return ResLoraConfig(**common, shortcut="none")
    given = {name: getattr(args, name) for name in ("shortcut", "merge_method") if getattr(args, name) is not None}
    if args.num_previous is not None:
        given["num_previous"] = None if args.num_previous == "all" else args.num_previous
    return ResLoraConfig(**common, **given)


def skeleton_problems(skeleton: Skeleton, args: Namespace) -> Iterator[str]:
    """What does not fit this model."""
    name, channels = args.pretrained_model_name_or_path, skeleton.denoiser.config.in_channels
    latent_channels = skeleton.vae["latent_channels"]
    if channels != latent_channels:
        yield (
            f"{name}: the {skeleton.family.denoiser} takes {channels} channels and latents have {latent_channels}; "
            "wanted a text-to-image model"
        )
    for key in LATENT_SPACE if skeleton.other_vae else ():
        own, other = (vae.get(key, LATENT_SPACE[key]) for vae in (skeleton.vae, skeleton.other_vae))
        if own != other:
            yield (
                f"--pretrained_vae_model_name_or_path: {args.pretrained_vae_model_name_or_path} has {key} {other}, "
                f"the {skeleton.family.title} model {name} has {own}: it is of another family"
            )
    if skeleton.prediction_type not in PREDICTION_TYPES:
        yield f"{name} predicts {skeleton.prediction_type!r}, wanted {' or '.join(PREDICTION_TYPES)}"
    grid = skeleton.grid
    if args.resolution % 8 == 0 and not grid.fits(args.resolution):  # what is no multiple of 8 fits no model: `checks`
        yield f"--resolution: got {args.resolution}, wanted {grid} for this model"
    for option, reason in skeleton.family.not_here.items():
        value = getattr(args, option)
        if value is not None and value is not False:
            yield f"--{option} does not apply to {skeleton.family.title}: it {reason}"
    if args.tokenizer_max_length and args.tokenizer_max_length > skeleton.max_length:
        yield f"--tokenizer_max_length: got {args.tokenizer_max_length}, wanted at most {skeleton.max_length}"
    valid = {"method": "lora", "rank": max(1, args.rank), "lora_dropout": 0.0}
    ranks = [(pattern, max(1, rank)) for pattern, rank in args.rank_pattern]
    plain = Namespace(**vars(args) | valid | {"rank_pattern": ranks})
    adapted = skeleton.adapted(plain)
    for component, (model, config) in adapted.items():
        yield from target_problems(model, component, config)
    yield from pattern_problems(adapted, args)
    try:
        skeleton.adapted(args)
    except ValueError as error:
        faults = [line.removeprefix("  - ") for line in str(error).splitlines() if line.startswith("  - ")]
        yield from (fault for fault in faults if not fault.startswith(CHECKED_BEFORE))


def matches(pattern: str, name: str) -> bool:
    """As PEFT matches the patterns of ranks and alphas."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def pattern_problems(adapted: dict[str, tuple[nn.Module, LoraConfig]], args: Namespace) -> Iterator[str]:
    """Patterns of ranks, alphas and learning rates that no adapted layer matches."""
    names = [
        name
        for model, config in adapted.values()
        for name, _ in model.named_modules()
        if name and check_target_module_exists(config, name)
    ]
    for option in ("rank_pattern", "alpha_pattern", "lr_pattern"):
        for pattern, _ in getattr(args, option):
            if names and not any(matches(pattern, name) for name in names):
                yield (
                    f"--{option}: {pattern!r} matches no adapted layer to its name's end (as in PEFT; wanted "
                    f"{pattern + '.*'!r}?); they are called like {names[0]}"
                )


def rank_of(config: LoraConfig, name: str) -> int:
    return next((rank for pattern, rank in config.rank_pattern.items() if matches(pattern, name)), config.r)


def target_problems(model: nn.Module, component: str, config: LoraConfig) -> Iterator[str]:
    """Names that match nothing, layers that are no linear layers, and layers that are narrower than their rank."""
    layers = {name: module for name, module in model.named_modules() if name}
    for target in sorted(config.target_modules):
        if not any(check_target_module_exists(LoraConfig(target_modules=[target]), name) for name in layers):
            leaves = sorted({name.rsplit(".", 1)[-1] for name, m in layers.items() if isinstance(m, nn.Linear)})
            yield f"target module {target!r} matches nothing in the {component}; it has {listing(leaves, 12)}"
    adapted = {name: module for name, module in layers.items() if check_target_module_exists(config, name)}
    if odd := [f"{name} ({type(m).__name__})" for name, m in adapted.items() if not isinstance(m, nn.Linear)]:
        yield f"target modules of the {component} that are no linear layers: {listing(odd)}"
    narrow = []
    for name, module in adapted.items():
        rank = rank_of(config, name)
        if isinstance(module, nn.Linear) and rank > min(module.weight.shape):
            narrow.append(f"{name} {tuple(module.weight.shape)} of rank {rank}")
    if narrow:
        yield f"--rank is larger than layers of the {component}: {listing(narrow)}"
