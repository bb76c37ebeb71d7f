"""The plain LoRA of an adapted model: as factors to export, and as what the model computes with for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ...rules import DEFAULT_ADAPTER
from ..attach import get_adapter
from ..functional import LoraFactors
from .factors import computing_as, joined_factors, refuse_more_than_factors, unjoined_factors


def merged_factors(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, LoraFactors]:
    """The plain LoRA that the adapter merges into, by module path: what `export_lora` writes.

    Raises:
        ValueError: the method needs `calibrate` first, or the adapter is not only factors of linear layers.
    """
    adapter = get_adapter(model, adapter_name)
    refuse_more_than_factors(adapter.config)
    return joined_factors(adapter) | unjoined_factors(adapter)


@contextmanager
def merged_forward(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> Iterator[None]:
    """Inside, the model computes as the exported LoRA will, without touching a weight."""
    adapter = get_adapter(model, adapter_name)
    with computing_as(adapter, joined_factors(adapter)):
        yield
