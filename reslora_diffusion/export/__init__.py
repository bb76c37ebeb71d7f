"""Writes trained adapters as files that provably load elsewhere, and has tools for LoRA files of any origin.

    export_lora, write_lora_file    factors -> files for diffusers, ComfyUI, A1111, kohya, proved by their loaders
    export_pipeline                 the same, with the adapters of a diffusers pipeline
    export_peft                     factors -> a folder for PEFT and vLLM, proved by PEFT
    export_trained                  a run or checkpoint -> the same, at another rank, precision or name
    read_lora, read_trained         any LoRA file, or a training run's LoRA -> {component: {path: LoraFactors}}
    inspect_lora, verify_lora       what a file is; whether it loads, and fits a base
    resize, combine, convert        LoRA files -> a LoRA file
    fuse, extract                   LoRA + base -> model; model - base -> LoRA
    read_embeddings, load_embeddings, write_embeddings, inspect_embeddings    new tokens that were trained beside a LoRA

>>> from reslora_diffusion.export import export_lora, read_lora
>>> print(export_lora("out", {"unet": merged_factors(unet)}))
>>> read_lora("out").components["unet"].keys()

Names are resolved on first use: a tool that reads headers alone does not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
