"""ResLoRA (arXiv 2402.18039, section 3.2): the method, one class for each shortcut.

Block n of a chain has the frozen layer W_n, lora_A = A_n [r, in], lora_B = B_n [out, r] and s = alpha / r. A chain is a
run of layers of one role in execution order, m is `num_previous`, and d is the dropout of the adapter:

    none     h_n = W_n x_n + s B_n A_n d(x_n)
    input    h_n = W_n x_n + s B_n A_n d(x_n + x_{n-1})                         x_{n-1} := x_n in a first block
    block    h_n = W_n x_n + s (sum_{k=0..m} B_{n-k} A_{n-k}) d(x_n)
    middle   h_n = W_n x_n + s B_n sum_{k=0..m} A_{n-k} d(x_{n-k})

Each class says which neighbours it links, which operation a layer computes while training (`core.functional.LinearOp`,
which a kernel of `core.kernels` runs), and which plain LoRA that merges into. `core.merging.corrections` finds the C of
`input` and `middle`, which depends on activations.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..rules import Shortcut
from .chains import Site
from .functional import LinearOp, LoraFactors, Publish, concatenated
from .layer import AdaptedLayer


class Plain:
    """h_n = W_n x_n + s B_n A_n x_n: LoRA, on the code path of the others, which are made from it.

    A shortcut says three things: which neighbours it links, what a layer computes, and what that merges into.
    """

    merges_exactly = True  # into a plain LoRA, whatever the data
    crosses_layers = False  # layers read values that others compute, and not their factors alone

    def links(self, previous: Site, site: Site) -> bool:
        """Return whether `site` may read from `previous`, its predecessor in the same role."""
        return False

    def blocks(self, layer: AdaptedLayer) -> tuple[AdaptedLayer, ...]:
        """The blocks whose factors a layer applies to its own input, its own first."""
        return (layer,)

    def op(self, layer: AdaptedLayer, x: Tensor) -> LinearOp:
        """The operation of `layer` on `x` [..., in]. It may read values that earlier layers have published."""
        D, U, scalings = layer.factors(x)
        return LinearOp(x, *layer.frozen(), D, U, scalings, layer.dropped(x))

    def plain(self, own: LoraFactors, window: Sequence[LoraFactors], correction: Tensor | None) -> LoraFactors:
        """The plain LoRA that block `own` merges into. `window` holds its predecessors, nearest first."""
        return own


class Block(Plain):
    """h_n = W_n x_n + s (sum_k B_{n-k} A_{n-k}) x_n = W_n x_n + s [B_n, B_{n-1}, ..] [A_n; A_{n-1}; ..] x_n.

    One LoRA of rank (m + 1) r, so the operation is that of `Plain` with more blocks side by side.
    """

    def links(self, previous: Site, site: Site) -> bool:
        return (previous.in_features, previous.out_features) == (site.in_features, site.out_features)

    def blocks(self, layer: AdaptedLayer) -> tuple[AdaptedLayer, ...]:
        return (layer, *layer.window)

    def plain(self, own: LoraFactors, window: Sequence[LoraFactors], correction: Tensor | None) -> LoraFactors:
        device = own.lora_A.device  # a model may be spread over several
        blocks = [(block.lora_A.to(device), block.lora_B.to(device)) for block in (own, *window)]
        return LoraFactors(*concatenated(blocks), own.scaling)


class Input(Plain):
    """h_n = W_n x_n + s B_n A_n (x_n + x_{n-1}), with x_{n-1} := x_n in a first block.

    Where this saves work, layer n - 1 hands on A_n x_{n-1} at rank r instead of x_{n-1} (`layer.reads_ahead`).

    What such a shortcut merges into depends on data. The last four methods are what `core.merging` asks for that; the
    values that a layer has read come as `(name, value)`, nearest first.
    """

    merges_exactly = False
    crosses_layers = True

    def links(self, previous: Site, site: Site) -> bool:
        return previous.tokens == site.tokens and previous.in_features == site.in_features

    def op(self, layer: AdaptedLayer, x: Tensor) -> LinearOp:
        D, U, scalings = layer.factors(x)
        read = carry = ahead = None
        found = [] if layer.closed else layer.read(x)
        before = found[0] if found else None
        layer.observe(x, [(layer.name, x if before is None else before.value.to(x))])
        if before is None:
            read, scalings = layer.dropped(x), [2 * s for s in scalings]
        elif before.projected:
            carry = before.value.to(x)
        elif layer.reads_ahead(x):
            carry = F.linear(before.value.to(x), D[0])
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
        """t [..., r]: everything that the values add at the bottleneck of a block with `lora_A`."""
        return F.linear(values[0], lora_A)

    def neighbours(self, layer: AdaptedLayer) -> list[tuple[str, str]]:
        """The layers whose input `layer` reads, nearest first, each with the one whose lora_A it reads that by."""
        if not layer.window and layer.follower is None:
            return []  # alone: it computes plain LoRA
        return [(layer.window[0].name if layer.window else layer.name, layer.name)]

    def sources(
        self, layer: AdaptedLayer, x: Tensor, values: Sequence[tuple[str, Tensor]], inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """x_{n-k} [..., in] by the name of the layer whose lora_A it is read by. `inputs` lives for one batch."""
        return dict(values)

    def normed(self, rows: Tensor, lora_A: Tensor) -> Tensor:
        """The rows of which the paper's merge takes the norm, of inputs [T, in]."""
        return rows


class Middle(Input):
    """h_n = W_n x_n + s B_n sum_k A_{n-k} x_{n-k}: bottlenecks are summed, at rank r.

    If m is all predecessors, a layer hands on the running sum, so that the next has one value to read.
    """

    def links(self, previous: Site, site: Site) -> bool:
        return previous.tokens == site.tokens and previous.rank == site.rank

    def op(self, layer: AdaptedLayer, x: Tensor) -> LinearOp:
        D, U, scalings = layer.factors(x)
        D = layer.gated(D)  # a closed block hands nothing on
        found = layer.read(x)
        earlier = [value.to(x) for value, *_ in found]
        layer.observe(x, [(other.name, value) for other, value in zip(layer.reads, earlier, strict=False)])
        carry = sum(earlier[1:], start=earlier[0]) if earlier else None
        publish = Publish.NOTHING
        if layer.readers:
            publish = Publish.SUM if layer.sums else Publish.OWN
        return LinearOp(x, *layer.frozen(), D, U, scalings, layer.dropped(x), carry, publish)

    def added(self, lora_A: Tensor, values: Sequence[Tensor]) -> Tensor:
        return sum(values[1:], start=values[0])

    def neighbours(self, layer: AdaptedLayer) -> list[tuple[str, str]]:
        return [(other.name, other.name) for other in layer.window]

    def sources(
        self, layer: AdaptedLayer, x: Tensor, values: Sequence[tuple[str, Tensor]], inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        inputs[layer.name] = x
        return {other.name: inputs[other.name] for other in layer.window if other.name in inputs}

    def normed(self, rows: Tensor, lora_A: Tensor) -> Tensor:
        return F.linear(rows, lora_A)


SHORTCUTS: dict[Shortcut, Plain] = {
    Shortcut.NONE: Plain(),
    Shortcut.INPUT: Input(),
    Shortcut.BLOCK: Block(),
    Shortcut.MIDDLE: Middle(),
}
