"""Values that cross layers, for the time of one forward of the root module.

    with root forward:                      open() ... close(), by hooks on the root
        layer n-1:  put(n-1, value)         once per forward
        layer n:    get(n-1)                the live tensor, a node of the ordinary autograd graph

Under activation checkpointing a segment runs twice, the second time in backward, when the root's forward is over. So a
segment remembers what it read from outside, detached, and its second run reads that; what it wrote itself is computed
anew. `segment()` gives the two contexts that `torch.utils.checkpoint(..., context_fn=...)` asks for. Nothing outlives
the forward but what the segments that await their second run have captured.
"""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

REENTRANT = (
    "reentrant activation checkpointing cuts the shortcuts between layers out of the gradient. Use non-reentrant "
    'checkpointing, `gradient_checkpointing_kwargs={"use_reentrant": False}`, or shortcut="block"'
)
OUTSIDE = (
    "{layer} with shortcut {shortcut!r} ran outside a forward of {root}, where its predecessors would have run too. "
    "Either it was called by itself, or it is recomputed by activation checkpointing that was not enabled through "
    "`gradient_checkpointing_enable` / `enable_gradient_checkpointing`: pass `context_fn=get_controller(model)."
    'context_fn` to `torch.utils.checkpoint`, or use shortcut="block"'
)
CHANGED = (
    "what {layer} handed on was changed in place before the next layer of its chain read it. Change a copy of it, or "
    'use shortcut="block"'
)
TIED = (
    "{layer} ran twice in one forward (layers that share their weights?): which run a shortcut should read is "
    'undefined. Use shortcut="block" or plain LoRA for it'
)


def version_of(value: Tensor) -> int | None:
    """Counts the changes of a tensor in place; None where nobody does."""
    return None if torch.compiler.is_compiling() or value.is_inference() else value._version


class Published(NamedTuple):
    """A value, and its version when it was published."""

    value: Tensor
    version: int | None

    def read(self, key: str) -> Tensor:
        """The value, if it still is what it was; raises `RuntimeError`."""
        now = version_of(self.value)
        if now is not None and self.version is not None and now != self.version:
            raise RuntimeError(CHANGED.format(layer=key.split()[0]))
        return self.value


class Scope:
    """Values of one run of the root, or of one checkpointed segment inside it."""

    def __init__(self, parent: "Scope | None" = None, captured: dict[str, Published] | None = None) -> None:
        self.parent = parent
        self.values: dict[str, Published] = {}
        self.captured = {} if captured is None else captured
        # The latest of x, its version, x', x + x'; with gradients?
        self.sum: tuple[Tensor, int | None, Tensor, Tensor, bool] | None = None

    def put(self, key: str, value: Published) -> None:
        """Visible here and to all that comes after, in this segment and in the ones around it."""
        self.values[key] = value
        if self.parent is not None:
            self.parent.put(key, value)

    def get(self, key: str) -> Tensor | None:
        if self.parent is None or key in self.values:
            found = self.values.get(key) or self.captured.get(key)
            return None if found is None else found.read(key)
        value = self.parent.get(key)
        if value is not None:
            # Detached, so that no segment holds another's graph; as differentiable as the original, so that the second
            # run saves as many tensors as the first.
            kept = value.detach().requires_grad_(value.requires_grad)
            self.captured[key] = Published(kept, version_of(kept))
        return value

    def drop(self, key: str) -> None:
        self.values.pop(key, None)
        if self.parent is not None:
            self.parent.drop(key)


class ForwardContext:
    """The open scopes of one (model, adapter)."""

    def __init__(self) -> None:
        self.scope: Scope | None = None
        self.written: set[str] = set()
        self.with_grad = False
        self.outer: list[tuple[Scope | None, set[str], bool]] = []

    def __deepcopy__(self, memo: dict) -> "ForwardContext":
        return ForwardContext()

    def open(self) -> None:
        """Begin a forward; one that began before and is not over waits."""
        self.outer.append((self.scope, self.written, self.with_grad))
        self.scope, self.written, self.with_grad = Scope(), set(), torch.is_grad_enabled()

    def close(self) -> None:
        """Inverse of `open`."""
        if self.outer:
            self.scope, self.written, self.with_grad = self.outer.pop()

    def put(self, key: str, value: Tensor) -> None:
        """Publish a value of this forward.

        Raises:
            RuntimeError: it was published before.
        """
        scope = self.scope
        assert scope is not None
        if key in scope.values or (not isinstance(scope, RecomputedScope) and key in self.written):
            raise RuntimeError(TIED.format(layer=key.split()[0]))
        self.written.add(key)
        scope.put(key, Published(value, version_of(value)))

    def get(self, key: str) -> Tensor | None:
        """A value of this forward, or None if there is none.

        Raises:
            RuntimeError: gradients are off though the root's forward began with them: reentrant checkpointing. Or the
                value is not what it was.
        """
        if self.with_grad and not torch.is_grad_enabled():
            raise RuntimeError(REENTRANT)
        return self.scope.get(key) if self.scope is not None else None

    def drop(self, key: str) -> None:
        """Forget a value that nobody will read again."""
        if self.scope is not None:
            self.scope.drop(key)

    def retract(self, key: str) -> None:
        """Inverse of `put`."""
        self.drop(key)
        self.written.discard(key)

    def segment(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts of a checkpointed segment's first and second run."""
        first = FirstRun(self)
        return first, SecondRun(self, first)


class RecomputedScope(Scope):
    """Values of a segment's second run."""


class FirstRun(AbstractContextManager):
    def __init__(self, context: ForwardContext) -> None:
        self.context = context
        self.captured: dict[str, Published] = {}

    def __enter__(self) -> None:
        self.outer = self.context.scope
        kind = RecomputedScope if isinstance(self.outer, RecomputedScope) else Scope
        self.context.scope = kind(self.outer, self.captured)

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.context.scope, self.outer = self.outer, None


class SecondRun(AbstractContextManager):
    def __init__(self, context: ForwardContext, first: FirstRun) -> None:
        self.context, self.first = context, first

    def __enter__(self) -> None:
        self.outer = self.context.scope, self.context.with_grad
        self.context.scope = RecomputedScope(captured=self.first.captured)
        self.context.with_grad = True

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.context.scope, self.context.with_grad = self.outer
        del self.outer
