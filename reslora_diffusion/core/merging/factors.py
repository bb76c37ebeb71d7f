"""The plain LoRA that an adapter merges into, layer by layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig
from torch import Tensor

from ...plain_lora import changes_the_base
from ..adapter import Adapter
from ..chains import Site
from ..dora import magnitude_of
from ..functional import LoraFactors, concatenated, with_magnitude
from ..sharding import whole
from .corrections import corrections_of

MORE_THAN_FACTORS = (
    "adapter {adapter!r} has more than factors of linear layers and convolutions, so no plain LoRA file can hold it; "
    "use merge_and_unload, or adapt other layers"
)


def factors_of_block(adapter: Adapter, name: str) -> LoraFactors:
    """The factors of one block, with the frozen ones beside them."""
    own = adapter.factors(name)
    frozen = [(A.to(own[0]), B.to(own[0])) for A, B in adapter.frozen.get(name, ())]  # left behind on `model.to`
    A, B = concatenated([own, *frozen])
    return LoraFactors(A.detach(), B.detach(), adapter.layers[name].scaling[adapter.adapter_name])


def plain_factors(adapter: Adapter, site: Site, correction: Tensor | None) -> LoraFactors:
    """The plain LoRA of one layer, given C."""
    window = [factors_of_block(adapter, name) for name in adapter.windows[site.name]]
    plain = adapter.path.plain(factors_of_block(adapter, site.name), window, correction)
    return with_magnitude(plain, magnitude_of(adapter.layers[site.name], adapter.adapter_name))


def corrections_while_merging(adapter: Adapter) -> dict[str, Tensor]:
    """C of every layer, while some may be merged already: no C may depend on their merged weights."""
    if not any(adapter.adapter_name in layer.merged_adapters for layer in adapter.layers.values()):
        adapter.corrections_while_merged = corrections_of(adapter)
    return adapter.corrections_while_merged


def joined_factors(adapter: Adapter) -> dict[str, LoraFactors]:
    """The plain LoRA of the layers that shortcuts may join."""
    corrections = corrections_while_merging(adapter)
    return {name: plain_factors(adapter, site, corrections[name]) for name, site in adapter.sites.items()}


def unjoined_factors(adapter: Adapter) -> dict[str, LoraFactors]:
    """The plain LoRA of the layers that no shortcut joins, such as convolutions.

    Raises:
        ValueError: a layer's adapter is not two factors of a linear map; all such layers are named.
    """
    problems = [f"  - {name}: {other.kind}" for name, other in adapter.unjoined.items() if not other.has_factors]
    if problems:
        raise ValueError("\n".join([f"{MORE_THAN_FACTORS.format(adapter=adapter.adapter_name)}:", *problems]))
    return {name: factors_of(layer, adapter.adapter_name) for name, (layer, *_) in adapter.unjoined.items()}


def factors_of(layer: Any, adapter_name: str) -> LoraFactors:
    """The factors of one of PEFT's layers, as they are; gathered where they are sharded."""
    A, B = (whole(side[adapter_name].weight).detach() for side in (layer.lora_A, layer.lora_B))
    return with_magnitude(LoraFactors(A, B, layer.scaling[adapter_name]), magnitude_of(layer, adapter_name))


def refuse_more_than_factors(config: LoraConfig) -> None:
    """Raise `ValueError` if factors alone do not say what an adapter of this configuration changes."""
    if config.bias != "none":
        raise ValueError(
            f"bias={config.bias!r} trains biases, which are no factors and would be lost; use "
            "merge_and_unload or save_pretrained, or train with bias='none'"
        )
    if changes_the_base(config.init_lora_weights):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} has changed the base weights, so the factors are no LoRA "
            "of the base that others have; use merge_and_unload, or train with init_lora_weights=True"
        )
    if config.layer_replication:
        raise ValueError(
            f"layer_replication={config.layer_replication!r} has made layers that the base does not have, so the "
            "factors are no LoRA of it; use save_pretrained, and PEFT where it is loaded"
        )


@contextmanager
def computing_as(adapter: Adapter, factors: dict[str, LoraFactors] | None) -> Iterator[None]:
    """Inside, the layers that shortcuts may join compute plain LoRA with these factors; with None, as trained."""
    before, adapter.merged = adapter.merged, factors
    try:
        yield
    finally:
        adapter.merged = before
