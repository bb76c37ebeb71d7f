"""`--schedule` and `--optimizer` of the language-model scripts: what they do not go with. Known without torch, but for
the settings of optimizers."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..methods.dora import dora_problems
from ..methods.pair_optimizers import PAIR_OPTIMIZERS, optimizer_conflicts
from ..methods.schedules.settings import FoldSettings, RestartSettings, Settings, conflicts_of, parse_schedule
from ..rules import ShortcutFields
from ..utils.problems import BadInput, nearest
from .options import GlueOptions, ModelOptions
from .quantising import is_quantised, stored_quantisation
from .training_options import TrainingOptions

if TYPE_CHECKING:
    from transformers import TrainingArguments


def settings_of(options: ModelOptions) -> Settings | None:
    """The schedule that was asked for, if any; raises `BadInput`."""
    return parse_schedule(options.schedule) if options.schedule is not None else None


def features_of(options: ModelOptions, training: "TrainingOptions | TrainingArguments") -> list[str]:
    """Features of a run that a schedule or an optimizer may not go with, by the names in their `conflicts`."""
    linked = options.method == "reslora" and options.num_previous != "0"
    found = [options.shortcut or str(ShortcutFields.shortcut) if linked else "none"]
    if training.load_best_model_at_end:
        found.append("best")
    launched = {name: os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true" for name in ("deepspeed", "fsdp")}
    found += ["dora"] if options.use_dora else []
    found += ["quantised"] if is_quantised(options) or stored_quantisation(options) else []
    return found + [name for name, yes in launched.items() if yes or getattr(training, name, None)]


def schedule_problems(options: ModelOptions, training: TrainingOptions) -> Iterator[str]:
    """Everything that is wrong with the schedule; of several processes, `process_problems` asks."""
    if options.handover_at is not None and "deepspeed" in features_of(options, training):
        yield f"--handover_at: {FoldSettings.conflicts['deepspeed']}"
    try:
        settings = settings_of(options)
    except BadInput as error:
        yield from (f"--schedule: {problem}" for problem in error.problems)
        return
    if settings is None:
        return
    if options.method == "lora":
        yield f"--schedule {settings.name}: --method lora is PEFT's own; wanted --method reslora --shortcut none"
        return
    steps = training.max_steps if training.max_steps > 0 else None
    problems = [*conflicts_of(settings, features_of(options, training)), *settings.misfits(steps, options.rank)]
    if options.handover_at is not None:
        problems.append(f"{settings.name}: --handover_at is another schedule, and a run has one; wanted one of them")
    if settings.name == "fold" and options.shortcut == "block":
        problems.append("fold: block merges exactly, and folded it has more parameters; wanted input or middle")
    if isinstance(settings, RestartSettings):
        problems += settings.merge_problems(options.dtype, features_of(options, training))
    if settings.name == "prune":
        problems += prune_problems(options)
    yield from (f"--schedule: {problem}" for problem in problems)


def prune_problems(options: ModelOptions) -> Iterator[str]:
    """Conflicts with a run whose result is a smaller model."""
    if isinstance(options, GlueOptions):
        yield "prune: a classifier's head is trained beside the adapter; wanted a causal language model"
    if getattr(options, "save_merged_model", False):
        yield "prune: the adapter is merged into the smaller model anyway; wanted no --save_merged_model"


def process_problems(options: ModelOptions, training: "TrainingArguments") -> Iterator[str]:
    """Conflicts with several processes, and settings that the optimizer does not take."""
    settings = settings_of(options)
    if isinstance(settings, RestartSettings) and settings.ranks and training.world_size > 1:
        yield (
            "--schedule: restart: ranks replace parameters, which DistributedDataParallel does not notice; wanted one "
            "process, or links of one rank"
        )
    if options.optimizer is None:
        return
    import torch
    from torch import nn

    from ..methods.optimizers import OPTIMIZERS
    from ..methods.optimizers.parameters import unknown_settings

    kind: Any = OPTIMIZERS[options.optimizer]
    unknown = unknown_settings(kind, options.optimizer_args)
    yield from unknown
    if not unknown:
        from .scheduling import pair_settings

        try:
            kind([nn.Parameter(torch.zeros(2, 2))], [], lr=training.learning_rate, **pair_settings(options, training))
        except (ValueError, TypeError, RuntimeError) as error:
            yield f"--optimizer {options.optimizer}: {error}"


def optimizer_problems(options: ModelOptions, training: TrainingOptions) -> Iterator[str]:
    """A name that is none, settings of none, and conflicts of the optimizer and of DoRA."""
    features = features_of(options, training)
    yield from optimizer_conflicts(options.optimizer, features)
    if options.use_dora:
        yield from dora_problems(features)
    if options.optimizer is None and options.optimizer_args:
        yield "--optimizer_args: are those of --optimizer, which is not given; those of --optim are --optim_args"
    if options.optimizer is not None and options.optimizer not in PAIR_OPTIMIZERS:
        wanted = f"{', '.join(PAIR_OPTIMIZERS)}; those of torch and others are --optim"
        yield f"--optimizer: got {options.optimizer!r}, wanted {wanted}{nearest(options.optimizer, PAIR_OPTIMIZERS)}"
