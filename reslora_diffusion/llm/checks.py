"""Everything that can be wrong with options, training arguments and checkpoints, as far as it is known without torch.

Training arguments are plain values here, as `options.parse` gives them. `launcher_problems` alone waits for the real
ones, which know how training is distributed.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..rules import MERGE_EXACTLY, ShortcutFields, faults
from ..utils.documents import parse_json
from ..utils.environment import missing_packages, unwritable
from ..utils.options import wrong_values
from ..utils.problems import BadInput, refuse
from .methods import optimizer_problems, process_problems, schedule_problems
from .model_checks import stored_problems
from .options import ModelOptions, ScriptOptions
from .quantising import is_quantised, quantisation_problems
from .records import is_json_lines, names_of
from .resuming import checkpoint_of, checkpoints_in
from .training_options import TrainingOptions

if TYPE_CHECKING:
    from transformers import TrainingArguments

TRACKERS = {  # of transformers, and the package that each needs
    "azure_ml": "azureml.core.run",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
OPTIONS = {"r": "rank"}  # of ours, by the name that a field of PEFT's configuration has
ONLY_RESLORA = ("shortcut", "num_previous", "merge_method", "distillation_steps")


def check(
    options: ScriptOptions,
    training: TrainingOptions,
    data_problems: list[str],
    read: Callable[[], Any],
    metrics: Sequence[str] = (),
) -> tuple[str | None, Any]:
    """`(checkpoint to continue from, what read() returned)`; None for rows that are not in local files.

    Args:
        metrics: what evaluations find beside the loss; the best step is chosen by the first, if none is named.

    Raises:
        BadInput: every problem of options, files and checkpoint.
    """
    problems = training.problems + option_problems(options) + data_problems + training_problems(training, options)
    problems += metric_problems(training, metrics)
    training.metric_for_best_model = training.metric_for_best_model or next(iter(metrics), "loss")
    problems += stored_problems(options) if options.model_name_or_path else []
    checkpoint = rows = None
    try:
        checkpoint = checkpoint_of(training, options)
    except BadInput as error:
        problems += error.problems
    try:
        if not data_problems and (names := names_of(options.dataset_name)) and all(map(is_json_lines, names)):
            rows = read()
    except BadInput as error:
        problems += error.problems
    refuse(problems)
    return checkpoint, rows


def adapter_settings(options: ModelOptions) -> dict[str, Any]:
    """Arguments of either method's configuration. Options that were not given keep the configuration's own defaults."""
    targets = options.target_modules
    settings: dict[str, Any] = {
        "r": options.rank,
        "lora_alpha": options.lora_alpha if options.lora_alpha is not None else 2 * options.rank,
        "lora_dropout": options.lora_dropout,
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
    }
    if options.method == "lora":
        return settings
    settings |= {n: getattr(options, n) for n in ("shortcut", "merge_method") if getattr(options, n) is not None}
    if options.num_previous is not None:
        settings["num_previous"] = None if options.num_previous == "all" else int(options.num_previous)
    return settings


def option_problems(options: ModelOptions) -> list[str]:
    """Faults of the model's and the adapter's options."""
    problems = [*model_problems(options.model_name_or_path)]
    wrong = wrong_values(options)
    problems += wrong.values()
    if options.method == "lora":
        given = [f"--{name}" for name in ONLY_RESLORA if getattr(options, name) is not None]
        problems += [f"{flag}: does nothing with --method lora" for flag in given]
    problems += quantisation_problems(options)
    reach = options.num_previous
    if reach is not None and reach != "all" and not reach.isdecimal():
        return [*problems, f"--num_previous: got {reach!r}, wanted a number or all"]
    settings = {name: value for name, value in adapter_settings(options).items() if name not in wrong}
    found = [fault.partition(":") for fault in faults(settings)]
    return problems + [f"--{OPTIONS.get(name, name)}:{fault}" for name, _, fault in found]


def model_problems(name: str | None) -> Iterator[str]:
    """Return why no model is found; names on the hub are looked up later."""
    folder = Path(name or "")
    if not name:
        yield "--model_name_or_path: got nothing, wanted a folder or a hub name"
    elif (folder.is_absolute() or name.startswith(".") or len(folder.parts) > 2) and not folder.is_dir():
        yield f"--model_name_or_path {name}: there is no such folder"
    elif folder.is_dir() and not (folder / "config.json").is_file():
        yield f"--model_name_or_path {name}: has no config.json, wanted a transformers model"


def shortcut_of(options: ModelOptions) -> str:
    return options.shortcut or str(ShortcutFields.shortcut)


def checkpointing_settings(training: TrainingOptions) -> Mapping[str, Any]:
    """`--activation_checkpointing_kwargs`, or by its older name; what is no JSON is refused by transformers."""
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    given: object = next((value for name in names if (value := getattr(training, name, None))), {})
    try:
        found = parse_json(given) if isinstance(given, str) else given
    except ValueError:
        found = {}
    return found if isinstance(found, Mapping) else {}


def training_problems(training: TrainingOptions, options: ModelOptions) -> list[str]:
    """Training arguments that cannot work with the adapter."""
    problems, shortcut = [], shortcut_of(options)
    approximate = options.method == "reslora" and shortcut not in MERGE_EXACTLY
    if approximate and checkpointing_settings(training).get("use_reentrant"):
        problems.append(
            "--gradient_checkpointing_kwargs: got use_reentrant=true, which cuts the links of shortcut "
            f"{shortcut!r} out of the gradient; wanted use_reentrant=false, or --shortcut block"
        )
    if options.handover_at is not None:
        if options.method == "lora" or shortcut in MERGE_EXACTLY:
            problems.append("--handover_at: does nothing here; shortcuts none and block have nothing to fold")
    problems += [*schedule_problems(options, training), *optimizer_problems(options, training)]
    if options.distillation_steps is not None and options.method == "reslora":
        problems += distillation_problems(options, shortcut)
    problems += tracker_problems(training.report_to)
    if training.use_liger_kernel:
        problems += missing_packages([("--use_liger_kernel", "liger_kernel", "liger-kernel")])
        if any(target.rpartition(".")[2] == "lm_head" for target in options.target_modules or ()):
            problems.append(
                "--use_liger_kernel: its loss multiplies by the weight of lm_head and passes its adapter by"
            )
    if getattr(options, "chunked_loss", False):
        problems += chunked_loss_problems(training, options)
    attention = options.attn_implementation or ""
    if "flash" in attention and options.dtype == "float32" and not (training.bf16 or training.fp16):
        problems.append(f"--attn_implementation {attention}: wants --dtype bfloat16 or float16, got float32")
    output = training.output_folder
    if not (output.exists() and not output.is_dir()) and (reason := unwritable(output)):
        problems.append(f"--output_dir {output}: cannot be made or written to: {reason}")
    if training.resume_from_checkpoint is None and output.is_dir():
        if checkpoints_in(output):
            problems.append(
                f"--output_dir {output}: holds checkpoints of an earlier run; wanted --resume_from_checkpoint latest, "
                "or another folder"
            )
        elif (output / "adapter_model.safetensors").exists():
            problems.append(f"--output_dir {output}: holds an adapter already; wanted another folder")
        elif (output / "pruned").exists():
            problems.append(f"--output_dir {output}: holds a pruned model already; wanted another folder")
    elif output.exists() and not output.is_dir():
        problems.append(f"--output_dir {output}: is a file, wanted a folder")
    return problems


def chunked_loss_problems(training: TrainingOptions, options: ModelOptions) -> Iterator[str]:
    """Yield what a loss without logits does not go with."""
    name = "--chunked_loss"
    if training.label_smoothing_factor:
        yield f"{name}: does not go with --label_smoothing_factor, which transformers computes from all logits"
    if training.torch_compile:
        yield f"{name}: does not go with --torch_compile, which compiles the model with its own loss"
    if training.use_liger_kernel:
        yield f"{name}: got --use_liger_kernel too, whose loss needs no logits either; wanted one of them"
    if any(target.rpartition(".")[2] == "lm_head" for target in options.target_modules or ()):
        yield f"{name}: multiplies by the weight of lm_head and would ignore the adapter of lm_head"


def tracker_problems(report_to: str | Sequence[str] | None) -> Iterator[str]:
    """Trackers that do not exist or whose package is not installed; transformers says so after loading the weights."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    for name in names:
        if name in TRACKERS:
            yield from missing_packages([(f"--report_to {name}", TRACKERS[name], TRACKERS[name])])
        elif name not in ("all", "none"):
            yield f"--report_to: got {name!r}, wanted {', '.join(TRACKERS)}, all or none"


