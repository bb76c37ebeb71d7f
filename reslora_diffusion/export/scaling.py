"""Finds the factor by which a PEFT configuration scales lora_B @ lora_A: alpha / r, or alpha / sqrt(r) (`use_rslora`).

`alpha_pattern` maps names, or regular expressions for the end of names, to other alphas; the first that fits counts.
Such files are untrusted, and an expression may take longer than the universe has. So names are looked up, and
only what is no name is run: briefly, and without repeated groups, which alone make the time explode.
"""

import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..utils.problems import shortened

if TYPE_CHECKING:  # names need not wait for it
    import regex

LARGEST_PATTERN = 2000  # characters
LARGEST_COUNT = 100  # of a bounded repetition
MOST_EXPRESSIONS = 200
LONG_NAME = 200  # characters of a module's name
SECONDS = 0.5  # for all expressions of one file together
NAME = re.compile(r"[\w.-]+")
UNBOUNDED = re.compile(r"[*+]|\{\d*,\}")
RISKY = re.compile(r"\)[*+{]|\(\?(?!:)|\\[1-9gk]|[*+?}][*+{]")  # repeated groups, look-around, references back


class Patterns:
    """The `alpha_pattern` of one configuration.

    >>> Patterns({"layers.0.q_proj": 8, r"layers\\.\\d+\\.v_proj": 4}).find(["model.layers.3.v_proj"])
    4.0

    Raises:
        ValueError: it is no table of numbers, or an expression will not be run.
    """

    def __init__(self, stated: object) -> None:
        if not isinstance(stated, Mapping):
            raise ValueError(f"alpha_pattern is {shortened(stated)}, wanted a table of names and numbers")
        self.alphas = [number(value, f"alpha_pattern of {shortened(name)}") for name, value in stated.items()]
        self.places: dict[str, int] = {}
        self.expressions: list[tuple[int, regex.Pattern[str]]] = []
        self.left = SECONDS
        for place, pattern in enumerate(stated):
            if NAME.fullmatch(pattern.removeprefix("^")):
                self.places[pattern] = place
            else:
                self.expressions.append((place, compiled(pattern, "alpha_pattern")))
            if len(self.expressions) > MOST_EXPRESSIONS:
                raise ValueError(f"alpha_pattern has more than {MOST_EXPRESSIONS} expressions: refused")

    def find(self, names: list[str]) -> float | None:
        """The alpha of a module that goes by any of these names; None if nothing fits."""
        fits = [self.places[key] for name in names for key in ends(name) if key in self.places]
        first = min(fits, default=len(self.alphas))
        for place, expression in self.expressions:
            if place > first:
                break
            if any(self.matches(expression, name) for name in names):
                first = place
                break
        return self.alphas[first] if first < len(self.alphas) else None

    def matches(self, expression: "regex.Pattern[str]", name: str) -> bool:
        begin = time.monotonic()
        try:
            return expression.match(name, timeout=max(self.left, 1e-3), concurrent=True) is not None
        except TimeoutError:
            raise ValueError(f"its alpha_pattern takes more than {SECONDS} s to match: refused") from None
        finally:
            self.left -= time.monotonic() - begin


def ends(name: str) -> list[str]:
    """`^a.b`, `a.b` and `b` of `a.b`: what a pattern may look for."""
    parts = name.split(".")
    return [f"^{name}", *(".".join(parts[n:]) for n in range(len(parts)))]


def compiled(pattern: str, what: str) -> "regex.Pattern[str]":
    """PEFT's own expression around a pattern, by an engine that stops when asked to.

    Raises:
        ValueError: it is none, or could take too long for any engine.
    """
    import regex  # names need not wait for it

    counts = [int(count) for count in re.findall(r"\d+", " ".join(re.findall(r"\{([^}]*)\}", pattern)))]
    if len(pattern) > LARGEST_PATTERN or RISKY.search(pattern) or max(counts, default=0) > LARGEST_COUNT:
        raise ValueError(
            f"{what} {shortened(pattern)} is an expression that will not be run; wanted names of modules, or "
            f"up to {LARGEST_PATTERN} characters without repeated groups"
        )
    whole = pattern if what == "target_modules" else rf"(.*\.)?({pattern})$"
    try:
        return regex.compile(whole)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{what} {shortened(pattern)} is no regular expression: {error}") from None


def endless_fields(config: Mapping, names: Iterable[str]) -> list[str]:
    """Fields with expressions that PEFT would match against `names` by an engine without a limit of time, and that may
    need one: those that will not be run, or that repeat more than twice without a bound."""
    long = max(map(len, names), default=0) > LONG_NAME
    return [
        field
        for field in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
        if any(long or RISKY.search(p) or len(UNBOUNDED.findall(p)) > 2 for p in expressions_in(config, field))
    ]


def expressions_in(config: Mapping, field: str) -> list[str]:
    """Return the entries of a field that are no names. PEFT takes every entry of a list of target modules as a name."""
    stated = config.get(field)
    several = [stated] if isinstance(stated, str) else list(stated or ()) if field.endswith("_pattern") else []
    return [pattern for pattern in map(str, several) if not NAME.fullmatch(pattern)]


def matched(expression: str, names: Iterable[str]) -> list[str]:
    """The modules that `target_modules` means, if it can be found out in time.

    Raises:
        ValueError: it cannot.
    """
    engine, left = compiled(expression, "target_modules"), SECONDS
    found = []
    for name in names:
        begin = time.monotonic()
        try:
            if engine.fullmatch(name, timeout=max(left, 1e-3), concurrent=True):
                found.append(name)
        except TimeoutError:
            raise ValueError(f"target_modules {shortened(expression)} takes more than {SECONDS} s: refused") from None
        left -= time.monotonic() - begin
    return found


def number(value: object, what: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise ValueError(f"{what} is {shortened(value)}, wanted a number")


class StatedScaling:
    """Scaling of modules under one configuration, read once.

    Raises:
        ValueError: it states none.
    """

    def __init__(self, config: Mapping) -> None:
        alpha = config.get("lora_alpha")
        self.alpha = None if alpha is None else number(alpha, "lora_alpha")
        self.patterns = Patterns(config.get("alpha_pattern") or {})
        self.rank_stabilised = bool(config.get("use_rslora"))

    def of(self, path: str, rank: int) -> float:
        """The scaling of the module at `path`, whose CLIP layout may differ from the configuration's."""
        alpha = self.patterns.find(list(dict.fromkeys((path, path.removeprefix("text_model.")))))
        if alpha is None:
            alpha = rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank
