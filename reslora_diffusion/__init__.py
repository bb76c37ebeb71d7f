"""Residual low-rank adapters (ResLoRA, arXiv 2402.18039) for diffusers, transformers and PEFT.

>>> from reslora_diffusion import ResLoraConfig, attach, calibrate, merged_factors
>>> attach(unet, ResLoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
>>> ...  # train
>>> calibrate(unet, batches, lambda unet, batch: unet(**batch))
>>> factors = merged_factors(unet)  # a plain LoRA, ready for `reslora_diffusion.export.export_lora`

Names are resolved on first use, so that `import reslora_diffusion` and the command line answer at once. PEFT learns of
`ResLoraConfig` with the first of them, or right here if it is imported already.
"""

import sys
from importlib import import_module
from typing import Any

HOMES = {
    "LoraFactors": "core.functional",
    "MergeMethod": "core.config",
    "MergeReport": "core.report",
    "ResLoraConfig": "core.config",
    "Shortcut": "core.config",
    "attach": "core.attach",
    "calibrate": "core.calibration",
    "detach": "core.attach",
    "distill": "core.distillation",
    "explain": "core.attach",
    "export_pipeline": "export.pipeline",
    "get_controller": "core.attach",
    "handover": "core.handover",
    "merge_report": "core.report",
    "merged_factors": "core.merging",
    "merged_forward": "core.merging",
    "merged_state_dict": "core.state_dict",
    "relative_output_errors": "core.calibration",
}
__all__ = sorted(HOMES)  # noqa: PLE0605

if "peft" in sys.modules:  # so that `PeftModel.from_pretrained` of an unmerged adapter works
    import_module(".core", __name__)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
