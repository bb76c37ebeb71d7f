"""Refining a merge: the merged model is taught by the unmerged one, at equal rank and without labels.

Least squares fits each layer by itself, on inputs as they are before merging. `distill` starts from its C and moves all
of them together, with B fixed and therefore at the rank that they have:

    min_C  E d( f(x; A + C),  f_shortcut(x) )          by Adam, with the step of a layer relative to rms(A + C)

f is the model with the plain LoRA s B (A + C), f_shortcut the model as trained, d the mean squared error of their
outputs or what is given (for a language model, a divergence of next-token distributions). A part of the batches is held
out: if their distance has not become smaller, the C of least squares stays.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rules import DEFAULT_ADAPTER, MergeMethod
from ..attach import get_adapter
from ..sharding import is_distributed
from .calibrate import call, evaluating
from .factors import computing_as, joined_factors
from .statistics import all_reduce

HELD_OUT = 8  # one batch of so many, and at least one, is not trained on
Output = Callable[[nn.Module, Any], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]


class Distillation(NamedTuple):
    """Mean distance between merged and unmerged model on held-out batches; `kept` is whether C was replaced."""

    before: float
    after: float
    kept: bool


def output_of(model: nn.Module, batch: Any) -> Tensor:
    """The tensor by which models are compared if nothing else is said."""
    found = call(model, batch)
    for name in ("logits", "sample", "last_hidden_state"):
        if hasattr(found, name):
            return getattr(found, name)
    return found if isinstance(found, Tensor) else found[0]


def distill(
    model: nn.Module,
    batches: Sequence[Any],
    output: Output = output_of,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    steps: int = 100,
    learning_rate: float = 0.02,
    distance: Distance = F.mse_loss,
) -> Distillation:
    """Refine what `calibrate` found, in place; nothing to do for shortcuts that merge exactly.

    Args:
        batches: what `output` takes, at least two; with several processes each has its own.
        output: the tensor that the model gives on a batch, by which models are compared: the logits, the sample, or
            the first of what `model(**batch)` returns, if not given.
        steps: of Adam, each on one batch; a step costs about one and a half of training.
        learning_rate: of the first step, relative to the root mean square of a layer's A + C; decays to zero.
        distance: of the merged model's output from the unmerged one's, a tensor of one number.

    Raises:
        ValueError: `calibrate` was not called, the adapter is not active, or there is no batch to hold out.
    """
    adapter = get_adapter(model, adapter_name)
    if adapter.merges_exactly:
        return Distillation(0.0, 0.0, False)
    adapter.require_active()
    problems = []
    if len(batches) < 2:
        problems.append(f"got {len(batches)} batches, wanted at least 2: one is held out")
    if adapter.config.merge_method in (MergeMethod.DROP, MergeMethod.PAPER_WEIGHT):
        problems.append(f"merge_method {adapter.config.merge_method} keeps no correction that could be refined")
    if problems:
        raise ValueError("distill: " + "; ".join(problems))
    held_out, train = list(batches[::HELD_OUT]), [b for n, b in enumerate(batches) if n % HELD_OUT]
    student = {name: f._replace(lora_A=at_least_float32(f.lora_A)) for name, f in joined_factors(adapter).items()}

    def apart(batch: Any) -> Tensor:
        """d between the student, which the model computes as, and the unmerged model."""
        with torch.no_grad(), computing_as(adapter, None):
            target = output(model, batch)
        return distance(output(model, batch), target)

    def held_out_mean() -> float:
        mean = torch.stack([apart(batch) for batch in held_out]).float().mean()
        average([mean])
        return mean.item()

    with evaluating(model), computing_as(adapter, student):  # in backward too: checkpointing computes parts again
        before = held_out_mean()
        with torch.enable_grad():
            descend([f.lora_A for f in student.values()], apart, train, steps, learning_rate, before)
        after = held_out_mean()
    kept = after < before
    if kept:
        adapter.calibration = {
            name: f.lora_A.detach().to(adapter.calibration[name]) - adapter.lora_A(name).detach()
            for name, f in student.items()
        }
    return Distillation(before, after, kept)


def descend(
    leaves: list[Tensor],
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
    steps: int,
    learning_rate: float,
    scale: float,
) -> None:
    """Move every `lora_A`, in place; the loss is divided by `scale`, which half precision bears."""
    groups = [
        {"params": [A.requires_grad_()], "lr": learning_rate * A.detach().square().mean().sqrt().item()} for A in leaves
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss(batches[step % len(batches)]).div(scale or 1.0).backward(inputs=leaves)
        average([A.grad for A in leaves if A.grad is not None])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    for A in leaves:
        A.requires_grad_(False)


def at_least_float32(value: Tensor) -> Tensor:
    """A copy in float32 or better."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)


def average(values: list[Tensor]) -> None:
    """Mean over processes, in place."""
    all_reduce(values)
    if is_distributed():
        for value in values:
            value /= torch.distributed.get_world_size()
