"""The public names and where they are defined; `__init__.py` imports each on first use."""

from .data.scan import scan
from .models.adapters import Adapters, add_adapters
from .models.attn_processor import (
    ResLoRAAttnProcessor,
    set_attn_processors,
    unset_attn_processors,
)
from .models.families import FAMILIES
from .models.memory import restore_memory, save_memory
from .models.optimize import optimize_for_training
from .objective.loss import Denoiser, Objective
from .objective.noise import Diffusion, FlowMatching
from .options import DreamBoothOptions, parse
from .options.checks import check
from .options.plan import Plan
from .train.finishing import finish
from .train.session import Run
from .train.setup import build, encode, load, start

__all__ = [
    "FAMILIES",
    "Adapters",
    "Denoiser",
    "Diffusion",
    "DreamBoothOptions",
    "FlowMatching",
    "Objective",
    "Plan",
    "ResLoRAAttnProcessor",
    "Run",
    "add_adapters",
    "build",
    "check",
    "encode",
    "finish",
    "load",
    "optimize_for_training",
    "parse",
    "restore_memory",
    "save_memory",
    "scan",
    "set_attn_processors",
    "start",
    "unset_attn_processors",
]
