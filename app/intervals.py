"""Intervals and tests: what few values allow to be said.

    mean        Student's t: mean ± t(n - 1) s / sqrt(n), cut where the measure ends; one value has none
    share       Wilson's interval of w / n
    sign test   two-sided exact binomial: how probable a split at least this uneven is if both are equally good

A percentile bootstrap is no substitute for t: from four values it holds the mean in four of five cases, not in 95 %.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Figure:
    """A mean or a share of n values with its 95 % interval, which a mean of one value lacks."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def interval(self) -> str:
        return "" if math.isinf(self.low) else f"({self.low:.3f} to {self.high:.3f})"

    def __str__(self) -> str:
        return f"{self.mean:.3f}{f' {self.interval}' if self.interval else ''}, n = {self.n}"


def figure(values: Iterable[float], least: float = -math.inf, most: float = math.inf) -> Figure | None:
    """Mean and t interval inside [least, most]; None for no values."""
    x = np.array(list(values), dtype=float)
    if x.size < 2:
        return Figure(float(x[0]), -math.inf, math.inf, 1) if x.size else None
    mean, half = float(x.mean()), t_quantile(x.size - 1) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Figure(mean, max(least, mean - half), min(most, mean + half), x.size)


def proportion(hits: Sequence[bool]) -> Figure | None:
    """A share; nothing but hits still has an interval."""
    return Figure(sum(hits) / len(hits), *wilson_interval(sum(hits), len(hits)), len(hits)) if hits else None


def t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t: exact for 1 and 2 degrees of freedom, by its series at the normal's from 3 on.

    >>> [round(t_quantile(n), 2) for n in (1, 2, 4, 9)]
    [12.71, 4.3, 2.77, 2.26]
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 / math.sqrt(2 * 0.975 * 0.025)
    z, n = Z_95, freedom
    series = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(series, start=1))


def wilson_interval(wins: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion; it stays inside [0, 1] and is right for few votes.

    >>> [round(x, 4) for x in wilson_interval(7, 10)]
    [0.3968, 0.8922]
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = wins / n, Z_95**2
    centre, spread = p + z2 / (2 * n), Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z2 / n)), min(1.0, (centre + spread) / (1 + z2 / n))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of the exact binomial test against 1/2.

    >>> sign_test(9, 1)
    0.021484375
    """
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)
