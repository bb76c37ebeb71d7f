"""Finds the adapter that a LoRA layer computes with."""

from typing import Any


def adapter_of(layer: Any, adapter_name: str) -> object | None:
    """The `Adapter` of that name on a layer of PEFT; None if the name is not there, or is plain LoRA."""
    return getattr(getattr(layer, "lora_variant", {}).get(adapter_name), "adapter", None)
