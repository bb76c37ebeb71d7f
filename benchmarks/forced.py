"""A choice of kernel for the adapted layers by hand, so that kernels can be compared on one model.

    plain      torch's own functions
    fused      one node of the autograd graph for each layer
    runlora    the form with the least arithmetic, where nothing crosses layers; for float32 and float64
    grouped    one node for the layers of an attention that read the same x, and `fused` for the others

This is the one place of the benchmarks that knows how a kernel is chosen.
"""

from torch import nn

from reslora_diffusion import get_adapter
from reslora_diffusion.core.kernels.runlora import PRECISE
from reslora_diffusion.diffusion.models.attn_processor import set_attn_processors, unset_attn_processors

PLAIN, FUSED, RUNLORA, GROUPED = "plain", "fused", "runlora", "grouped"


def kernels_of(model: nn.Module) -> tuple[str, ...]:
    """The kernels that a frozen or adapted model can be computed by, the plain one first."""
    found = [PLAIN, FUSED]
    if next(model.parameters()).dtype in PRECISE:
        found.append(RUNLORA)
    if hasattr(model, "set_attn_processor"):
        found.append(GROUPED)
    return tuple(found)


def force(model: nn.Module, kernel: str) -> None:
    """Let `kernel` compute all adapted layers of `model`."""
    if hasattr(model, "set_attn_processor"):
        unset_attn_processors(model)
        if kernel == GROUPED:
            set_attn_processors(model)
    get_adapter(model).kernel = FUSED if kernel == GROUPED else kernel
