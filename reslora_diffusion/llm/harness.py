"""`lm-eval` on an exported adapter: the base alone and with it, by the same tasks and settings.

    measure(Pair("base", "my-lora"), ["hellaswag"])
    {"hellaswag": {"acc,none": {"base": 0.31, "adapter": 0.34}, ...}}

Models are handed over as they are loaded here, so an adapter that does not fit is refused before. Tasks read their data
as `datasets` does: from the hub, its cache, or files that a task file of `include_path` names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.environment import missing_packages
from ..utils.problems import BadInput, refuse
from .adapters import Pair


def measure(
    pair: Pair, tasks: Sequence[str], include_path: Path | None = None, **settings: Any
) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics by task, metric, and "base" or "adapter"; `settings` are those of `lm_eval.simple_evaluate`.

    Raises:
        BadInput: lm-eval is not installed, a task is not known, or the adapter does not fit.
    """
    problems = [*missing_packages([("reslora evaluate", "lm_eval", "lm-eval")]), *pair.problems()]
    if include_path is not None and not include_path.is_dir():
        problems.append(f"--include_path {include_path}: there is no such folder")
    if not tasks:
        problems.append("--tasks: got nothing, wanted names of lm-eval's tasks")
    refuse(problems)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path else None)
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise BadInput([f"--tasks: lm-eval knows no {', '.join(unknown)}"])
    model, tokenizer = pair.load()
    batch_size = settings.pop("batch_size", 8)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in ("base", "adapter"):
        if name == "base":
            model.disable_adapter_layers()
        else:
            model.enable_adapter_layers()
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = simple_evaluate(model=lm, tasks=[*tasks], task_manager=manager, **settings)["results"]
        for task, metrics in results.items():
            for metric, value in metrics.items():
                if "," in metric:  # the metric and its filter; other keys are of the task: alias, name, sample_len
                    found.setdefault(task, {}).setdefault(metric, {})[name] = value
    return found
