"""Chooses the setting to try next: a first grid, then neighbours of the best, on a lattice that grows and gets finer.

Learning rate and alpha / rank change by a factor of 4 at first. A best point at the edge of what was tried has untried
neighbours beyond it, so the search goes on until its optimum is interior, or its trials are used up. When all
neighbours of the best are tried, the factor becomes its square root. Options of a method are lists: each other value is
a neighbour.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Setting = dict[str, Any]
FACTOR = 4.0
NUMBERS = ("learning_rate", "alpha_over_rank")


def key(setting: Mapping[str, Any]) -> tuple:
    return tuple(sorted((name, repr(value)) for name, value in setting.items()))


def rounded(value: float) -> float:
    """Three significant digits: settings that a person can type, and equal ones are equal."""
    return float(f"{value:.3g}")


def first_grid(
    learning_rates: Sequence[float], alphas: Sequence[float], options: Mapping[str, Sequence[Any]]
) -> list[Setting]:
    first = {name: values[0] for name, values in options.items()}
    pairs = itertools.product(alphas, learning_rates)
    return [{"learning_rate": rounded(lr), "alpha_over_rank": rounded(alpha), **first} for alpha, lr in pairs]


def neighbours(setting: Setting, options: Mapping[str, Sequence[Any]], factor: float) -> Iterator[Setting]:
    for name in NUMBERS:
        for times in (1 / factor, factor):
            yield setting | {name: rounded(setting[name] * times)}
    for name, values in options.items():
        for value in values:
            if value != setting[name]:
                yield setting | {name: value}


def next_setting(
    tried: Sequence[tuple[Setting, float]], grid: Sequence[Setting], options: Mapping[str, Sequence[Any]]
) -> Setting:
    """The first of the grid that is untried, else the first untried neighbour of the best."""
    known = {key(setting) for setting, _ in tried}
    for setting in grid:
        if key(setting) not in known:
            return setting
    best, factor = best_of(tried), FACTOR
    while True:
        for setting in neighbours(best, options, factor):
            if key(setting) not in known:
                return setting
        factor = math.sqrt(factor)


def best_of(tried: Sequence[tuple[Setting, float]]) -> Setting:
    """The setting of the least loss; a diverged one has an infinite loss."""
    return min(tried, key=lambda pair: pair[1])[0]


def is_interior(tried: Sequence[tuple[Setting, float]]) -> dict[str, bool]:
    """Per number, whether smaller and larger values were tried beside the best one's others."""
    best = best_of(tried)
    found = {}
    for name in NUMBERS:
        rest = {other: value for other, value in best.items() if other != name}
        values = [s[name] for s, _ in tried if {o: v for o, v in s.items() if o != name} == rest]
        found[name] = min(values) < best[name] < max(values)
    return found
