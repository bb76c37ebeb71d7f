"""`--compile`: the denoiser of the training steps, compiled, where the machine can.

Fixed shapes, once per bucket: one kernel for many small operations. Compiled, adapters compute layer by layer: the
compiler fuses that form better than the one made by hand. Validation and calibration go on with the model as it is, so
their shapes cost no compilation. A machine that lacks something trains without, and says so once. `capture` records
what is compiled, too.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import cast

import torch
from torch import nn

from ..objective.loss import Denoiser
from ..options import DreamBoothOptions

FIRST_STEPS = "compiling: the first step of every image size takes a minute or more"


def why_not_compiled(device: torch.device) -> str | None:
    """The reason why torch.compile cannot run here, if any."""
    if device.type != "cpu":
        return None if find_spec("triton") else "torch.compile needs the package triton, which is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler, such as g++, and found none"
    return None


def compiled(
    denoiser: Denoiser, options: DreamBoothOptions, device: torch.device, buckets: int, say: Callable[[str], object]
) -> Denoiser:
    """The denoiser for training steps: the same weights, and its model compiled if that was asked for and can be."""
    if not options.compile:
        return denoiser
    if reason := why_not_compiled(device):
        say(f"--compile: {reason}; going on without")
        return denoiser
    say(FIRST_STEPS)
    # Instances and class images may differ in size, and a handover makes another function of the model.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * buckets)
    return replace(denoiser, model=cast(nn.Module, torch.compile(denoiser.model, dynamic=False)))
