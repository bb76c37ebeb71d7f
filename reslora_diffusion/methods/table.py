"""The table of `reslora methods` says which methods compose, from the `conflicts` that the code checks."""

from collections.abc import Mapping

from . import dora
from .pair_optimizers import CONFLICTS, PAIR_OPTIMIZERS
from .schedules.settings import SCHEDULES

FEATURES = {  # what a run may have beside a schedule and an optimizer, by the names in `conflicts`
    "none": "plain LoRA, --shortcut none",
    "input": "--shortcut input",
    "block": "--shortcut block",
    "middle": "--shortcut middle",
    "dora": "--use_dora",
    "loraplus": "--loraplus_lr_ratio",
    "max_norm": "--scale_weight_norms",
    "network_weights": "--network_weights",
    "convolutions": "adapters on convolutions and embeddings",
    "cuda_graph": "--cuda_graph",
    "text_encoder": "--train_text_encoder",
    "ema": "--use_ema",
    "best": "the best step by its loss, rather than the last",
    "quantised": "a base with quantised weights",
    "sharded_base": "a base that FSDP has sharded",
    "fsdp": "factors that FSDP has sharded",
    "deepspeed": "DeepSpeed",
}


def conflicts() -> dict[str, Mapping[str, str]]:
    """Reasons by method and feature."""
    schedules = {f"--schedule {name}": kind.conflicts for name, kind in SCHEDULES.items()}
    optimizers = {f"--optimizer {name}": CONFLICTS for name in PAIR_OPTIMIZERS}
    return schedules | optimizers | {"--use_dora": dora.CONFLICTS}


def table() -> str:
    """A line for each feature, a column for each method; below, the reasons."""
    found = conflicts()
    short = {method: method.rpartition(" ")[2].removeprefix("--use_") for method in found}
    width = max(map(len, FEATURES.values()))
    lines = [" " * width + "  " + "  ".join(short.values())]
    for feature, meaning in FEATURES.items():
        marks = ["no" if feature in reasons else "yes" for reasons in found.values()]
        cells = [mark.ljust(len(name)) for mark, name in zip(marks, short.values(), strict=True)]
        lines.append(f"{meaning.ljust(width)}  {'  '.join(cells)}".rstrip())
    lines += ["", "Every schedule goes with every optimizer. A run has one of each.", ""]
    reasons: dict[tuple[str, str], list[str]] = {}
    for method, those in found.items():
        for feature, reason in those.items():
            reasons.setdefault((FEATURES[feature], reason), []).append(short[method])
    lines += [f"{', '.join(methods)} with {feature}: {reason}" for (feature, reason), methods in reasons.items()]
    return "\n".join(lines)
