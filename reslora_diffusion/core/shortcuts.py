"""ResLoRA (arXiv 2402.18039, section 3.2): the method, one class for each shortcut.

Block n of a chain has the frozen layer W_n, lora_A = A_n [r, in], lora_B = B_n [out, r] and s = alpha / r. A chain is a
run of layers of one role in execution order, m is `num_previous`, and d is the dropout of the adapter:

    none     h_n = W_n x_n + s B_n A_n d(x_n)
    input    h_n = W_n x_n + s B_n A_n d(x_n + x_{n-1})                         x_{n-1} := x_n in a first block
    block    h_n = W_n x_n + s (sum_{k=0..m} B_{n-k} A_{n-k}) d(x_n)
    middle   h_n = W_n x_n + s B_n sum_{k=0..m} A_{n-k} d(x_{n-k})

Each class says which neighbours it links, which operation a layer computes while training (`core.functional.LinearOp`,
which a kernel of `core.kernels` runs), and which plain LoRA that merges into. `core.merging.corrections` finds the C of
`input` and `middle`, which depend on activations.
"""

from collections.abc import Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from ..rules import Shortcut
from .chains import Site
from .functional import LinearOp, LoraFactors, Publish, concatenated
from .layer import AdaptedLayer


class ResidualPath(Protocol):
    """What a shortcut must say of itself."""

    merges_exactly: bool  # into a plain LoRA, whatever the data
    crosses_layers: bool  # layers read values that others compute, and not their factors alone

    def links(self, previous: Site, site: Site) -> bool:
        """Whether `site` may read from `previous`, its predecessor in the same role."""

    def blocks(self, layer: AdaptedLayer) -> tuple[AdaptedLayer, ...]:
        """The blocks whose factors a layer applies to its own input, its own first."""

    def op(self, layer: AdaptedLayer, x: Tensor) -> LinearOp:
        """What `layer` computes of `x` [..., in]; reads what earlier layers of this forward have published."""

    def plain(self, own: LoraFactors, window: Sequence[LoraFactors], correction: Tensor | None) -> LoraFactors:
        """The plain LoRA that block `own` merges into. `window` holds its predecessors, nearest first."""

    def added(self, lora_A: Tensor, values: Sequence[Tensor]) -> Tensor:
        """t [..., r]: everything that the values that were read add at the bottleneck of a block with `lora_A`."""

    def projection(self, own: Tensor, previous: Tensor) -> Tensor:
        """Which of two lora_A is applied to x_{n-k}: that of the block itself, or of the predecessor."""

    def neighbours(self, layer: AdaptedLayer) -> list[tuple[str, str]]:
        """The layers that `layer` reads, nearest first, each with the name that its alignment is summed under."""

    def sources(
        self, layer: AdaptedLayer, x: Tensor, values: Sequence[tuple[str, Tensor]], inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """x_{n-k} [..., in] by the name that its alignment is summed under. `inputs` lives as long as one batch."""

    def normed(self, rows: Tensor, lora_A: Tensor) -> Tensor:
        """The rows of which the paper's merge takes the norm, of inputs [T, in]."""


class Plain:
    """h_n = W_n x_n + s B_n A_n x_n: LoRA, on the code path of the others."""

    merges_exactly = True
    crosses_layers = False

    def links(self, previous: Site, site: Site) -> bool:
        return False

    def blocks(self, layer: AdaptedLayer) -> tuple[AdaptedLayer, ...]:
        return (layer,)

    def op(self, layer: AdaptedLayer, x: Tensor) -> LinearOp:
        D, U, scalings = layer.factors(x)
        return LinearOp(x, *layer.frozen(), D, U, scalings, layer.dropped(x))

    def plain(self, own: LoraFactors, window: Sequence[LoraFactors], correction: Tensor | None) -> LoraFactors:
        return own

    def added(self, lora_A: Tensor, values: Sequence[Tensor]) -> Tensor:
        raise ValueError(f"got {len(values)} values of other blocks; this shortcut reads none")

    def projection(self, own: Tensor, previous: Tensor) -> Tensor:
        return own

    def neighbours(self, layer: AdaptedLayer) -> list[tuple[str, str]]:
        return []

    def sources(
        self, layer: AdaptedLayer, x: Tensor, values: Sequence[tuple[str, Tensor]], inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {}

    def normed(self, rows: Tensor, lora_A: Tensor) -> Tensor:
        return rows


class Block(Plain):
    """h_n = W_n x_n + s (sum_k B_{n-k} A_{n-k}) x_n = W_n x_n + s [B_n, B_{n-1}, ..] [A_n; A_{n-1}; ..] x_n.

    One LoRA of rank (m + 1) r, so the operation is that of `Plain` with more blocks side by side.
    """

    def links(self, previous: Site, site: Site) -> bool:
        return (previous.in_features, previous.out_features) == (site.in_features, site.out_features)

    def blocks(self, layer: AdaptedLayer) -> tuple[AdaptedLayer, ...]:
        return (layer, *layer.window)

    def plain(self, own: LoraFactors, window: Sequence[LoraFactors], correction: Tensor | None) -> LoraFactors:
        return LoraFactors(*concatenated([(f.lora_A, f.lora_B) for f in (own, *window)]), own.scaling)


class Input(Plain):
    """h_n = W_n x_n + s B_n A_n (x_n + x_{n-1}), with x_{n-1} := x_n in a first block.

    Where this saves work, layer n - 1 hands on A_n x_{n-1} at rank r instead of x_{n-1} (`layer.reads_ahead`).
    """

    merges_exactly = False
    crosses_layers = True

    def links(self, previous: Site, site: Site) -> bool:
        return previous.tokens == site.tokens and previous.in_features == site.in_features

    def op(self, layer: AdaptedLayer, x: Tensor) -> LinearOp:
        D, U, scalings = layer.factors(x)
        read = carry = ahead = None
        before = None if layer.closed else layer.read_input(x)
        if before is None:
            read, scalings = layer.dropped(x), [2 * s for s in scalings]
        elif before.projected:
            carry = before.value.to(x.dtype)
        elif layer.reads_ahead(x):
            carry = F.linear(before.value.to(x.dtype), D[0])
        else:
            total = layer.sum(x, before.value)
            read = layer.dropped(total, otherwise=total)
        publish = Publish.NOTHING
        if layer.follower is not None and not layer.follower.closed:
            if layer.reads_ahead(x):
                publish, ahead = Publish.AHEAD, layer.ahead(x)
            else:
                layer.publish(x)
        return LinearOp(x, *layer.frozen(), D, U, scalings, read, carry, publish, ahead)

    def plain(self, own: LoraFactors, window: Sequence[LoraFactors], correction: Tensor | None) -> LoraFactors:
        return own if correction is None else own._replace(lora_A=own.lora_A + correction.to(own.lora_A))

    def added(self, lora_A: Tensor, values: Sequence[Tensor]) -> Tensor:
        return F.linear(values[0], lora_A)

    def neighbours(self, layer: AdaptedLayer) -> list[tuple[str, str]]:
        if not layer.window and layer.follower is None:
            return []  # alone: it computes plain LoRA
        return [(layer.window[0].name if layer.window else layer.name, layer.name)]

    def sources(
        self, layer: AdaptedLayer, x: Tensor, values: Sequence[tuple[str, Tensor]], inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return dict(values)


class Middle(Input):
    """h_n = W_n x_n + s B_n sum_k A_{n-k} x_{n-k}: bottlenecks are summed, at rank r.

    If m is all predecessors, a layer hands on the running sum, so that the next has one value to read.
    """

    def links(self, previous: Site, site: Site) -> bool:
        return previous.tokens == site.tokens and previous.rank == site.rank

    def op(self, layer: AdaptedLayer, x: Tensor) -> LinearOp:
        D, U, scalings = layer.factors(x)
        D = layer.gated(D)  # a closed block hands nothing on
        earlier = [value.to(x.dtype) for value in layer.read_bottlenecks(x)]
        carry = sum(earlier[1:], start=earlier[0]) if earlier else None
        publish = Publish.NOTHING
        if layer.readers:
            publish = Publish.SUM if layer.sums else Publish.OWN
        return LinearOp(x, *layer.frozen(), D, U, scalings, layer.dropped(x), carry, publish)

    def added(self, lora_A: Tensor, values: Sequence[Tensor]) -> Tensor:
        return sum(values[1:], start=values[0])

    def projection(self, own: Tensor, previous: Tensor) -> Tensor:
        return previous

    def neighbours(self, layer: AdaptedLayer) -> list[tuple[str, str]]:
        return [(other.name, other.name) for other in layer.window]

    def sources(
        self, layer: AdaptedLayer, x: Tensor, values: Sequence[tuple[str, Tensor]], inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        inputs[layer.name] = x
        return {other.name: inputs[other.name] for other in layer.window if other.name in inputs}

    def normed(self, rows: Tensor, lora_A: Tensor) -> Tensor:
        return F.linear(rows, lora_A)


SHORTCUTS: dict[Shortcut, ResidualPath] = {
    Shortcut.NONE: Plain(),
    Shortcut.INPUT: Input(),
    Shortcut.BLOCK: Block(),
    Shortcut.MIDDLE: Middle(),
}
