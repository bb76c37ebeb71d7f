"""The factors of a whole adapter, cast and laid side by side once per forward (`Packer`).

A layer wants [A_n; A_{n-1}; ..] and [B_n, B_{n-1}, ..] of its blocks, and for `input` A_{n+1}, in the precision of its
base. Layers that are computed together (`core.kernels.grouped`) lie next to each other, all D before all A_{n+1} before
all U: matrices that follow each other in memory are one matrix to them.

`pack` makes all matrices on a device at once: one buffer, one multi-tensor copy, one node of the autograd graph. Its
backward sums the gradients of a factor over all the places that it was copied to, in the factor's own precision.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layer import AdaptedLayer, Packed

Groups = Mapping[str, tuple[str, ...]]


class Layout(NamedTuple):
    """One matrix: which factors it is made of, by index, and along which dimension (0: lora_A, 1: lora_B)."""

    parts: tuple[int, ...]
    dim: int


def places_in(matrix: Tensor, layout: Layout, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """Return the slices of a matrix in which its factors are."""
    if len(layout.parts) == 1:
        return (matrix,)
    return matrix.split([shapes[part][layout.dim] for part in layout.parts], dim=layout.dim)


class Pack(torch.autograd.Function):
    """The node of `pack`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, layouts: tuple[Layout, ...], dtype: torch.dtype, device: torch.device, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        shapes = [factor.shape for factor in factors]
        sizes = []
        for parts, dim in layouts:
            along = sum(shapes[part][dim] for part in parts)
            sizes.append((along, shapes[parts[0]][1]) if dim == 0 else (shapes[parts[0]][0], along))
        buffer = torch.empty(sum(a * b for a, b in sizes), dtype=dtype, device=device)
        pieces = buffer.split([a * b for a, b in sizes])
        matrices = tuple(piece.view(size) for piece, size in zip(pieces, sizes, strict=True))
        places = [p for m, layout in zip(matrices, layouts, strict=True) for p in places_in(m, layout, shapes)]
        torch._foreach_copy_(places, [factors[part] for layout in layouts for part in layout.parts])
        ctx.layouts, ctx.shapes = layouts, shapes
        ctx.kinds = [{"dtype": factor.dtype, "device": factor.device} for factor in factors]
        ctx.set_materialize_grads(False)
        return matrices

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        found: list[tuple[int, Tensor]] = []
        for layout, gradient in zip(ctx.layouts, gradients, strict=True):
            if gradient is not None:
                found += zip(layout.parts, places_in(gradient, layout, ctx.shapes), strict=True)
        found = [(part, place) for part, place in found if ctx.needs_input_grad[3 + part]]
        if torch.is_grad_enabled():  # for a second derivative
            cast = [place.to(**ctx.kinds[part]) for part, place in found]
        else:
            cast = [torch.empty(p.shape, **ctx.kinds[part]) for part, p in found]
            if found:
                torch._foreach_copy_(cast, [place for _, place in found])
        copies: dict[int, list[Tensor]] = {}
        for (part, _), place in zip(found, cast, strict=True):
            copies.setdefault(part, []).append(place)
        while more := {part: some for part, some in copies.items() if len(some) > 1}:
            sums = torch._foreach_add([some.pop() for some in more.values()], [some.pop() for some in more.values()])
            for some, total in zip(more.values(), sums, strict=True):
                some.append(total)
        return None, None, None, *(copies[part][0] if part in copies else None for part in range(len(ctx.shapes)))


def pack(
    layouts: Sequence[Layout], factors: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """The matrix of each layout, [sum r, in] or [out, sum r], in `dtype` on `device`."""
    return Pack.apply(tuple(layouts), dtype, device, *factors)


def kinds_to_pack(layers: Mapping[str, AdaptedLayer], factor: Tensor) -> dict[str, tuple[torch.dtype, torch.device]]:
    """Precision and device of the packed factors of each layer that wants them: those of its base.

    On a CPU that computes in the precision of the factors there is nothing to cast, and to put two or three of them
    together costs less inside the layer.
    """
    found = {}
    for name, layer in layers.items():
        weight, _ = layer.frozen()
        if weight is not None and weight.is_floating_point() and (weight.dtype != factor.dtype or not weight.is_cpu):
            found[name] = weight.dtype, weight.device
    return found


Plan = dict[tuple[str, str], Layout]  # by layer and field of `Packed`


def plan(layers: Mapping[str, AdaptedLayer], names: Sequence[str], groups: Groups, ahead: bool) -> Plan:
    """The matrices of some layers. Factors are numbered 2 n and 2 n + 1, for lora_A and lora_B of layer n."""
    index = {name: place for place, name in enumerate(layers)}
    wanted, found = set(names), Plan()
    for group in dict.fromkeys(groups.get(name, (name,)) for name in names):
        members = [layers[name] for name in group if name in wanted]
        for layer in members:
            found[layer.name, "D"] = Layout(tuple(2 * index[block.name] for block in layer.blocks), 0)
        for layer in members:
            if ahead and layer.follower is not None:
                found[layer.name, "ahead"] = Layout((2 * index[layer.follower.name],), 0)
        for layer in members:
            found[layer.name, "U"] = Layout(tuple(2 * index[block.name] + 1 for block in layer.blocks), 1)
    return found


class Packer:
    """Packs the factors of an adapter; remembers its plans until `forget`."""

    def __init__(self) -> None:
        self.plans: dict[tuple, Plan] = {}

    def __deepcopy__(self, memo: dict) -> "Packer":
        return Packer()

    def forget(self) -> None:
        """The chains or the groups are others now."""
        self.plans.clear()

    def pack(
        self, layers: Mapping[str, AdaptedLayer], factors: Sequence[Any], groups: Groups, ahead: bool
    ) -> dict[str, Packed]:
        """Packed factors by layer, for one forward; empty where packing gains nothing."""
        kinds, found = kinds_to_pack(layers, factors[0]), {}
        for kind in dict.fromkeys(kinds.values()):
            names = tuple(name for name, other in kinds.items() if other == kind)
            if (names, ahead) not in self.plans:
                self.plans[names, ahead] = plan(layers, names, groups, ahead)
            layouts = self.plans[names, ahead]
            matrices = dict(zip(layouts, pack([*layouts.values()], factors, *kind), strict=True))
            for name in names:
                D, U, forward = matrices[name, "D"], matrices[name, "U"], matrices.get((name, "ahead"))
                found[name] = Packed((D,), (U,), forward, torch.is_grad_enabled())
        return found
