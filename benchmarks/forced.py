"""Which kernel computes the adapted layers, chosen by hand, so that kernels can be compared on one model.

    plain      PEFT's operations, layer by layer
    fused      one node of the autograd graph for each layer
    grouped    one node for the layers of an attention that read the same x

This is the one place of the benchmarks that knows how a kernel is chosen.
"""

from torch import nn

from reslora_diffusion import get_controller
from reslora_diffusion.diffusion.attn_processor import set_attn_processors, unset_attn_processors

KERNELS = ("plain", "fused", "grouped")


def kernels_of(model: nn.Module) -> tuple[str, ...]:
    """The kernels that a model can be computed by; layers are grouped where a model has attention processors."""
    return KERNELS if hasattr(model, "set_attn_processor") else KERNELS[:2]


def force(model: nn.Module, kernel: str) -> None:
    """Let `kernel` compute all adapted layers of `model`."""
    if hasattr(model, "set_attn_processor"):
        unset_attn_processors(model)
        if kernel == "grouped":
            set_attn_processors(model)
    get_controller(model).fusion.sharded = kernel == "plain"  # sharded factors are computed plainly
