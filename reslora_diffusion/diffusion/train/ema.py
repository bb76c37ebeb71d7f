"""A moving average of the adapter: what is validated and exported with `--use_ema`.

decay_t = min(decay, (1 + t) / (10 + t))      short at first, so that the start is forgotten
ema_t   = decay_t * ema_{t-1} + (1 - decay_t) * live_t
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """The average of tensors by name."""

    def __init__(self, live: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.start(live)

    def start(self, live: Mapping[str, Tensor]) -> None:
        """Begin at these tensors."""
        self.average = {name: value.detach().clone() for name, value in live.items()}

    @torch.no_grad()
    def update(self, live: Mapping[str, Tensor], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [live[name] for name in self.average], 1 - decay)

    @contextmanager
    def in_place_of(self, live: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the live tensors hold the average."""
        kept = {name: value.detach().clone() for name, value in live.items()}
        with torch.no_grad():
            for name, value in live.items():
                value.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in live.items():
                    value.copy_(kept[name])
