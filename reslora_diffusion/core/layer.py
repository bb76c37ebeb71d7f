"""One adapted layer, as its shortcut sees it: its own factors, those of its window, and what crosses layers.

`AdaptedLayer.forward` is the default path: the shortcut builds the operation, `core.kernels.choose` picks a kernel, the
kernel computes y and what is handed on. Lookups that are the same in every forward are made once, in the constructor:
for a small layer they would take as long as the arithmetic. Parameters are read anew each time, as optimizers,
`functional_call`, sharding and PEFT may put others in their place.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..rules import Shortcut
from .chains import Site
from .forward_state import OUTSIDE, ForwardState, Published
from .functional import LinearOp, LoraFactors, side_by_side, version_of
from .kernels import Choice, choose
from .sharding import whole

Gate = float | Tensor  # multiplies s B A of a block wherever it is used; a tensor is a scalar on the device


class Observer(Protocol):
    """Sees what flows through the shortcuts; see `core.merging.statistics`."""

    def see(self, layer: "AdaptedLayer", x: Tensor, values: list[tuple[str, Tensor]]) -> None: ...


class Packed(NamedTuple):
    """Factors that were cast and laid side by side for one forward (`core.packed`)."""

    D: tuple[Tensor]
    U: tuple[Tensor]
    ahead: Tensor | None
    with_grad: bool  # whether gradients were recorded; a forward of another thread may have packed without them


class Prepared(NamedTuple):
    """An output that was computed together with others (`core.grouping`), for a layer that is called with `x`."""

    x: Tensor
    version: int | None
    y: Tensor


class Shared:
    """The state that all layers of one adapter share; `core.adapter.Adapter` is one."""

    def __init__(self, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        self.shortcut = Shortcut.NONE
        self.context = ForwardState()
        self.roots: dict[str, nn.Module] = {}  # modules whose forward opens the context
        self.dropless = True
        self.ordinary = True  # no factor is sharded or parametrised
        self.packed: dict[str, Packed] = {}
        self.prepared: dict[str, Prepared] = {}
        self.skipped: dict[str, int] = {}  # links that could not be used, by layer
        self.kernel: str | None = None  # the kernel that computes all operations; None leaves it to `choose`
        self.observer: Observer | None = None
        self.merged: dict[str, LoraFactors] | None = None  # inside `merged_forward`: what the layers compute instead
        self.gates: dict[str, Gate] = {}
        self.frozen: dict[str, list[tuple[Tensor, Tensor]]] = {}  # more (A, B) of a block, under its scaling
        self.transform: Callable[[AdaptedLayer, LinearOp], Callable[[Tensor], Tensor] | None] | None = None


class AdaptedLayer:
    """Layer `site` of an adapter; `window`, `reads`, ... are given by `Adapter.link`."""

    def __init__(self, site: Site, module: Any, shared: Shared) -> None:
        self.site, self.name, self.module, self.shared = site, site.name, module, shared
        self.base: nn.Module = module.get_base_layer()
        self.scalings: dict[str, float] = module.scaling
        self.downs, self.ups = module.lora_A._modules, module.lora_B._modules
        self.path: Any  # its shortcut, of `core.shortcuts`
        self.window: tuple[AdaptedLayer, ...] = ()  # the blocks that this one reaches back to, nearest first
        self.reads: tuple[AdaptedLayer, ...] = ()  # those whose published values it takes in
        self.blocks: tuple[AdaptedLayer, ...] = (self,)  # those whose factors it applies to its own input
        self.follower: AdaptedLayer | None = None
        self.readers = 0  # how many layers read what this one publishes
        self.sums = False  # whether it publishes the running sum of its chain
        self.choice: Choice | None = None  # of the last forward
        self.reason: str | None = None  # why the frozen layer computes its own output, found before PEFT's forward

    # ------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        """y [..., out] of x [..., in]; `base` is the frozen layer's output, where it must compute that itself."""
        shared = self.shared
        if shared.merged is not None:
            op = self.merged_op(x, shared.merged[self.name])
        else:
            op = self.path.op(self, x)
        if base is not None:
            op = op._replace(base=base)
        if shared.transform is not None:
            op = op._replace(transform=shared.transform(self, op))
        choice = self.choice = choose(op, self.reason, shared.kernel)
        y, value = choice.kernel(op)
        if self.reads and shared.merged is None:
            self.forget_read()
        if value is not None:
            self.publish(value, projected=True)
        return y

    def merged_op(self, x: Tensor, factors: LoraFactors) -> LinearOp:
        """Plain LoRA with other factors than the layer's own."""
        A, B, scaling = factors
        return LinearOp(x, *self.frozen(), [A.to(x)], [B.to(x)], [scaling], self.dropped(x))

    def take_prepared(self, x: Tensor) -> Tensor | None:
        """The output that was computed ahead for this x, if there is one."""
        found = self.shared.prepared.pop(self.name, None)
        if found is None:
            return None
        if found.x is x and found.version == version_of(x):
            self.forget_read()
            return found.y
        self.shared.context.retract(self.name)
        return None

    def own_output_reason(self) -> str | None:
        """Return why the frozen layer must compute its own output, by PEFT's forward, if so."""
        module, base = self.module, self.base
        if not self.shared.ordinary:
            return "factors that are sharded or parametrised"
        if module.disable_adapters or module.merged_adapters:
            return "disabled or merged"
        if type(base) is not nn.Linear:
            return f"{type(base).__name__} is not a plain linear layer"
        if module._modules["base_layer"] is not base:
            return "a base layer that was replaced"
        if "weight" not in base._parameters:
            return "a base weight that is computed from others (pruned, normalised, parametrised)"
        hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        if hooks or "forward" in base.__dict__:
            return "hooks on the base layer"
        return None

    # ------------------------------------------------------------------------------- what an operation is made of

    def frozen(self) -> tuple[Tensor | None, Tensor | None]:
        """`(W, b)` of the frozen layer; None for what it does not have, or makes of other parameters."""
        parameters = self.base._parameters
        return parameters.get("weight"), parameters.get("bias")

    def factors(self, x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Gate]]:
        """`(D, U, scalings)` of the layer's `blocks`, in the precision of x and on its device."""
        shared = self.shared
        scaling = self.scalings[shared.adapter_name]
        if (found := self.packed(x)) is not None:
            return found.D, found.U, (scaling,)
        if shared.gates or shared.frozen:
            return self.gated_factors(x, scaling)
        if shared.ordinary and not torch.compiler.is_compiling():
            name = shared.adapter_name
            D = [block.downs[name]._parameters["weight"] for block in self.blocks]
            U = [block.ups[name]._parameters["weight"] for block in self.blocks]
        else:
            pairs = [block.own_factors() for block in self.blocks]
            D, U = [A for A, _ in pairs], [B for _, B in pairs]
        if D[0].dtype == x.dtype and x.is_cpu and D[-1].device == x.device:  # the block farthest back
            return D, U, (scaling,) * len(D)
        # Put together as they are when they are packed: computed again for backward, they are not packed any more, and
        # checkpointing wants the same tensors saved in both runs.
        down, up = side_by_side([A.to(x) for A in D], [B.to(x) for B in U])
        return (down,), (up,), (scaling,)

    def packed(self, x: Tensor) -> Packed | None:
        """The factors that were packed for this forward, if they have the precision of x and gradients where wanted."""
        found = self.shared.packed.get(self.name)
        if found is None or found.D[0].dtype != x.dtype or (torch.is_grad_enabled() and not found.with_grad):
            return None
        return found

    def gated_factors(self, x: Tensor, scaling: float) -> tuple[list[Tensor], list[Tensor], list[Gate]]:
        """`factors` with gates and frozen factors. Parts whose gate is the number 0 are left out, unless all are."""
        gates, parts = self.shared.gates, []
        for block in self.blocks:
            gate = gates.get(block.name, 1.0)
            pairs = [block.own_factors(), *self.shared.frozen.get(block.name, ())]
            parts += [(A.to(x), B.to(x), scaling * gate) for A, B in pairs]  # frozen ones stay behind on `model.to`
        kept = [part for part in parts if torch.is_tensor(part[2]) or part[2] != 0] or parts[:1]
        D, U, scalings = (list(column) for column in zip(*kept, strict=True))
        return D, U, scalings

    def own_factors(self) -> tuple[Tensor, Tensor]:
        """`(lora_A, lora_B)`, gathered where they are sharded."""
        name = self.shared.adapter_name
        return whole(self.module.lora_A[name].weight), whole(self.module.lora_B[name].weight)

    def gated(self, D: Sequence[Tensor]) -> Sequence[Tensor]:
        """Down-projections times the layer's own gate."""
        gate = self.own_gate
        return D if self.closed or (isinstance(gate, float) and gate == 1) else [gate * A for A in D]

    @property
    def own_gate(self) -> Gate:
        """The gate of the layer's own block; what is merged has none."""
        return 1.0 if self.shared.merged is not None else self.shared.gates.get(self.name, 1.0)

    @property
    def closed(self) -> bool:
        """Return whether the gates of all its blocks are the number 0: then it adds and reads nothing."""
        gates = self.shared.gates
        if not gates or self.shared.merged is not None:
            return False
        own = [gates.get(block.name, 1.0) for block in self.blocks]
        return not any(isinstance(gate, Tensor) or gate != 0 for gate in own)

    def dropped(self, x: Tensor, otherwise: Tensor | None = None) -> Tensor | None:
        """x after the dropout of the adapter; `otherwise` where there is none."""
        if self.shared.dropless or self.closed:
            return otherwise
        dropout = self.module.lora_dropout[self.shared.adapter_name]
        return dropout(x) if dropout.training and not isinstance(dropout, nn.Identity) else otherwise

    # --------------------------------------------------------------------------------- what crosses layers: `input`

    def reads_ahead(self, x: Tensor) -> bool:
        """Return whether `input` is carried at rank r: A_{n+1} x_n by layer n, instead of x_n + x_{n+1} by layer n + 1.

        That saves launches and memory on a device, and costs time on a CPU that need not cast the factors. Dropout acts
        on the sum, and an observer wants to see x_n.
        """
        shared = self.shared
        if not shared.dropless or shared.observer is not None:
            return False
        return not x.is_cpu or self.downs[shared.adapter_name].weight.dtype != x.dtype

    def ahead(self, x: Tensor) -> Tensor:
        """`lora_A` of the next layer, in the precision of x."""
        found = self.packed(x)
        if found is not None and found.ahead is not None:
            return found.ahead
        assert self.follower is not None
        return self.follower.own_factors()[0].to(x)

    def sum(self, x: Tensor, previous: Tensor) -> Tensor:
        """x + x', computed once for all layers that read the two."""
        scope = self.shared.context.scope
        assert scope is not None
        return scope.sum(x, previous)

    # -------------------------------------------------------------------------------------- what crosses layers

    def read(self, x: Tensor) -> list[Published]:
        """Values that predecessors have published, nearest first, up to the first that is missing or does not fit."""
        found: list[Published] = []
        for other in self.reads:
            self.require_root()
            published = self.shared.context.get(other.name)
            if published is None or published.value.shape != self.readable(x, published):
                self.skip(other, x, published)
                break
            found.append(published)
        return found

    def readable(self, x: Tensor, published: Published) -> tuple[int, ...]:
        """The shape of a value that can be read beside x."""
        return (*x.shape[:-1], self.site.rank if published.projected else x.shape[-1])

    def observe(self, x: Tensor, values: list[tuple[str, Tensor]]) -> None:
        """Show an observer what was read, by the names of layers."""
        if self.shared.observer is not None:
            self.shared.observer.see(self, x, values)

    def publish(self, value: Tensor, projected: bool = False) -> None:
        """Hand a value on to later layers of the chain, if any reads it."""
        if self.readers:
            self.require_root()
            self.shared.context.put(self.name, value, projected)

    def forget_read(self) -> None:
        """Drop values that this layer was the only one to read: they need not live as long as the forward."""
        for layer in self.reads:
            if layer.readers == 1:
                self.shared.context.drop(layer.name)

    def require_root(self) -> None:
        """Raise `RuntimeError` unless a forward of the root is open."""
        if self.shared.context.scope is None:
            roots = " or ".join(name or type(root).__name__ for name, root in self.shared.roots.items())
            raise RuntimeError(OUTSIDE.format(layer=self.name, shortcut=str(self.shared.shortcut), root=roots))

    def skip(self, other: "AdaptedLayer", x: Tensor, published: Published | None) -> None:
        """Count a link that could not be used, and warn of the first."""
        skipped = self.shared.skipped
        if not skipped:
            found = "did not run before it"
            if published is not None:
                found = f"has shape {(*published.value.shape[:-1], x.shape[-1])}"
            warnings.warn(
                f"the shortcut into {self.name} is skipped: {other.name} {found}, wanted {tuple(x.shape)}. The layer "
                "is treated as the first of a chain; further ones are counted in `get_adapter(model).skipped`",
                stacklevel=2,
            )
        skipped[self.name] = skipped.get(self.name, 0) + 1
