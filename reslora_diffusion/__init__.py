"""Residual low-rank adapters (ResLoRA, arXiv 2402.18039) for diffusers, transformers and PEFT.

>>> from reslora_diffusion import ResLoraConfig, attach, merged_factors
>>> attach(unet, ResLoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
>>> ...  # train
>>> factors = merged_factors(unet)  # a plain LoRA, ready for `reslora_diffusion.export.export_lora`

The default shortcut, `block`, merges exactly; `input` and `middle` want `calibrate(unet, batches)` first.

Names are resolved on first use, so that `import reslora_diffusion` and the command line answer at once.
"""

import lazy_loader

from .registration import register_with_peft

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_with_peft()  # so that `PeftModel.from_pretrained` of an unmerged adapter works
