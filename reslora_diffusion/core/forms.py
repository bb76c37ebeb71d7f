"""Which of several equal ways to compute an adapted layer takes the least arithmetic (RunLoRA, arXiv 2312.03415).

With x [T, in], W [out, in], D [R, in], U [out, R] and g = dL/dy [T, out], multiplications beside x W^T and g W:

                through rank R                                  through matrices as large as W
    y           z = x D^T, z U^T           T R (in + out)       V = W + s U D, x V^T         R in out
    dD, dU      t = s g U, t^T x, s g^T z  T R (in + 2 out)     G = g^T x, s U^T G, s G D^T  (T + 2 R) in out
    dx          t D                        T R in               g V                          R in out

and where one of them needs a z, t or V that no other has left behind, that too. Large matrices win where there are many
more rows than features and R is not small beside these: small models, long sequences, and `block`, whose R is the sum
over its window. The choice is a function of shapes, the same in every run; nothing is timed. Passes over memory and
launches are counted as well, as so many multiplications: that ranks the forms as they rank when measured (docs/LOG.md).

Only for weights and factors in float32 or float64: in bf16, W + s U D loses most of a small update.
"""

import logging
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)
EXACT = (torch.float32, torch.float64)
PASS = 20  # multiplications in the time that it takes to write an element of V beside computing it
LAUNCH = 1e5  # multiplications in the time that it takes to begin an operation: 2 us at 50 a nanosecond
SMALL = 2**16  # elements of a V that may be kept for backward whatever the low-rank form keeps: 256 KiB in float32


class Form(NamedTuple):
    """Which of y, (dD, dU) and dx go through large matrices, and whether V is kept from y for dx.

    A gradient that is not wanted is said to go through them: nothing goes through rank R for it.
    """

    y: bool
    factors: bool
    x: bool
    keeps: bool

    @property
    def entirely(self) -> bool:
        """Whether nothing goes through rank R."""
        return self.y and self.factors and self.x


LOW_RANK = Form(False, False, False, False)


def cost(
    form: Form, rows: int, width: int, out: int, rank: int, parts: int = 1, for_x: bool = True, for_factors: bool = True
) -> float:
    """Multiplications of a forward and backward beside those of the frozen layer, with what `PASS` and `LAUNCH` add."""
    z, t, V = rows * rank * width, rows * rank * out, (rank + PASS) * width * out
    stack, products = (0, parts) if parts == 1 or form.entirely else (2, 1)  # D and U are put together, or not
    total, launches = (V, stack + products) if form.y else (z + t, stack + 2)
    if for_factors and form.factors:
        total += (rows + 2 * rank) * width * out
        launches += 1 + 2 * parts
    elif for_factors:
        total += z + 2 * t + (z if form.y else 0)
        launches += 3 + stack + (1 if form.y else 0)
    if for_x and form.x:
        total += 0 if form.keeps else V
        launches += 0 if form.keeps else products
    elif for_x:
        total += z + (t if form.factors else 0)
        launches += 2 if form.factors else 1
    return total + LAUNCH * launches


@lru_cache(maxsize=4096)
def cheapest(
    rows: int, width: int, out: int, rank: int, parts: int = 1, for_x: bool = True, for_factors: bool = True
) -> Form:
    """The form that costs least, of those that keep no more for backward than the low-rank form, or little.

    Args:
        rank: R, the sum over all parts.
        parts: how many factors D is put together from, and U.
        for_x, for_factors: which gradients will be wanted.
    """
    low_rank_keeps = (rows * rank if for_factors else 0) + (rank * (width + out) if parts > 1 else 0)
    may_keep = for_x and width * out <= max(low_rank_keeps, SMALL)
    every = [Form(y, factors, x, may_keep and y and x) for y, factors, x in product((False, True), repeat=3)]
    forms = [form for form in every if (form.factors or for_factors) and (form.x or for_x)]
    best = min(forms, key=lambda form: cost(form, rows, width, out, rank, parts, for_x, for_factors))
    large = [name for name, yes in (("y", best.y), ("dD and dU", best.factors), ("dx", best.x)) if yes]
    log.debug("%d rows, %d to %d features, rank %d: %s through large matrices", rows, width, out, rank, large)
    return best
