"""Compares the final runs: differences to the reference paired by seed, with intervals, corrected for many methods.

Pairing takes out what a seed has in common for all methods: the data's order, the noise, the subject. The interval is
Student's over the differences; p values are corrected by Holm for the number of methods; the smallest difference
that the run could have shown has 80 % power at the 5 % level.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL, POWER = 0.95, 0.8


class Comparison(NamedTuple):
    """Method minus reference, over the seeds that both have."""

    seeds: int
    difference: float
    low: float
    high: float
    p: float
    smallest_shown: float


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def compare(method: Mapping[int, float], reference: Mapping[int, float]) -> Comparison:
    """A paired t-test of losses by seed. With fewer than two common seeds every figure is NaN."""
    seeds = sorted(set(method) & set(reference))
    differences = np.array([method[seed] - reference[seed] for seed in seeds])
    if len(seeds) < 2 or not np.isfinite(differences).all():
        return Comparison(len(seeds), math.nan, math.nan, math.nan, math.nan, math.nan)
    mean, error = float(differences.mean()), float(stats.sem(differences))
    freedom = len(seeds) - 1
    if error == 0:
        return Comparison(len(seeds), mean, mean, mean, 1.0 if mean == 0 else 0.0, 0.0)
    low, high = stats.t.interval(LEVEL, freedom, loc=mean, scale=error)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Comparison(len(seeds), mean, float(low), float(high), p, smallest_difference(error, freedom))


def smallest_difference(error: float, freedom: int) -> float:
    """The difference that a two-sided paired t-test finds with `POWER`, from the standard error of the mean."""
    critical = stats.t.ppf((1 + LEVEL) / 2, freedom)

    def power(noncentrality: float) -> float:
        return float(stats.nct.sf(critical, freedom, noncentrality) + stats.nct.cdf(-critical, freedom, noncentrality))

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return high * error


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: p values that hold together for all methods. NaN stays NaN."""
    known = sorted((value, name) for name, value in p.items() if not math.isnan(value))
    corrected, running = dict.fromkeys(p, math.nan), 0.0
    for place, (value, name) in enumerate(known):
        running = max(running, min(1.0, (len(known) - place) * value))
        corrected[name] = running
    return corrected


def verdict(comparison: Comparison, p: float) -> str:
    """In words. A large p is never called equality: beside it stands `smallest_shown`."""
    if math.isnan(p):
        return "not compared"
    if p < 1 - LEVEL:
        return "better" if comparison.difference < 0 else "worse"
    return "no difference shown"
