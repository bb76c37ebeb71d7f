"""What a run leaves: the plain factors, and the records beside them."""

import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import TaskType
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from reslora_diffusion import LoraFactors, explain, merged_factors
from reslora_diffusion.core.sharding import whole
from reslora_diffusion.export import ExportReport, export_peft
from reslora_diffusion.export.writer import save_tensors

from ..environment import without_secrets
from ..utils.files import replace_files, write_text
from .models import DTYPES
from .options import ModelOptions
from .preflight import preflight
from .trainer import ExportedTrainer, is_reslora, recall_factors, shortcut_of

WEIGHTS, CONFIG, PROOF = "adapter_model.safetensors", "adapter_config.json", "export_report.json"
PACKAGES = ("accelerate", "peft", "reslora-diffusion", "tokenizers", "torch", "transformers")


def plain_factors(model: nn.Module) -> dict[str, LoraFactors]:
    """The factors to export, of either method; a ResLoRA must have been calibrated."""
    if is_reslora(model):
        return merged_factors(model)
    return {
        name: LoraFactors(
            whole(layer.lora_A["default"].weight).detach(),
            whole(layer.lora_B["default"].weight).detach(),
            layer.scaling["default"],
        )
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "lora_A") and "default" in layer.lora_A
    }


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(facts, indent=2, default=str) + "\n")


def record(options: ModelOptions, training: TrainingArguments, **facts: Any) -> dict[str, Any]:
    """`run.json`: command, options, versions and what was found out before the first step."""
    settings = training.to_sanitized_dict()
    return {
        "command": without_secrets(sys.argv),
        "options": asdict(options),
        "training_arguments": {name: value for name, value in settings.items() if not name.endswith("token")},
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        **facts,
    }


def history(trainer: Trainer) -> list[dict[str, float]]:
    """Losses and evaluations of all steps, also of those before a resumption."""
    return [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]


def heads(model: nn.Module) -> dict[str, Tensor]:
    """Trained modules beside the adapter, by name in the base model: a classifier's head."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        for key, value in getattr(module, "modules_to_save", {}).items():
            if key == "default":
                found |= {f"{name}.{part}": whole(tensor) for part, tensor in value.state_dict().items()}
    return found


def start_record(trainer: ExportedTrainer, options: ModelOptions, **facts: Any) -> None:
    """Write `run.json`, and show what is going to be trained."""
    if not trainer.is_world_process_zero():
        return
    model, output = trainer.model, Path(trainer.args.output_dir)
    facts["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts["processes"] = f"{trainer.accelerator.num_processes}, {trainer.accelerator.distributed_type}"
    chains = explain(model) if is_reslora(model) else None
    facts["chains"] = None if chains is None else chains.to_dict()
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "run.json", record(options, trainer.args, **facts))
    if chains is not None:
        print(chains)
    for line in (*preflight(trainer, options, facts["trained_parameters"]), *facts.get("notes", ())):
        print(line)


def export(trainer: ExportedTrainer, options: ModelOptions, task_type: TaskType) -> None:
    """Write the plain LoRA and prove it. The first process writes what all have put together."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    recall_factors(model)
    factors, trained = plain_factors(model), heads(model)
    if trainer.is_world_process_zero():
        write = partial(export_with_heads, trained=trained) if trained else export_peft
        report = write(
            Path(trainer.args.output_dir),
            factors,
            base_model=options.model_name_or_path,
            task_type=task_type.value,
            dtype=DTYPES[options.export_dtype],
            facts={"method": options.method, "shortcut": shortcut_of(model)},
            model=model,
        )
        print(report)
    trainer.accelerator.wait_for_everyone()


def export_with_heads(
    output: Path, factors: Mapping[str, LoraFactors], *, trained: Mapping[str, Tensor], **settings: Any
) -> ExportReport:
    """`export_peft`, and in the same file the modules that were trained beside the adapter, in their own precision:
    `PeftModel.from_pretrained` finds them by the configuration's `modules_to_save`."""
    output.mkdir(parents=True, exist_ok=True)
    fresh = output / ".with-heads"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        report = export_peft(fresh, factors, **settings)
        tensors = load_file(fresh / WEIGHTS)
        tensors |= {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in trained.items()}
        with safe_open(fresh / WEIGHTS, framework="pt") as file:
            header = file.metadata()
        save_tensors(tensors, fresh / WEIGHTS, metadata=header)
        config = json.loads((fresh / CONFIG).read_text())
        config["modules_to_save"] = sorted({name.partition(".")[0] for name in trained})
        write_json(fresh / CONFIG, config)
        proof = json.loads((fresh / PROOF).read_text())
        for kind, path in (("peft", WEIGHTS), ("config", CONFIG)):
            digest = hashlib.sha256((fresh / path).read_bytes()).hexdigest()
            proof["files"][kind] = {"path": str(output / path), "sha256": digest}
        write_json(fresh / PROOF, proof)
        replace_files(fresh, output, (WEIGHTS, CONFIG, PROOF))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    files = {"peft": output / WEIGHTS, "config": output / CONFIG}
    return replace(report, files=files, sha256={kind: facts["sha256"] for kind, facts in proof["files"].items()})
