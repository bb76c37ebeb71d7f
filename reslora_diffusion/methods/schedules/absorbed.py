"""Finished links of a chain inside the weights of the base: `restart:merge=true`.

    W <- W + s sum_k B_k A_k         k: the block's own link, with shortcut `block` those of the blocks it borrows too

What is computed and held on the device is then one link, however many there were. The CPU holds the links as well, and
W as it was: an export is of the base that others have, and exact (`extend`), and after training the weights are put
back bit for bit (`restore`). W must be float32 or float64: 16 bits would round small links away.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.functional import LoraFactors, concatenated

Link = Mapping[str, tuple[Tensor, Tensor]]  # (A, B) by layer
WORKING = (torch.float32, torch.float64)


def tied_layers(adapter: Adapter, model: nn.Module) -> list[str]:
    """Adapted layers whose weight another layer of the model uses too, such as an output layer that is the embedding:
    merging into it would change both."""
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    return [name for name in adapter.sites if uses[id(adapter.layer(name).frozen()[0])] > 1]


class Absorbed:
    """The links that one adapter's base has taken in."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.links: list[dict[str, tuple[Tensor, Tensor]]] = []
        self.original: dict[str, Tensor] = {}  # W, by layer

    def weight(self, name: str) -> Any:
        return self.adapter.layer(name).frozen()[0]

    def problems(self) -> Iterator[str]:
        """Return why the weights cannot take links in."""
        found = [self.weight(name) for name in self.adapter.sites]
        if any(weight is None or not weight.is_floating_point() or hasattr(weight, "placements") for weight in found):
            yield "merge changes the weights of the base, which are quantised or sharded; wanted no merge"
        elif odd := sorted({str(weight.dtype) for weight in found} - {str(dtype) for dtype in WORKING}):
            yield f"merge adds links to a base in {', '.join(odd)}, which would round them away; wanted float32"
        if tied := tied_layers(self.adapter, self.adapter.root):
            yield f"merge would change what shares its weight with {', '.join(tied)}; wanted no merge, or other layers"
        if self.adapter.transform is not None:
            yield "merge changes the weights that DoRA's norms are of; wanted no merge, or no --use_dora"

    @torch.no_grad()
    def add(self, link: Link) -> None:
        """Take one more link in."""
        self.links.append({name: (A.cpu(), B.cpu()) for name, (A, B) in link.items()})
        for name in self.adapter.sites:
            weight, layer = self.weight(name), self.adapter.layer(name)
            self.original.setdefault(name, weight.detach().cpu().clone())
            scaling = layer.scalings[self.adapter.adapter_name]
            for block in layer.blocks:
                A, B = (factor.to(weight) for factor in link[block.name])
                weight.add_(B @ A, alpha=scaling)

    @torch.no_grad()
    def restore(self) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """Put the weights back as they were; returns the links, which are taken in no more."""
        for name, weight in self.original.items():
            self.weight(name).copy_(weight)
        links, self.links, self.original = self.links, [], {}
        return links

    def extend(self, factors: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
        """The plain LoRA of the link that is trained, with those that were taken in."""
        found = dict(factors)
        for name in self.adapter.sites:
            lora = factors[name]
            more = [link[block.name] for link in self.links for block in self.adapter.layer(name).blocks]
            pairs = [(A.to(lora.lora_A), B.to(lora.lora_B)) for A, B in more]
            found[name] = LoraFactors(*concatenated([(lora.lora_A, lora.lora_B), *pairs]), lora.scaling)
        return found
