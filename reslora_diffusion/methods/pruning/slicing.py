"""The smaller model: the adapter is merged, heads and channels are cut out, and the configuration follows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attach import detach, get_adapter
from ...core.functional import LoraFactors
from ...core.merging.merge import merged_factors
from ...rules import DEFAULT_ADAPTER
from .structures import ROWS, Structure, base_of, shape_of, whole_base


@dataclass(frozen=True)
class Slimmed:
    """A report of the structures that were cut out of a model.

    Attributes:
        kept: groups of each structure that are left, of how many.
        parameters: of the model before and after, without adapters.
        shapes: (out, in) of every layer that was cut.
        attributes: numbers that modules hold besides their weights, by module.
        uniform: whether the model's own configuration states the new widths.
    """

    kept: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    shapes: Mapping[str, tuple[int, int]]
    attributes: Mapping[str, Mapping[str, int]]
    uniform: bool

    def to_dict(self) -> dict[str, Any]:
        before, after = self.parameters
        return {
            "parameters_before": before,
            "parameters_after": after,
            "loaded_by": "from_pretrained" if self.uniform else "reslora_diffusion.methods.pruning.load_pruned",
            "kept": {name: f"{left} of {count}" for name, (left, count) in self.kept.items()},
        }


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def slim(
    model: nn.Module,
    structures: Sequence[Structure],
    cut: Mapping[str, Tensor],
    adapter_name: str = DEFAULT_ADAPTER,
) -> tuple[nn.Module, Slimmed]:
    """Merge the adapter into the base and cut groups out of it, in place; the adapter is gone afterwards.

    Args:
        structures: all of the model, from `find_structures`, those of which nothing is cut out too.
        cut: by structure, which of its groups go: booleans [count].

    Returns:
        The base model, and what was cut out of it.

    Raises:
        ValueError: the weights are quantised, or the adapter is not only factors of linear layers and convolutions.
    """
    whole = whole_base(model)
    get_adapter(model, adapter_name).require_active()
    factors = merged_factors(model, adapter_name)
    refuse_quantised(whole, [*factors, *(name for structure in structures for name in structure.layers)])
    detach(model, adapter_name)
    before = size_of(whole)
    for name, lora in factors.items():
        add(whole.get_submodule(name), lora)
    kept: dict[str, tuple[int, int]] = {}
    attributes: dict[str, dict[str, int]] = {}
    stays: dict[tuple[str, int], Tensor] = {}  # places of an axis of a layer, which two structures may share
    for structure in structures:
        gone = cut.get(structure.name, torch.zeros(structure.count, dtype=torch.bool)).cpu()
        left = int((~gone).sum())
        kept[structure.name] = left, structure.count
        if left == structure.count:
            continue
        for slice in structure.slices:
            own = (slice.group < 0) | ~gone[slice.group.clamp(min=0)]
            place = slice.layer, slice.axis
            stays[place] = stays[place] & own if place in stays else own
        for name, numbers in structure.attributes.items():
            there = {key: each * left for key, each in numbers.items() if hasattr(whole.get_submodule(name), key)}
            attributes[name] = attributes.get(name, {}) | there
    shapes = {}
    for (name, axis), places in stays.items():
        take(layer := whole.get_submodule(name), axis, places)
        shapes[name] = shape_of(layer)
    set_attributes(whole, attributes)
    uniform = state_widths(whole, structures, kept)
    return whole, Slimmed(kept, (before, size_of(whole)), shapes, attributes, uniform)


def refuse_quantised(model: nn.Module, layers: Sequence[str]) -> None:
    """Raise `ValueError` if a weight that is to be cut holds something else than its numbers."""
    odd = [name for name in layers if not base_of(model.get_submodule(name)).weight.is_floating_point()]
    if odd:
        raise ValueError(
            f"{odd[0]} has quantised weights, whose rows and columns cannot be cut out; wanted a base in float32, "
            "bfloat16 or float16"
        )


def add(layer: Any, lora: LoraFactors) -> None:
    """W + s B A, rounded once to the precision of W."""
    working = torch.promote_types(layer.weight.dtype, torch.float32)
    A, B = (factor.flatten(1).to(layer.weight.device, working) for factor in (lora.lora_A, lora.lora_B))
    change = lora.scaling * (B @ A).reshape(layer.weight.shape)
    layer.weight.copy_((layer.weight.to(working) + change).to(layer.weight.dtype))


def take(layer: Any, axis: int, stays: Tensor) -> None:
    """Leave some rows or columns of a layer: booleans [size of the axis]."""
    places = stays.nonzero().flatten().to(layer.weight.device)
    for name in ("weight", "bias") if axis == ROWS else ("weight",):
        old = getattr(layer, name, None)
        if old is not None:
            setattr(layer, name, nn.Parameter(old.index_select(axis, places), requires_grad=old.requires_grad))
    resize(layer)


def resize(layer: Any) -> None:
    """Let the numbers that a layer shows agree with its weight."""
    if isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    else:
        layer.out_features, layer.in_features = layer.weight.shape


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, int]]) -> None:
    for name, numbers in attributes.items():
        for key, value in numbers.items():
            setattr(model.get_submodule(name), key, value)


def state_widths(model: nn.Module, structures: Sequence[Structure], kept: Mapping[str, tuple[int, int]]) -> bool:
    """Change the model's configuration to the new widths; returns whether it can state them."""
    if any(kept[s.name][0] != s.count and not s.widths for s in structures):
        return False
    found: dict[str, set[int]] = {}
    for structure in structures:
        for name, each in structure.widths.items():
            found.setdefault(name, set()).add(each * kept[structure.name][0])
    if any(len(widths) > 1 for widths in found.values()):
        return False
    config: Any = model.config
    if not all(hasattr(config, name) for name in found):
        config = config.get_text_config()
    fixed = {name: value for structure in structures for name, value in structure.fixed.items()}
    for name, value in (fixed | {name: widths.pop() for name, widths in found.items()}).items():
        setattr(config, name, value)
    return True
