"""Which factors of an adapter are cast and laid side by side for a forward, and in which order.

A layer wants [A_n; A_{n-1}; ..] and [B_n, B_{n-1}, ..] of its blocks, and for `input` A_{n+1}, in the precision of its
base. Layers that are computed together lie next to each other, all D before all A_{n+1} before all U.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels.packing import Layout, pack
from .layer import AdaptedLayer, Packed

Groups = Mapping[str, tuple[str, ...]]


def dtypes_to_pack(layers: Mapping[str, AdaptedLayer], factor: Tensor) -> dict[str, torch.dtype]:
    """Precision of the packed factors of each layer that wants them.

    On a CPU that computes in the precision of the factors there is nothing to cast, and to put two or three of them
    together costs less inside the layer.
    """
    found = {}
    for name, layer in layers.items():
        weight, _ = layer.frozen()
        if weight is not None and weight.is_floating_point() and (weight.dtype != factor.dtype or not weight.is_cpu):
            found[name] = weight.dtype
    return found


def plan(
    layers: Mapping[str, AdaptedLayer], names: Sequence[str], groups: Groups, ahead: bool
) -> tuple[list[Layout], list[tuple[str, str]]]:
    """`(layouts, what)`: of which factors each matrix is made, and (layer, field of `Packed`) that it is for.

    Factors are numbered 2 n and 2 n + 1, for lora_A and lora_B of layer n.
    """
    index = {name: place for place, name in enumerate(layers)}
    layouts: list[Layout] = []
    what: list[tuple[str, str]] = []
    wanted = set(names)
    for group in dict.fromkeys(groups.get(name, (name,)) for name in names):
        members = [layers[name] for name in group if name in wanted]
        for layer in members:
            layouts.append(Layout(tuple(2 * index[block.name] for block in layer.blocks), 0))
            what.append((layer.name, "D"))
        for layer in members:
            if ahead and layer.follower is not None:
                layouts.append(Layout((2 * index[layer.follower.name],), 0))
                what.append((layer.name, "ahead"))
        for layer in members:
            layouts.append(Layout(tuple(2 * index[block.name] + 1 for block in layer.blocks), 1))
            what.append((layer.name, "U"))
    return layouts, what


class Packer:
    """Packs the factors of an adapter; remembers its plans until `forget`."""

    def __init__(self) -> None:
        self.plans: dict[tuple, tuple[list[Layout], list[tuple[str, str]]]] = {}

    def __deepcopy__(self, memo: dict) -> "Packer":
        return Packer()

    def forget(self) -> None:
        """The chains or the groups are others now."""
        self.plans.clear()

    def pack(
        self, layers: Mapping[str, AdaptedLayer], factors: Sequence[Any], groups: Groups, ahead: bool
    ) -> dict[str, Packed]:
        """What the layers compute with in one forward; empty where nothing is gained."""
        dtypes, found = dtypes_to_pack(layers, factors[0]), {}
        for dtype in dict.fromkeys(dtypes.values()):
            names = tuple(name for name, other in dtypes.items() if other == dtype)
            if (names, ahead) not in self.plans:
                self.plans[names, ahead] = plan(layers, names, groups, ahead)
            layouts, what = self.plans[names, ahead]
            matrices = dict(zip(what, pack(layouts, factors, dtype), strict=True))
            for name in names:
                found[name] = Packed((matrices[name, "D"],), (matrices[name, "U"],), matrices.get((name, "ahead")))
        return found
