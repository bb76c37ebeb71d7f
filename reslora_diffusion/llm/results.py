"""A run leaves the plain factors, and records beside them."""

import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel, TaskType
from torch import nn
from transformers import Trainer, TrainingArguments

from reslora_diffusion import LoraFactors, explain, merged_factors
from reslora_diffusion.core.merging.factors import factors_of
from reslora_diffusion.export import export_peft
from reslora_diffusion.export.beside import trained_beside

from ..utils.environment import without_secrets
from ..utils.files import write_text
from ..utils.problems import say
from ..utils.versions import installed_version
from .adapter_trainer import AdapterTrainer, is_reslora
from .models import DTYPES
from .options import ModelOptions
from .preflight import preflight
from .trainer import ExportedTrainer, restore_exported_factors, shortcut_of

WEIGHTS, CONFIG, PROOF = "adapter_model.safetensors", "adapter_config.json", "export_report.json"
PACKAGES = ("accelerate", "peft", "reslora-diffusion", "tokenizers", "torch", "transformers")


def exported_factors(model: PeftModel) -> dict[str, LoraFactors]:
    """The factors to export, of either method; a ResLoRA must have been calibrated."""
    if is_reslora(model):
        return merged_factors(model)
    return {
        name: factors_of(layer, "default")
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "lora_A") and "default" in layer.lora_A
    }


def write_json(path: Path, facts: Mapping[str, Any] | Sequence[Any]) -> None:
    write_text(path, json.dumps(facts, indent=2, default=str) + "\n")


def record(options: ModelOptions, training: TrainingArguments, **facts: Any) -> dict[str, Any]:
    """`run.json`: command, options, versions and what was found out before the first step."""
    settings = training.to_sanitized_dict()
    return {
        "command": without_secrets(sys.argv),
        "options": asdict(options),
        "training_arguments": {name: value for name, value in settings.items() if not name.endswith("token")},
        "versions": {"python": platform.python_version()}
        | {package: installed_version(package) for package in PACKAGES},
        **facts,
    }


def history(trainer: Trainer) -> list[dict[str, float]]:
    """Losses and evaluations of all steps, also of those before a resumption."""
    return [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]


def final(logged: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the last tenth of the logged steps: what TRL's trainers find out while they train."""
    rows = logged[-max(1, len(logged) // 10) :]
    return {
        name: sum(row[name] for row in rows) / len(rows)
        for name, value in (rows[-1] if rows else {}).items()
        if isinstance(value, int | float) and name not in ("epoch", "step") and all(name in row for row in rows)
    }


def kind_of(parameter: nn.Parameter) -> str:
    """The precision that a parameter is held in, also by the parts that DeepSpeed ZeRO-3 has made of it."""
    return str(getattr(parameter, "ds_tensor", parameter).dtype).removeprefix("torch.")


def start_record(trainer: AdapterTrainer, options: ModelOptions, **facts: Any) -> None:
    """Write `run.json`, and show what is going to be trained."""
    if not trainer.is_world_process_zero():
        return
    model, output = trainer.adapted, trainer.output_folder
    facts["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts["held_in"] = {
        name: ", ".join(sorted({kind_of(p) for p in model.parameters() if p.requires_grad == trained}))
        for name, trained in (("frozen", False), ("trained", True))
    }
    facts["processes"] = f"{trainer.accelerator.num_processes}, {trainer.accelerator.distributed_type}"
    chains = explain(model) if is_reslora(model) else None
    facts["chains"] = None if chains is None else chains.to_dict()
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "run.json", record(options, trainer.args, **facts))
    if chains is not None:
        print(chains)
    say(preflight(trainer, options, facts["trained_parameters"]))


def export(trainer: ExportedTrainer, options: ModelOptions, task_type: TaskType) -> None:
    """Write the plain LoRA and prove it; after `--schedule prune`, the smaller model. The first process writes what all
    have put together.

    Raises:
        ValueError: it cannot be exported, as what has learned nothing yet; or it failed its proof.
    """
    if trainer.schedule is not None and not trainer.schedule.leaves_lora:
        from .pruning import export_pruned

        export_pruned(trainer, trainer.output_folder)
        return
    export_lora(trainer, options, task_type)


def export_lora(trainer: Trainer, options: ModelOptions, task_type: TaskType) -> None:
    """Write the plain LoRA of any trainer's model and prove it; raises as `export` does."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    restore_exported_factors(model)
    factors = exported_factors(model)
    if (schedule := getattr(trainer, "schedule", None)) is not None:
        factors = schedule.exported(factors)
    beside = trained_beside(model, base_model=options.model_name_or_path)
    with together(trainer):
        if trainer.is_world_process_zero():
            report = export_peft(
                str(trainer.args.output_dir),
                factors,
                base_model=options.model_name_or_path,
                task_type=task_type.value,
                dtype=DTYPES[options.export_dtype],
                facts={"method": options.method, "shortcut": shortcut_of(model)},
                model=model,
                beside=beside,
            )
            print(report)


@contextmanager
def together(trainer: Trainer) -> Iterator[None]:
    """Inside, the first process works for all. If it fails, all fail with its message: none waits for it in vain, which
    would end in a traceback of the connection."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    shared = broadcast_object_list([None if failure is None else str(failure)])[0]
    if failure is not None:
        raise failure
    if shared is not None:
        raise ValueError(shared)
