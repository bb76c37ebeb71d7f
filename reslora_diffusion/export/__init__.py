"""From a trained adapter to files that provably load elsewhere, and tools for LoRA files of any origin.

    export_lora     merged factors -> pytorch_lora_weights.safetensors and kohya/<name>.safetensors, proved
    read_lora       any LoRA file -> {component: {module path: LoraFactors}}

>>> from reslora_diffusion.export import export_lora, read_lora
>>> print(export_lora("out", {"unet": merged_factors(unet)}))
>>> read_lora("out").components["unet"].keys()

Names are resolved on first use: a tool that reads headers alone does not wait for torch.
"""

from importlib import import_module
from typing import Any

HOMES = {
    "CheckFailed": "limits",
    "ExportReport": "report",
    "Inspection": "inspection",
    "LoraFile": "reader",
    "export_lora": "lora",
    "inspect_lora": "inspection",
    "read_lora": "reader",
    "write_lora_file": "lora",
}
__all__ = sorted(HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
