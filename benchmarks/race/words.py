"""Numbers as the report writes them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from .statistics import mean_and_sd


def number(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return "–"
    if value == math.inf:
        return "diverged"
    return f"{value:.{digits}g}"


def p_value(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else number(value, 2)


def signed(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:+.{digits}g}"


def spread(values: Iterable[float], digits: int = 3, write: Callable[..., str] = number) -> str:
    """Mean ± standard deviation."""
    values = list(values)
    if not values:
        return "–"
    mean, sd = mean_and_sd(values)
    return write(mean, digits) if math.isnan(sd) else f"{write(mean, digits)} ± {number(sd, 2)}"


def loss_with_spread(values: Iterable[float], write: Callable[..., str] = number) -> str:
    """Mean and spread of losses or their changes, of which some may be of runs that diverged."""
    values = list(values)
    finite = [value for value in values if math.isfinite(value)]
    lost = f"{len(values) - len(finite)} of {len(values)} diverged"
    if len(finite) == len(values):
        return spread(values, write=write)
    return f"{spread(finite, write=write)}, {lost}" if finite else lost


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def settings_of(setting: Mapping[str, float]) -> list[str]:
    return [f"{setting['learning_rate']:g}", f"{setting['alpha_over_rank']:g}"]


def own_options(setting: Mapping[str, object]) -> str:
    own = {name: value for name, value in setting.items() if name not in ("learning_rate", "alpha_over_rank")}
    return ", ".join(f"{name} = {'all' if value is None else value}" for name, value in own.items())


def count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
