"""The form of an operation that is the quickest here and now, by trying them: RunLoRA's choice "by time".

A choice by time may be another in the next run, and forms differ in rounding. Where a run has to be repeated or resumed
bit for bit, leave the choice to the count of operations, or name a form.
"""

import time
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from ..functional import LinearOp
from .runlora import Form, runlora_linear, shape_of

ROUNDS = 5  # of which the quickest counts; one more, before, warms up


def quickest(op: LinearOp) -> Form:
    """The form for an operation's shapes, measured once in a process on tensors of its own."""
    return measured(op.x.dtype, str(op.x.device), op.bias is not None, *shape_of(op))


@lru_cache(maxsize=4096)
def measured(
    dtype: torch.dtype,
    device: str,
    biased: bool,
    rows: int,
    width: int,
    out: int,
    rank: int,
    parts: int,
    for_x: bool,
    for_factors: bool,
) -> Form:
    """The same by shapes, as `cheapest` takes them."""

    def made(*shape: int, trained: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device).normal_().requires_grad_(trained)

    generator = torch.random.get_rng_state()
    x, weight, bias = made(rows, width, trained=for_x), made(out, width), made(out) if biased else None
    sizes = [rank // parts + (place < rank % parts) for place in range(parts)]
    D, U = [made(r, width, trained=for_factors) for r in sizes], [made(out, r, trained=for_factors) for r in sizes]
    torch.random.set_rng_state(generator)
    op, g = LinearOp(x, weight, bias, D, U, [1.0] * parts), torch.ones(rows, out, dtype=dtype, device=device)

    def seconds(form: Form) -> float:
        began = clock(device)
        with torch.set_grad_enabled(for_x or for_factors):
            y, _ = runlora_linear(op, form)
            if y.requires_grad:
                torch.autograd.grad(y, [leaf for leaf in (x, *D, *U) if leaf.requires_grad], g)
        return clock(device) - began

    candidates = [
        Form(y, factors, dx, False)
        for y, factors, dx in product((False, True), repeat=3)
        if (factors or for_factors) and (dx or for_x)
    ]
    times = {form: min([seconds(form) for _ in range(ROUNDS + 1)][1:]) for form in candidates}
    return min(times, key=lambda form: times[form])


def clock(device: str) -> float:
    """Seconds of this thread on a CPU, where a busy machine does not count; of the device otherwise."""
    if device == "cpu":
        return time.thread_time()
    torch.get_device_module(device).synchronize()
    return time.perf_counter()
