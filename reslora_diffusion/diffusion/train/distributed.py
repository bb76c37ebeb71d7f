"""Data-parallel training of a few small tensors: one all-reduce a step, and no wrapper around the models.

Where a launcher is configured for FSDP 2, the frozen base is sharded: each process holds its share of every block, and
a block is gathered while it computes. The adapters stay whole everywhere, so nothing else changes. What has a forward
of the base in it must then be called by every process.
"""

from collections.abc import Sequence

import torch
from diffusers import ModelMixin
from torch import Tensor, nn


def shard(denoiser: ModelMixin, device: torch.device) -> None:
    """Move a frozen model to the device, block by block, keeping this process's share of each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    adapters = {parameter for parameter in denoiser.parameters() if parameter.requires_grad}
    for parameter in adapters:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    kinds = denoiser._no_split_modules or []
    blocks = [module for module in denoiser.modules() if type(module).__name__ in kinds]
    for module in (*reversed(blocks), denoiser):  # inner ones first
        fully_shard(module, mesh=mesh, ignored_params=adapters)


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
