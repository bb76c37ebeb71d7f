"""What a run leaves: the plain factors, and the records beside them."""

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from reslora_diffusion import LoraFactors, merged_factors

from .options import ModelOptions
from .trainer import is_reslora

PACKAGES = ("accelerate", "peft", "reslora-diffusion", "tokenizers", "torch", "transformers")


def plain_factors(model: nn.Module) -> dict[str, LoraFactors]:
    """The factors to export, of either method; a ResLoRA must have been calibrated."""
    if is_reslora(model):
        return merged_factors(model)
    return {
        name: LoraFactors(
            layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), layer.scaling["default"]
        )
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "lora_A") and "default" in layer.lora_A
    }


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    fresh.replace(path)


def record(options: ModelOptions, training: TrainingArguments, **facts: Any) -> dict[str, Any]:
    """`run.json`: command, options, versions and what was found out before the first step."""
    secret = {"hub_token", "push_to_hub_token"}
    return {
        "command": sys.argv,
        "options": asdict(options),
        "training_arguments": {k: v for k, v in training.to_sanitized_dict().items() if k not in secret},
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        **facts,
    }


def history(trainer: Trainer) -> list[dict[str, float]]:
    """Losses and evaluations of all steps, also of those before a resumption."""
    return [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]


def trained_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def heads(model: nn.Module) -> dict[str, Tensor]:
    """Trained modules beside the adapter, by name in the base model: a classifier's head."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        for key, value in getattr(module, "modules_to_save", {}).items():
            if key == "default":
                found |= {f"{name}.{part}": tensor for part, tensor in value.state_dict().items()}
    return found
