"""From a trained adapter to files that provably load elsewhere, and tools for LoRA files of any origin.

    export_lora, write_lora_file    factors -> files for diffusers, ComfyUI, A1111, kohya, proved by their loaders
    export_pipeline                 the same, with the adapters of a diffusers pipeline
    export_peft                     factors -> a folder for PEFT and vLLM, proved by PEFT
    export_trained                  a run or checkpoint -> the same, at another rank, precision or name
    read_lora, read_trained         any LoRA file, or a training run's LoRA -> {component: {path: LoraFactors}}
    inspect_lora, verify_lora       what a file is; whether it loads, and fits a base
    resize, combine, convert        LoRA files -> a LoRA file
    fuse, extract                   LoRA + base -> model; model - base -> LoRA

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
    "ExtractReport": "extraction",
    "FuseReport": "fusing",
    "Inspection": "inspection",
    "LoraFile": "reader",
    "Verification": "verify",
    "combine": "tools",
    "convert": "tools",
    "export_lora": "lora",
    "export_peft": "peft_folder",
    "export_peft_components": "peft_folder",
    "export_pipeline": "pipeline",
    "export_trained": "trained",
    "extract": "extraction",
    "fuse": "fusing",
    "inspect_lora": "inspection",
    "read_lora": "reader",
    "read_trained": "trained",
    "resize": "tools",
    "save_merged": "trained",
    "verify_lora": "verify",
    "write_lora_file": "lora",
}
__all__ = sorted(HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
