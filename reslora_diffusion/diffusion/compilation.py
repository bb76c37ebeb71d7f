"""`--compile` and `--cuda_graph`: the denoiser of the training steps, compiled, where the machine can.

    --compile       one kernel for many small operations; torch.compile with fixed shapes, once per bucket
    --cuda_graph    the same, with forward and backward each recorded as a CUDA graph and replayed: a step costs the
                    host two launches. torch keeps static copies of the inputs, and random numbers in the graph

Compiled, adapters compute layer by layer: the compiler fuses that form better than the one made by hand. Validation
and calibration go on with the model as it is, so their shapes cost no compilation. A machine that lacks something
trains without, and says so once.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import torch

from .loss import Denoiser

FIRST_STEPS = "compiling: the first step of every picture size takes a minute or more"


def why_not_compiled(device: torch.device) -> str | None:
    """What torch.compile lacks here, if anything."""
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
    denoiser: Denoiser, args: Namespace, device: torch.device, buckets: int, say: Callable[[str], object]
) -> Denoiser:
    """The denoiser for training steps: the same weights, and its model compiled if that was asked for and can be."""
    graphs = args.cuda_graph and device.type == "cuda"
    if args.cuda_graph and not graphs:
        say("--cuda_graph: this machine trains without a CUDA device; going on without graphs")
    if not (args.compile or graphs):
        return denoiser
    if reason := why_not_compiled(device):
        say(f"--compile: {reason}; going on without")
        return denoiser
    say(FIRST_STEPS)
    # Instances and class pictures may differ in size, and a handover makes another function of the model.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * buckets)
    mode = "reduce-overhead" if graphs else None
    return replace(denoiser, model=torch.compile(denoiser.model, dynamic=False, mode=mode))


def begin_step(args: Namespace) -> None:
    """What graphs wrote in the step before may be overwritten from here on."""
    if args.cuda_graph:
        torch.compiler.cudagraph_mark_step_begin()
