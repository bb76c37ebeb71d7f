"""Joining activation checkpointing as diffusers and transformers switch it on.

Both libraries put a function on the modules that checkpoint, `_gradient_checkpointing_func`, and call it as
`func(forward, *args)`; `forward` then runs twice. `cover_checkpointing` wraps that function so that both runs are
inside the contexts of every adapter with shortcuts (`Adapter.context_fn`); `uncover_checkpointing` is its inverse.
Functions that say they are reentrant are refused at once, others when a shortcut is first read without gradients.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from .forward_state import REENTRANT

ATTRIBUTE = "_gradient_checkpointing_func"


class CoveredCheckpoint:
    """A checkpoint function that carries the values of shortcuts into the second run."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.adapters: list[Any] = []  # of `core.adapter.Adapter`

    def __call__(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        pairs, ran = [adapter.context_fn() for adapter in self.adapters], False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal ran
            again, ran = ran, True
            with ExitStack() as stack:
                for pair in pairs:
                    stack.enter_context(pair[again])
                return forward(*args, **kwargs)

        return self.function(run, *args, **kwargs)


def may_checkpoint(root: nn.Module) -> list[nn.Module]:
    """Modules under `root` that both libraries put the function on. Found once: a walk costs as much as some layers."""
    return [module for module in root.modules() if hasattr(module, "gradient_checkpointing")]


def cover_checkpointing(modules: Iterable[nn.Module], adapter: Any) -> None:
    """Make those `modules` that checkpoint carry the adapter's values.

    Raises:
        RuntimeError: one of them checkpoints reentrantly.
    """
    for module in modules:
        function = module.__dict__.get(ATTRIBUTE)
        if function is None or not module.gradient_checkpointing:
            continue
        if not isinstance(function, CoveredCheckpoint):
            if isinstance(function, partial) and function.keywords.get("use_reentrant"):
                raise RuntimeError(REENTRANT)
            function = CoveredCheckpoint(function)
            setattr(module, ATTRIBUTE, function)
        if not any(known is adapter for known in function.adapters):
            function.adapters.append(adapter)


def uncover_checkpointing(modules: Iterable[nn.Module], adapter: Any) -> None:
    """Inverse of `cover_checkpointing`."""
    for module in modules:
        function = module.__dict__.get(ATTRIBUTE)
        if isinstance(function, CoveredCheckpoint):
            function.adapters = [known for known in function.adapters if known is not adapter]
            if not function.adapters:
                setattr(module, ATTRIBUTE, function.function)
