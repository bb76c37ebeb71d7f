"""DreamBooth training of diffusion models.

>>> from reslora_diffusion.diffusion import build, check, encode, finish, load, parse, start
>>> options = parse(["--config", "run.yaml"])
>>> plan = check(options)                       # raises BadInput with every problem
>>> begun = start(options, plan)
>>> loaded, concepts, facts = load(begun)
>>> run = build(begun, loaded, encode(begun, loaded, concepts, facts))
>>> ...                                         # the loop: train_scripts/train_dreambooth_reslora.py
>>> finish(run, run.step)                       # merges, exports, writes the reports

`optimize_for_training`, `save_memory` and `set_attn_processors` speed up a UNet or transformer in any training loop.
Names are resolved on first use, so that options can be checked without torch.
"""

from importlib import import_module
from typing import Any

HOMES = {
    "Adapters": "models.adapters",
    "Denoiser": "objective.loss",
    "Diffusion": "objective.noise",
    "DreamBoothOptions": "options",
    "FAMILIES": "models.families",
    "FlowMatching": "objective.noise",
    "Objective": "objective.loss",
    "Plan": "options.plan",
    "ResLoRAAttnProcessor": "models.attn_processor",
    "Run": "train.session",
    "add_adapters": "models.adapters",
    "build": "train.setup",
    "check": "options.checks",
    "encode": "train.setup",
    "finish": "train.finishing",
    "load": "train.setup",
    "optimize_for_training": "models.optimize",
    "parse": "options",
    "restore_memory": "models.memory",
    "save_memory": "models.memory",
    "scan": "data.scan",
    "set_attn_processors": "models.attn_processor",
    "start": "train.setup",
    "unset_attn_processors": "models.attn_processor",
}
__all__ = sorted(HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
