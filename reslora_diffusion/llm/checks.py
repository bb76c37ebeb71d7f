"""Whether training arguments and checkpoints fit the adapter."""

import json
from collections.abc import Iterator
from pathlib import Path

from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint

from reslora_diffusion import ResLoraConfig

from ..problems import refuse
from .options import ModelOptions


def training_problems(training: TrainingArguments, options: ModelOptions) -> list[str]:
    """Training arguments that cannot work with the adapter."""
    problems = []
    kwargs = getattr(training, "activation_checkpointing_kwargs", None) or training.gradient_checkpointing_kwargs or {}
    shortcut = options.shortcut or str(ResLoraConfig.shortcut)
    if options.method == "reslora" and shortcut in ("input", "middle") and kwargs.get("use_reentrant"):
        problems.append(
            "--gradient_checkpointing_kwargs: got use_reentrant=true, which cuts the links of shortcut "
            f"{shortcut!r} out of the gradient; wanted use_reentrant=false, or --shortcut block"
        )
    if options.handover_at is not None:
        if options.method == "lora" or shortcut not in ("input", "middle"):
            problems.append("--handover_at: does nothing here; only shortcuts input and middle have something to fold")
        if not 0 < options.handover_at < 1:
            problems.append(f"--handover_at: got {options.handover_at}, wanted a share of the steps between 0 and 1")
    if getattr(options, "save_merged_model", False) and is_deepspeed_zero3_enabled():
        problems.append("--save_merged_model: not under DeepSpeed ZeRO-3; merge the exported folder with PEFT instead")
    if options.distillation_steps is not None and options.method == "reslora":
        problems += distillation_problems(options, shortcut)
    output = Path(training.output_dir)
    if training.resume_from_checkpoint is None and output.is_dir():
        if get_last_checkpoint(str(output)):
            problems.append(
                f"--output_dir {output}: holds checkpoints of an earlier run; wanted --resume_from_checkpoint latest, "
                "or another folder"
            )
        elif (output / "adapter_model.safetensors").exists():
            problems.append(f"--output_dir {output}: holds an adapter already; wanted another folder")
    elif output.exists() and not output.is_dir():
        problems.append(f"--output_dir {output}: is a file, wanted a folder")
    return problems


def distillation_problems(options: ModelOptions, shortcut: str) -> Iterator[str]:
    name = "--distillation_steps"
    if options.distillation_steps < 1 or options.calibration_examples < 2:
        got = f"{options.distillation_steps} and --calibration_examples {options.calibration_examples}"
        yield f"{name}: got {got}, wanted 1 step or more, and 2 examples, one of which is held out"
    if shortcut not in ("input", "middle") or options.handover_at is not None:
        yield f"{name}: does nothing here; block, none and what --handover_at folds are exported as trained"
    if options.merge_method in ("drop", "paper_weight"):
        yield f"{name}: refines what was fitted on data; got --merge_method {options.merge_method}"
    if is_deepspeed_zero3_enabled():
        yield f"{name}: does not run with DeepSpeed ZeRO-3, which takes the weights away between forward and backward"


def checkpoint_of(training: TrainingArguments, options: ModelOptions) -> str | None:
    """The checkpoint to go on from, by `--resume_from_checkpoint latest` or a path.

    Raises:
        BadInput: there is none, or it is of another adapter.
    """
    wanted = training.resume_from_checkpoint
    if wanted is None:
        return None
    output = Path(training.output_dir)
    found = get_last_checkpoint(str(output)) if wanted == "latest" and output.is_dir() else wanted
    if found is None or not Path(found, "trainer_state.json").is_file():
        refuse([f"--resume_from_checkpoint {wanted}: no checkpoint there; --output_dir is {output}"])
    stored = json.loads(Path(found, "adapter_config.json").read_text())
    own = {"peft_type": "RESLORA" if options.method == "reslora" else "LORA", "r": options.rank}
    if options.shortcut and stored.get("shortcut") != "none":  # none: saved after a handover
        own["shortcut"] = options.shortcut
    refuse(
        f"{found} was trained with {name} {stored.get(name)!r}, got {value!r}; wanted the same"
        for name, value in own.items()
        if stored.get(name) != value
    )
    return str(found)
