"""Prompts on their way to the denoiser.

Tokens    ids [P, E, L] for E text encoders that can be trained, and what an encoder that is never trained makes of the
          prompts
Texts     hidden states [P, L, D], and for some families a pooled vector [P, D2]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from .long_prompts import joined

if TYPE_CHECKING:
    from torch import Tensor


class Tokens(NamedTuple):
    """Prompts that the text encoders have yet to encode. `fixed` are states [P, L2, D] that never change, or ids
    [P, L2] of an encoder with new tokens; `mask` [P, L2] tells states from padding; `weights` [P, E, L] of the states
    of the ids, where prompts have some."""

    ids: Tensor
    fixed: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None

    def each(self) -> Iterator[Tokens]:
        """The prompts by themselves."""
        for place in range(len(self.ids)):
            yield Tokens(*(None if part is None else part[place : place + 1] for part in self))  # type: ignore[arg-type]

    def weighed(self, states: Tensor, place: int, pieces: int) -> Tensor:
        """States [P, L, D] of encoder `place`, joined from `pieces`, times the weights of their tokens."""
        if self.weights is None:
            return states
        weights = self.weights[:, place].reshape(len(states) * pieces, -1, 1)
        return states * joined(weights, pieces).to(states.dtype)


class Texts(NamedTuple):
    """Encoded prompts. `mask` [P, L] is true where `hidden` is no padding; None if nothing of it is."""

    hidden: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    @property
    def given_mask(self) -> Tensor:
        """`mask`, with nothing masked where there is none."""
        return self.hidden.new_ones(self.hidden.shape[:2], dtype=bool) if self.mask is None else self.mask  # type: ignore[call-overload]
