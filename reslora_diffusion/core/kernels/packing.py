"""The factors of a whole adapter, cast and laid side by side once per forward.

`input` and `block` want the factors of neighbours beside a layer's own, a base in bf16 wants all of them in bf16, and
matrices that follow each other in memory are one matrix to layers that are computed together (`core.kernels.grouped`).
`pack` makes all matrices of a model at once, in the order given: one buffer, one multi-tensor copy, one node of the
autograd graph. Its backward sums the gradients of a factor over all the places that it was copied to, in the factor's
own precision.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """One matrix: which factors it is made of, by index, and along which dimension (0: lora_A, 1: lora_B)."""

    parts: tuple[int, ...]
    dim: int


def places_in(matrix: Tensor, layout: Layout, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """Where in a matrix its factors are."""
    if len(layout.parts) == 1:
        return (matrix,)
    return matrix.split([shapes[part][layout.dim] for part in layout.parts], dim=layout.dim)


class Pack(torch.autograd.Function):
    """See `pack`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, layouts: tuple[Layout, ...], dtype: torch.dtype, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        shapes = [factor.shape for factor in factors]
        sizes = []
        for parts, dim in layouts:
            along = sum(shapes[part][dim] for part in parts)
            sizes.append((along, shapes[parts[0]][1]) if dim == 0 else (shapes[parts[0]][0], along))
        buffer = torch.empty(sum(a * b for a, b in sizes), dtype=dtype, device=factors[0].device)
        pieces = buffer.split([a * b for a, b in sizes])
        matrices = tuple(piece.view(size) for piece, size in zip(pieces, sizes, strict=True))
        places = [p for m, layout in zip(matrices, layouts, strict=True) for p in places_in(m, layout, shapes)]
        torch._foreach_copy_(places, [factors[part] for layout in layouts for part in layout.parts])
        ctx.layouts, ctx.shapes, ctx.dtypes = layouts, shapes, [factor.dtype for factor in factors]
        ctx.set_materialize_grads(False)
        return matrices

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        found: list[tuple[int, Tensor]] = []
        for layout, gradient in zip(ctx.layouts, gradients, strict=True):
            if gradient is not None:
                found += zip(layout.parts, places_in(gradient, layout, ctx.shapes), strict=True)
        found = [(part, place) for part, place in found if ctx.needs_input_grad[2 + part]]
        if torch.is_grad_enabled():  # for a second derivative
            cast = [place.to(ctx.dtypes[part]) for part, place in found]
        else:
            cast = [torch.empty(p.shape, dtype=ctx.dtypes[part], device=p.device) for part, p in found]
            if found:
                torch._foreach_copy_(cast, [place for _, place in found])
        copies: dict[int, list[Tensor]] = {}
        for (part, _), place in zip(found, cast, strict=True):
            copies.setdefault(part, []).append(place)
        while more := {part: some for part, some in copies.items() if len(some) > 1}:
            sums = torch._foreach_add([some.pop() for some in more.values()], [some.pop() for some in more.values()])
            for some, total in zip(more.values(), sums, strict=True):
                some.append(total)
        return None, None, *(copies[part][0] if part in copies else None for part in range(len(ctx.shapes)))


def pack(layouts: Sequence[Layout], factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """For each layout the matrix [sum r, in] or [out, sum r] of its factors, in `dtype`."""
    return Pack.apply(tuple(layouts), dtype, *factors)
