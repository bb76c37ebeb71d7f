"""`--schedule prune` for language models: what is checked before weights are read, and the smaller model at the end.

<output_dir>/pruned/                the smaller model with its tokenizer, as plain transformers loads it
<output_dir>/pruning_report.json    sizes and losses before and after, heads and channels left in each block
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import TaskType
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedConfig

from ..methods.pruning import find_structures, save_pruned
from ..methods.pruning.structures import chosen
from ..methods.schedules import Prune
from ..methods.schedules.settings import PruneSettings
from ..utils.files import write_text
from ..utils.problems import BadInput
from .methods import settings_of
from .models import AUTO
from .options import ModelOptions
from .trainer import ExportedTrainer, Inputs, batches_of, run_model

FOLDER, REPORT = "pruned", "pruning_report.json"


def pruning_problems(config: PreTrainedConfig, options: ModelOptions, task_type: TaskType) -> Iterator[str]:
    """Return why this model cannot be pruned as asked; nothing without `--schedule prune`."""
    try:
        settings = settings_of(options)
    except BadInput:
        return
    if not isinstance(settings, PruneSettings):
        return
    with torch.device("meta"):
        model = AUTO[task_type].from_config(config)
    structures = find_structures(model)
    targets = options.target_modules or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(config.model_type, [])
    layers = {name for structure in structures for name in structure.layers}
    adapted = {n for n in layers if targets == ["all-linear"] or any(f".{n}".endswith(f".{t}") for t in targets)}
    picked = chosen(structures, settings.parts, settings.spare)
    for problem in settings.structure_problems(structures, picked, adapted):
        yield f"--schedule: prune: {problem}"


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Inputs]) -> float:
    model.eval()
    return sum(run_model(model, batch).loss.item() for batch in batches) / len(batches)


def export_pruned(trainer: ExportedTrainer, folder: Path) -> None:
    """Cut the model down, write it into `folder`, and report what that has cost on the validation rows."""
    schedule, model = trainer.schedule, trainer.adapted
    assert isinstance(schedule, Prune), "who calls this has asked"
    collate = cast(Callable[[Sequence[Any]], Inputs], trainer.data_collator)
    held_out = cast(Sequence[Any], trainer.eval_dataset)
    batches = batches_of(held_out, collate, trainer.args.per_device_eval_batch_size)
    with schedule.unmasked(), model.disable_adapter():
        losses = {"loss_base": mean_loss(model, batches)}
    losses["loss_masked"] = mean_loss(model, batches)
    slim, slimmed = schedule.slim()
    losses["loss_pruned"] = mean_loss(slim, batches)
    if trainer.is_world_process_zero():
        save_pruned(slim, slimmed, folder / FOLDER)
        cast(Any, trainer.processing_class).save_pretrained(folder / FOLDER)
        facts = {"schedule": str(schedule.settings), **losses, **slimmed.to_dict()}
        write_text(folder / REPORT, json.dumps(facts, indent=2) + "\n")
        before, after = slimmed.parameters
        print(
            f"{folder / FOLDER}: {after:,} of {before:,} parameters; loss on validation rows "
            f"{losses['loss_pruned']:.4f}, of the base {losses['loss_base']:.4f}"
        )
    trainer.accelerator.wait_for_everyone()
