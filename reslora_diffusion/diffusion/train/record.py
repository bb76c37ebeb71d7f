"""The record of a run: `run.json`, written before the first step."""

import json
import platform
import secrets
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...rules import ShortcutFields
from ...utils.environment import without_secrets
from ...utils.files import write_text
from ...utils.names import composed, file_name_from
from ...utils.versions import installed_version
from ..options import BINDING, DreamBoothOptions, stored_options
from ..options.training import TrainingOptions
from .checkpoints import stored_facts

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

FILE = "run.json"
LENGTH = ("max_train_steps", "num_train_epochs")
PACKAGES = ("accelerate", "diffusers", "peft", "reslora-diffusion", "torch", "transformers")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {package: installed_version(package) for package in PACKAGES}


def trackable(options: DreamBoothOptions) -> dict[str, Any]:
    """Options as trackers take them."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in options.recorded().items()}


def resolve_seed(options: DreamBoothOptions, checkpoint: Path | None, accelerator: "Accelerator | PartialState") -> int:
    """The seed given, else the checkpoint's, else one drawn for all processes."""
    if options.seed is not None:
        return options.seed
    if checkpoint is not None:
        return stored_facts(checkpoint).get("options", {}).get("seed", 0)
    from accelerate.utils import broadcast_object_list

    drawn = [secrets.randbelow(2**32)]
    return broadcast_object_list(drawn)[0] if accelerator.num_processes > 1 else drawn[0]


def write_record(options: DreamBoothOptions, facts: dict[str, Any]) -> None:
    """Write `run.json`: command, options, versions and what the caller found out."""
    record = {"command": without_secrets(sys.argv), "options": options.recorded(), "versions": versions(), **facts}
    write_text(Path(options.output_dir) / FILE, json.dumps(record, indent=2))


def differences(options: DreamBoothOptions, checkpoint: Path) -> Iterator[str]:
    """Options in which a checkpoint differs from this configuration. A seed that is not given is the checkpoint's."""
    stored = stored_options(stored_facts(checkpoint).get("options", {}))
    for name in BINDING:
        was, own = getattr(stored, name), getattr(options, name)
        if name == "lora_alpha":  # not given, it is the rank
            was, own = was or float(stored.rank), own or float(options.rank)
        if name == "shortcut" and options.method == "reslora":
            own = own or str(ShortcutFields.shortcut)
        if was != own and not (name == "seed" and options.seed is None):
            yield f"{checkpoint} was trained with --{name} {was!r}, got {own!r}; wanted the same"


def changes(options: DreamBoothOptions, checkpoint: Path) -> Iterator[tuple[str, Any, Any]]:
    """Options of training that may differ from a checkpoint's, and do: name, the checkpoint's value, ours."""
    stored = stored_options(stored_facts(checkpoint).get("options", {}))
    for item in fields(TrainingOptions):
        was, own = getattr(stored, item.name), getattr(options, item.name)
        if item.name not in BINDING and item.name not in LENGTH and was != own:
            yield item.name, was, own


def export_name(options: DreamBoothOptions) -> str:
    """Return the adapter's name in a prompt of ComfyUI or A1111: the given one, else that of the output folder."""
    return (
        composed(options.export_name)
        if options.export_name
        else file_name_from(Path(options.output_dir).resolve().name)
    )
