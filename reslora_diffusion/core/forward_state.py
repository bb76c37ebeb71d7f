"""Values that cross layers, for the time of one forward of the root module.

    with root forward:                      open() ... close(), by hooks on the root
        layer n-1:  put(n-1, value)         once per forward
        layer n:    get(n-1)                the live tensor, a node of the ordinary autograd graph

Under activation checkpointing a segment runs twice, the second time in backward, when the root's forward is over. So a
segment remembers what it read from outside, detached, and its second run reads that; what it wrote itself is computed
anew. `segment()` gives the two contexts that `torch.utils.checkpoint(..., context_fn=...)` asks for. Nothing outlives
the forward but what the segments that await their second run have captured.
"""

import threading
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .functional import version_of

REENTRANT = (
    "reentrant activation checkpointing cuts the shortcuts between layers out of the gradient; use "
    '`gradient_checkpointing_kwargs={"use_reentrant": False}`, or shortcut="block"'
)
OUTSIDE = (
    "{layer} with shortcut {shortcut!r} ran outside a forward of {root}: by itself, or recomputed by activation "
    "checkpointing that was not enabled through `gradient_checkpointing_enable` / `enable_gradient_checkpointing` "
    '(pass `context_fn=get_adapter(model).context_fn` to `torch.utils.checkpoint`, or use shortcut="block")'
)
CHANGED = (
    "what {layer} handed on was changed in place before the next layer of its chain read it; change a copy of it, or "
    'use shortcut="block"'
)
TIED = (
    "{layer} ran twice in one forward (layers that share their weights?), and a shortcut could read either run; use "
    'shortcut="block" or plain LoRA for it'
)
THREADS = (
    "two threads run a forward of one model with shortcuts at one time; let one wait (a lock), give each thread a copy "
    '(copy.deepcopy), merge the adapter first, or use shortcut="block"'
)


class Published(NamedTuple):
    """A value that a layer hands on: x_n itself, or one `projected` to rank r; and its version at that time."""

    value: Tensor
    version: int | None
    projected: bool

    def unchanged(self, name: str) -> "Published":
        """Return itself, or raise `RuntimeError` if the value was changed in place since."""
        now = version_of(self.value)
        if now is not None and self.version is not None and now != self.version:
            raise RuntimeError(CHANGED.format(layer=name))
        return self


class Sum(NamedTuple):
    """The latest x + x', and what it was made of; layers that read the same two share it."""

    x: Tensor
    version: int | None
    previous: Tensor
    total: Tensor
    with_grad: bool


class Scope:
    """Values of one run of the root, or of one checkpointed segment inside it."""

    def __init__(
        self, parent: "Scope | None" = None, captured: dict[str, Published] | None = None, again: bool = False
    ) -> None:
        self.parent = parent
        self.again = again  # whether this is a second run, which publishes what was published before
        self.values: dict[str, Published] = {}
        self.captured = {} if captured is None else captured
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}  # what was captured, and its copy
        self.latest: Sum | None = None

    def put(self, name: str, published: Published) -> None:
        """Make a value visible here and to all that comes after, in this segment and in the ones around it."""
        self.values[name] = published
        if self.parent is not None:
            self.parent.put(name, published)

    def get(self, name: str) -> Published | None:
        if self.parent is None or name in self.values:
            found = self.values.get(name) or self.captured.get(name)
            return None if found is None else found.unchanged(name)
        found = self.parent.get(name)
        if found is not None:
            # Detached, so that no segment holds another's graph; as differentiable as the original, so that the second
            # run saves as many tensors as the first. What is one tensor for several layers stays one.
            value = found.value
            original, copy = self.copies.get(id(value), (None, value))
            if original is not value:
                copy = value.detach().requires_grad_(value.requires_grad)
                self.copies[id(value)] = value, copy
            self.captured[name] = Published(copy, version_of(copy), found.projected)
        return found

    def drop(self, name: str) -> None:
        self.values.pop(name, None)
        if self.parent is not None:
            self.parent.drop(name)

    def sum(self, x: Tensor, previous: Tensor) -> Tensor:
        """x + previous, computed once for all layers that read the two."""
        version, with_grad, known = version_of(x), torch.is_grad_enabled(), self.latest
        same = known is not None and known.x is x and known.previous is previous and known.with_grad == with_grad
        if known is None or not same or version is None or known.version != version:
            known = self.latest = Sum(x, version, previous, x + previous.to(x), with_grad)
        return known.total


class ForwardState:
    """The open scopes of one (model, adapter), all of one thread."""

    def __init__(self) -> None:
        self.scope: Scope | None = None
        self.written: set[str] = set()
        self.with_grad = False
        self.outer: list[tuple[nn.Module, Scope | None, set[str], bool]] = []  # roots that run, what was open around
        self.thread = 0  # that the latest forward began in

    def __deepcopy__(self, memo: dict) -> "ForwardState":
        return ForwardState()

    def open(self, root: nn.Module) -> None:
        """Begin a forward of `root`; one of another root that began before and is not over waits."""
        if not torch.compiler.is_compiling():
            if self.outer and self.thread != threading.get_ident():
                raise RuntimeError(THREADS)
            self.thread = threading.get_ident()
            self.close(root)  # Ctrl-C ends a forward without its hooks
        self.outer.append((root, self.scope, self.written, self.with_grad))
        self.scope, self.written, self.with_grad = Scope(), set(), torch.is_grad_enabled()

    def close(self, root: nn.Module) -> None:
        """Inverse of `open`, also for what began inside. Nothing where the root was not opened by this thread."""
        if not torch.compiler.is_compiling() and self.thread != threading.get_ident():
            return
        while any(root is running for running, *_ in self.outer):
            _, self.scope, self.written, self.with_grad = self.outer.pop()

    def put(self, name: str, value: Tensor, projected: bool = False) -> None:
        """Publish a value of this forward; a layer may do so once."""
        scope = self.scope
        assert scope is not None
        if name in scope.values or (not scope.again and name in self.written):
            raise RuntimeError(TIED.format(layer=name))
        self.written.add(name)
        scope.put(name, Published(value, version_of(value), projected))

    def get(self, name: str) -> Published | None:
        """The value that a layer published in this forward, or None."""
        if self.with_grad and not torch.is_grad_enabled():  # though the root's forward began with gradients
            raise RuntimeError(REENTRANT)
        return self.scope.get(name) if self.scope is not None else None

    def drop(self, name: str) -> None:
        """Forget a value that nobody will read again."""
        if self.scope is not None:
            self.scope.drop(name)

    def retract(self, name: str) -> None:
        """Inverse of `put`."""
        self.drop(name)
        self.written.discard(name)

    def segment(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts of a segment's first run, which captures what it reads from outside, and of its second, which reads
        that."""
        captured: dict[str, Published] = {}
        return Segment(self, captured), Segment(self, captured, again=True)


class Segment(AbstractContextManager):
    """One run of a checkpointed segment, in a scope of its own; the second run may be entered more than once."""

    def __init__(self, state: ForwardState, captured: dict[str, Published], again: bool = False) -> None:
        self.state, self.captured, self.again = state, captured, again

    def __enter__(self) -> None:
        state = self.state
        outer, _ = self.outer = state.scope, state.with_grad
        if self.again:
            state.scope, state.with_grad = Scope(captured=self.captured, again=True), True
        else:
            state.scope = Scope(outer, self.captured, outer is not None and outer.again)

    def __exit__(self, *error: object) -> None:
        self.state.scope, self.state.with_grad = self.outer
        del self.outer
