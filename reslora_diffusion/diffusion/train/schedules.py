"""`--schedule`, or `--handover`, which is `--schedule fold`: what was asked for, and what does not go with it.

Known without torch.
"""

import os

from ...methods.dora import dora_problems
from ...methods.pair_optimizers import optimizer_conflicts
from ...methods.schedules.settings import FoldSettings, RestartSettings, Settings, conflicts_of, parse_schedule
from ...rules import ShortcutFields
from ...utils.problems import BadInput
from ..models.architecture import LINEAR, Architecture, rank_of
from ..options import DreamBoothOptions
from ..options.launcher import shards
from ..options.model_checks import adapter_settings


def settings_of(options: DreamBoothOptions) -> Settings | None:
    """Return the schedule that was asked for, if any; raises `BadInput`."""
    if options.schedule is not None:
        return parse_schedule(options.schedule)
    return FoldSettings(options.handover) if options.handover is not None else None


def features_of(options: DreamBoothOptions, architecture: Architecture | None = None) -> list[str]:
    """Features of a run that a schedule or an optimizer may not go with, by the names in their `conflicts`."""
    adapter = {"shortcut": ShortcutFields.shortcut, "num_previous": ShortcutFields.num_previous}
    adapter |= adapter_settings(options)
    layers = (layer for _, _, layer in architecture.adapted(options)) if architecture else ()
    there = {
        "loraplus": options.loraplus_lr_ratio is not None,
        "cuda_graph": options.cuda_graph,
        "max_norm": options.scale_weight_norms,
        "ema": options.use_ema,
        "best": options.keep_best,
        "text_encoder": options.train_text_encoder,
        "sharded_base": shards(),
        "network_weights": options.network_weights,
        "dora": options.use_dora,
        "quantised": options.quantization,
        "convolutions": any(layer.kind != LINEAR for layer in layers),
    }
    shortcut = "none" if adapter["num_previous"] == 0 else str(adapter["shortcut"])
    return [shortcut, *(name for name, yes in there.items() if yes)]


def conflict_problems(options: DreamBoothOptions) -> list[str]:
    """Conflicts with the optimizer and with DoRA."""
    if options.compare:  # each contender is asked by itself
        return []
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    features = [*features_of(options), *(["deepspeed"] if deepspeed else [])]
    return [*optimizer_conflicts(options.optimizer, features), *(dora_problems(features) if options.use_dora else [])]


def schedule_problems(options: DreamBoothOptions, architecture: Architecture | None, steps: int | None) -> list[str]:
    """Everything that is wrong with the schedule. `steps`: of the run, if that is known."""
    if options.compare:  # each contender is asked by itself
        return []
    try:
        settings = settings_of(options)
    except BadInput as error:
        return [f"--schedule: {problem}" for problem in error.problems]
    if settings is None or options.schedule is None:  # --handover has checks of its own
        return []
    problems = conflicts_of(settings, features_of(options, architecture))
    if options.handover is not None:
        problems.append(f"{settings.name}: --handover is another schedule, and a run has one; wanted one of them")
    if isinstance(settings, RestartSettings):
        precision = options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        problems += settings.merge_problems(precision, features_of(options))
    problems += settings.misfits(steps, options.rank)
    if architecture and getattr(settings, "ranks", None):
        ranks = sorted({rank_of(options, name, layer) for _, name, layer in architecture.adapted(options)})
        if len(ranks) > 1:
            problems.append(f"{settings.name}: ranks are for all layers, got --rank_pattern; wanted one rank")
    return [f"--schedule: {problem}" for problem in problems]
