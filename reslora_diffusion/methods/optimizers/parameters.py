"""Settings that optimizers take by name, and values as a command line gives them (`--optimizer_args damping=1e-3`)."""

import ast
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from .pairs import PairOptimizer

HANDED_ON = ("betas", "eps", "weight_decay", "amsgrad", "maximize")  # by an optimizer of pairs, to AdamW


def parameters_of(kind: type[torch.optim.Optimizer]) -> dict[str, inspect.Parameter]:
    """Settings that an optimizer takes by name, without parameters and pairs; one of pairs takes `AdamW`'s too."""
    own = dict(inspect.signature(kind).parameters)
    if issubclass(kind, PairOptimizer):
        adamw = inspect.signature(torch.optim.AdamW).parameters
        own = {name: adamw[name] for name in HANDED_ON} | own
    return {name: value for name, value in own.items() if name not in ("self", "params", "pairs", "adamw")}


def literal(text: str) -> Any:
    """A Python literal, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def unknown_settings(kind: type[torch.optim.Optimizer], given: Mapping[str, Any]) -> list[str]:
    """Settings that an optimizer does not take."""
    known = parameters_of(kind)
    return [
        f"--optimizer_args: {kind.__name__} has no {name!r}; it has {', '.join(sorted(known))}"
        for name in given
        if name not in known
    ]
