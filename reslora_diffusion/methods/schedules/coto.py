"""CoTo, progressive dropping of adapters (arXiv 2506.05713), the successor of CopRA (arXiv 2410.22911).

In optimizer step t, with d_g ~ Bernoulli(p(t)) for each transformer block g, an adapted layer of g computes

    h = W x + d_g s B A x        p(t) = p_0 + (1 - p_0) min(1, t / (ratio T))        p_0 = 0.1, ratio = 0.75

without a factor 1/p, and draws are repeated until some d_g is 1. From `ratio` of the T steps on this is plain training.
With a shortcut, d_g multiplies s B A of a block wherever it is used: in every layer that borrows it (`block`), with
what it hands on (`middle`), and in its branch alone, while x is handed on (`input`).

The constants and the grouping are those of the authors' callback. An adapter that is dropped costs no product of low
rank, and has no gradient: its moments, and its decay, wait. Layers that no shortcut can join (convolutions, embeddings)
are PEFT's own, and are never dropped.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ...core.adapter import Adapter
from ...core.attach import AdaptedModel
from ..blocks import block_of
from .base import Change, Schedule
from .settings import CotoSettings


class Coto(Schedule):
    """Drops the adapters of whole transformer blocks, fewer and fewer; see the module.

    Between steps every block is open: what is evaluated, calibrated, merged and exported is the whole adapter.

    Args:
        seed: what is dropped in step t is a function of (seed, t): equal on all processes, and in a resumed run.
        initial_p: p_0, the share of the blocks that are open in the first step.
        ratio: share of the steps in which any are dropped.
        on_device: gates are scalars on the device, whose change recompiles nothing. The products are computed then, and
            multiplied by 0.

    Raises:
        BadInput: naming every setting that is out of bounds.
    """

    conflicts = CotoSettings.conflicts

    def __init__(self, seed: int = 0, initial_p: float = 0.1, ratio: float = 0.75, on_device: bool = False) -> None:
        CotoSettings(initial_p, ratio)
        self.seed, self.initial_p, self.ratio, self.on_device = seed, initial_p, ratio, on_device
        self.adapters: list[Adapter] = []
        self.groups: dict[tuple[int, str], list[str]] = {}  # layers by number of the adapter and block
        self.total_steps = 0
        self.closed: list[tuple[int, str]] = []  # in the step that is under way

    def start(
        self, adapters: Sequence[AdaptedModel], total_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.adapters, self.total_steps, self.groups = [adapted.adapter for adapted in adapters], total_steps, {}
        for number, adapter in enumerate(self.adapters):
            for name in adapter.sites:
                self.groups.setdefault((number, block_of(name)), []).append(name)
            if self.on_device:
                adapter.set_gates(
                    {name: adapter.lora_A(name).new_ones((), requires_grad=False) for name in adapter.sites}
                )

    def probability(self, step: int) -> float:
        """p(t)."""
        done = min(1.0, step / (self.ratio * self.total_steps))
        return self.initial_p + (1 - self.initial_p) * done

    def draw(self, step: int) -> list[tuple[int, str]]:
        """The groups that are closed in a step; never all of them."""
        p, generator = self.probability(step), np.random.default_rng([self.seed, step])
        while p < 1 and self.groups:
            drawn = generator.random(len(self.groups))
            if (drawn < p).any():
                return [group for group, u in zip(self.groups, drawn, strict=True) if u >= p]
        return []

    def before_step(self, step: int) -> None:
        self.closed = self.draw(step)
        self.set(self.closed)

    def set(self, closed: Sequence[tuple[int, str]]) -> None:
        """Close these groups and open all others."""
        for number, adapter in enumerate(self.adapters):
            names = {name for group in closed if group[0] == number for name in self.groups[group]}
            if not self.on_device:
                adapter.set_gates(dict.fromkeys(sorted(names), 0.0))
                continue
            for name, gate in adapter.gates.items():
                gate.fill_(float(name not in names))  # type: ignore[union-attr]

    def after_backward(self, step: int) -> None:
        """A gate on the device leaves gradients of zero behind, which would move moments and decay weights."""
        for number, block in self.closed:
            adapter = self.adapters[number]
            for name in self.groups[number, block]:
                layer: Any = adapter.layers[name]
                for side in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                    if adapter.adapter_name in side:
                        side[adapter.adapter_name].weight.grad = None

    def after_step(self, steps: int) -> Change:
        self.closed = []
        self.set(self.closed)
        return Change.NOTHING

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        self.set([])
        try:
            yield
        finally:
            self.set(self.closed)

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": "coto", "seed": self.seed, "initial_p": self.initial_p, "ratio": self.ratio}

    def load_state_dict(self, state: dict[str, Any]) -> Change:
        if state != self.state_dict():
            raise ValueError(f"the checkpoint was trained with {state}, got {self.state_dict()}; wanted the same")
        return Change.NOTHING
