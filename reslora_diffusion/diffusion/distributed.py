"""Data-parallel training of a few small tensors: one all-reduce a step, and no wrapper around the models."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], loss: Tensor, processes: int) -> Tensor:
    """Replace each gradient by its mean over all processes, and return the mean loss.

    The loss travels with the gradients, so that every process sees the same one and stops at the same step.
    """
    if processes == 1:
        return loss
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [*gradients, loss.reshape(1)]
    flat = torch.cat([part.flatten() for part in parts])
    torch.distributed.all_reduce(flat)
    *averaged, loss = (flat / processes).split([part.numel() for part in parts])
    for gradient, mean in zip(gradients, averaged, strict=True):
        gradient.copy_(mean.view_as(gradient))
    return loss[0]
