"""Numbers that no training survives: NaN and infinity in weights."""

import torch
from torch import Tensor, nn

from .utils.problems import listing

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def is_plain(tensor: object) -> bool:
    """Return whether a tensor holds floats as they are. torchao's packed weights have a float type, and cannot be
    summed up; weights that another process is going to send are on the meta device."""
    held = isinstance(tensor, Tensor) and tensor.dtype in FLOATS and not tensor.is_meta
    return held and not type(tensor).__module__.startswith("torchao")


@torch.no_grad()
def broken_tensors(model: nn.Module, trained_only: bool = False) -> list[str]:
    """Names of a model's tensors that hold NaN or infinity; with `trained_only` of its trained parameters."""
    if trained_only:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    else:
        named = {name: tensor for name, tensor in model.state_dict().items() if is_plain(tensor)}
    # A sum is not finite if a number is not, and reads each number once without a copy.
    doubtful = [name for name, tensor in named.items() if not tensor.sum(dtype=torch.float32).isfinite()]
    return [name for name in doubtful if not named[name].isfinite().all()]


def broken_model(model: nn.Module, what: str) -> list[str]:
    """The problem with a base whose losses and outputs would be NaN whatever is trained on it, if there is one."""
    broken = broken_tensors(model)
    if not broken:
        return []
    several, hold = ("1 tensor", "holds") if len(broken) == 1 else (f"{len(broken)} tensors", "hold")
    return [
        f"{several} of the {what} {hold} NaN or infinity: {listing(broken)}; wanted another copy of the model "
        "(a download or a merge went wrong)"
    ]