def metric_problems(training: TrainingOptions, known: Sequence[str]) -> Iterator[str]:
    """A metric for the best step that no evaluation computes; transformers says so at the first evaluation."""
    name = training.metric_for_best_model
    if name is not None and name.removeprefix("eval_") not in ("loss", *known):
        yield f"--metric_for_best_model: got {name!r}, wanted {', '.join(['loss', *known])}"


def distillation_problems(options: ModelOptions, shortcut: str) -> Iterator[str]:
    name = "--distillation_steps"
    steps = options.distillation_steps
    if steps is None:
        return
    if steps < 1 or options.calibration_examples < 2:
        got = f"{steps} and --calibration_examples {options.calibration_examples}"
        yield f"{name}: got {got}, wanted 1 step or more, and 2 examples, one of which is held out"
    if shortcut in MERGE_EXACTLY or options.handover_at is not None:
        yield f"{name}: does nothing here; block, none and what --handover_at folds are exported as trained"
    if options.merge_method in ("drop", "paper_weight"):
        yield f"{name}: refines what was fitted on data; got --merge_method {options.merge_method}"


def replica_problems(options: ModelOptions, gpus: int) -> Iterator[str]:
    """Yield what does not run where one process shares out its batches over several GPUs (`torch.nn.DataParallel`)."""
    wanted = f"wanted a process for each, by accelerate launch --num_processes {gpus}, or CUDA_VISIBLE_DEVICES=0"
    if options.method == "reslora":
        yield f"--method reslora: replicas on {gpus} GPUs of one process would share one adapter's state; {wanted}"
    attention = options.attn_implementation or ""
    if getattr(options, "packing", False) and "flash" in attention:
        yield f"--packing with {attention}: {gpus} GPUs of one process share out rows, not their lengths; {wanted}"
    if getattr(options, "chunked_loss", False):
        yield f"--chunked_loss: its output layer lies on the first of {gpus} GPUs of one process alone; {wanted}"


