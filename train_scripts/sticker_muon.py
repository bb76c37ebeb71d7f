"""Muon for convolutions: the step is the orthogonal matrix nearest to the gradient's running mean.

    M <- 0.95 M + G        G: the gradient of a kernel as a matrix, [out, in * height * width]
    W <- W - lr * 0.2 * sqrt(max(rows, columns)) * orthogonal(G + 0.95 M)

after Jordan et al. (2024), with the scale of Liu et al. (arXiv 2502.16982), which gives an update the root mean square
of AdamW's. `torch.optim.Muon` takes matrices only. Whatever is no kernel (biases, norms), and the first and the last
layer, are AdamW's.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration
ITERATIONS = 5
UPDATE_RMS = 0.2


def orthogonal(matrix: Tensor) -> Tensor:
    """Roughly U V^T of the singular value decomposition: singular values between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.AdamW):
    """AdamW, except for groups with `orthogonal=True`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        for group in groups:
            if group.get("orthogonal"):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.update(parameter, group["lr"])
        self.param_groups = [group for group in groups if not group.get("orthogonal")]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def update(self, parameter: Tensor, lr: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.tensor(0.0)  # AdamW looks for it when it loads a state
        mean = state["momentum"].mul_(MOMENTUM).add_(parameter.grad)
        step = orthogonal((parameter.grad + MOMENTUM * mean).flatten(1))
        scale = UPDATE_RMS * math.sqrt(max(step.shape))
        parameter.add_(step.view(parameter.shape), alpha=-lr * scale)


def make_muon(model: nn.Module, lr: float, *, first_and_last: tuple[str, ...], others_lr: float = 1e-3) -> Muon:
    """`first_and_last`: names of the layers that read or write the data."""
    kernels: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim > 1 and name.removesuffix(".weight") not in first_and_last
        (kernels if inner else others).append(parameter)
    groups = [
        {"params": kernels, "lr": lr, "orthogonal": True},
        {"params": others, "lr": others_lr, "orthogonal": False},
    ]
    return Muon(groups, betas=(0.9, 0.99), weight_decay=1e-2)
