"""Joining activation checkpointing as diffusers and transformers switch it on.

Both libraries put a function on the modules that checkpoint, `_gradient_checkpointing_func`, and call it as
`func(forward, *args)`; `forward` then runs twice. `cover_checkpointing` wraps that function so that both runs are
inside the contexts of every adapter with shortcuts (`Controller.context_fn`); `uncover_checkpointing` is its inverse.
Functions that say they are reentrant are refused at once, others when a shortcut is first read without gradients.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Protocol

from torch import nn

from .context import REENTRANT

ATTRIBUTE = "_gradient_checkpointing_func"


class HasContexts(Protocol):
    def context_fn(self) -> tuple[AbstractContextManager, AbstractContextManager]: ...


class Segment:
    """A checkpointed forward: its first call is inside the first contexts, every later one inside the second."""

    def __init__(self, forward: Any, controllers: list[HasContexts]) -> None:
        self.forward = forward
        self.pairs = [controller.context_fn() for controller in controllers]
        self.ran = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run, self.ran = int(self.ran), True
        with ExitStack() as stack:
            for pair in self.pairs:
                stack.enter_context(pair[run])
            return self.forward(*args, **kwargs)


class CoveredCheckpoint:
    """A checkpoint function that carries the values of shortcuts into the second run."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.controllers: list[HasContexts] = []

    def __call__(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(Segment(forward, self.controllers), *args, **kwargs)


def is_reentrant(function: Any) -> bool:
    return isinstance(function, partial) and bool(function.keywords.get("use_reentrant", False))


def may_checkpoint(root: nn.Module) -> list[nn.Module]:
    """Modules under `root` that both libraries put the function on. Found once: a walk costs as much as some layers."""
    return [module for module in root.modules() if hasattr(module, "gradient_checkpointing")]


def cover_checkpointing(modules: Iterable[nn.Module], controller: HasContexts) -> None:
    """Make those `modules` that checkpoint carry the controller's values.

    Raises:
        RuntimeError: one of them checkpoints reentrantly.
    """
    for module in modules:
        function = module.__dict__.get(ATTRIBUTE)
        if function is None or not module.gradient_checkpointing:
            continue
        if not isinstance(function, CoveredCheckpoint):
            if is_reentrant(function):
                raise RuntimeError(REENTRANT)
            function = CoveredCheckpoint(function)
            setattr(module, ATTRIBUTE, function)
        if not any(known is controller for known in function.controllers):
            function.controllers.append(controller)


def uncover_checkpointing(modules: Iterable[nn.Module], controller: HasContexts) -> None:
    """Inverse of `cover_checkpointing`."""
    for module in modules:
        function = module.__dict__.get(ATTRIBUTE)
        if isinstance(function, CoveredCheckpoint):
            function.controllers = [known for known in function.controllers if known is not controller]
            if not function.controllers:
                setattr(module, ATTRIBUTE, function.function)
