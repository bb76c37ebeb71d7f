"""The record of a run: `run.json`, written before the first step."""

import json
import platform
import re
import secrets
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..environment import without_secrets
from ..utils.files import write_text
from .checkpoints import stored_facts
from .options import build_parser

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

FILE = "run.json"
PACKAGES = ("accelerate", "diffusers", "peft", "reslora-diffusion", "torch", "transformers")
SECRET = ("hub_token",)
PATTERNS = ("rank_pattern", "alpha_pattern", "lr_pattern", "optimizer_args")
# What a checkpoint depends on: a run that continues from one must agree on these.
BINDING = (
    "pretrained_model_name_or_path seed method shortcut num_previous handover rank lora_alpha use_rslora lora_dropout "
    "target_modules lora_blocks train_text_encoder text_encoder_target_modules rank_pattern alpha_pattern "
    "train_batch_size gradient_accumulation_steps instance_prompt class_prompt with_prior_preservation "
    "prior_loss_weight resolution aspect_ratio_buckets snr_gamma debiased_estimation_loss loss_type huber_c "
    "huber_schedule noise_offset weighting_scheme logit_mean logit_std mode_scale precondition_outputs "
    "max_sequence_length skip_t5 clip_skip training_guidance_scale caption_dropout_rate prediction_type "
    "rescale_betas_zero_snr random_flip center_crop crops_per_image repeats caption_extension shuffle_caption "
    "keep_tokens validation_split mask_data_dir alpha_mask optimizer use_8bit_adam use_ema ema_decay"
).split()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that was not installed
            found[package] = "not installed"
    return found


def options(args: Namespace) -> dict[str, Any]:
    """Every option as it was resolved, in JSON's types; can be given back by `--config`."""
    hidden = (*SECRET, "unknown", "config", "dry_run", "local_rank")
    values = {name: value for name, value in vars(args).items() if name not in hidden}
    values |= {name: dict(values[name]) for name in PATTERNS}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def trackable(args: Namespace) -> dict[str, Any]:
    """Options as trackers take them."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in options(args).items()}


def resolve_seed(args: Namespace, checkpoint: Path | None, accelerator: "Accelerator | PartialState") -> int:
    """The seed given, else the checkpoint's, else one drawn for all processes."""
    if args.seed is not None:
        return args.seed
    if checkpoint is not None:
        return stored_facts(checkpoint)["options"]["seed"]
    from accelerate.utils import broadcast_object_list

    drawn = [secrets.randbelow(2**32)]
    return broadcast_object_list(drawn)[0] if accelerator.num_processes > 1 else drawn[0]


def write_record(args: Namespace, facts: dict[str, Any]) -> None:
    """Write `run.json`: command, options, versions and what the caller found out."""
    record = {"command": without_secrets(sys.argv), "options": options(args), "versions": versions(), **facts}
    write_text(Path(args.output_dir) / FILE, json.dumps(record, indent=2))


def differences(args: Namespace, checkpoint: Path) -> Iterator[str]:
    """In what a checkpoint belongs to another configuration. A seed that is not given is the checkpoint's."""
    own, stored, parser = options(args), stored_facts(checkpoint)["options"], build_parser()
    for name in BINDING:
        was = stored.get(name, parser.get_default(name))  # the default, if the checkpoint is older than the option
        if was != own[name] and not (name == "seed" and args.seed is None):
            yield f"{checkpoint} was trained with --{name} {was!r}, got {own[name]!r}; wanted the same"


def export_name(args: Namespace) -> str:
    """What the adapter is called in a prompt of ComfyUI or A1111: as given, else as the output folder."""
    folder = re.sub(r"[^A-Za-z0-9._+-]+", "-", Path(args.output_dir).resolve().name)
    return args.export_name or folder.strip("-_.+") or "lora"