def launcher_problems(options: ModelOptions, training: "TrainingArguments") -> Iterator[str]:
    """Yield what does not run as training is distributed, which `TrainingArguments` find out once they are made."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    yield from process_problems(options, training)
    if training.n_gpu > 1:
        yield from replica_problems(options, training.n_gpu)
    sharded = is_deepspeed_zero3_enabled() or bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded and is_quantised(options):
        yield (
            "--load_in_4bit, --load_in_8bit: not with FSDP or DeepSpeed ZeRO-3, which shard weights in one precision; "
            "wanted a whole model for each process"
        )
    if not is_deepspeed_zero3_enabled():
        return
    if options.dtype != "float32":
        yield (
            f"--dtype {options.dtype}: DeepSpeed ZeRO-3 does not train float32 adapters on a base in another "
            "precision; wanted --dtype float32, or FSDP2 (train_scripts/configs/accelerate/fsdp2.yaml)"
        )
    if getattr(options, "chunked_loss", False):
        yield (
            "--chunked_loss: does not run with DeepSpeed ZeRO-3, which holds the output layer's weight only during its "
            "own forward; wanted false, or FSDP2"
        )
    if getattr(options, "save_merged_model", False):
        yield "--save_merged_model: not under DeepSpeed ZeRO-3; use reslora merge afterwards"
    if options.distillation_steps is not None and options.method == "reslora":
        yield (
            "--distillation_steps: does not run with DeepSpeed ZeRO-3, which takes the weights away between forward "
            "and backward"
        )
