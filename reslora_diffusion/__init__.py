"""Residual low-rank adapters (ResLoRA, arXiv 2402.18039) for diffusers, transformers and PEFT.

>>> from reslora_diffusion import ResLoraConfig, attach, merged_factors
>>> attach(unet, ResLoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
>>> ...  # train
>>> factors = merged_factors(unet)  # a plain LoRA, ready for `reslora_diffusion.export.export_lora`

The default shortcut, `block`, merges exactly; `input` and `middle` want `calibrate(unet, batches)` first.

Names are resolved on first use, so that `import reslora_diffusion` and the command line answer at once.
"""

from importlib import import_module
from typing import Any

from .registration import register_with_peft

HOMES = {
    "AdaptedModel": "core.attach",
    "LoraFactors": "core.functional",
    "MergeMethod": "core.config",
    "MergeReport": "core.merging.report",
    "ResLoraConfig": "core.config",
    "Shortcut": "core.config",
    "attach": "core.attach",
    "calibrate": "core.merging.calibrate",
    "detach": "core.attach",
    "distill": "core.merging.distill",
    "explain": "core.attach",
    "explain_kernels": "core.attach",
    "export_pipeline": "export.pipeline",
    "factor_pairs": "methods.optimizers.pairs",
    "get_controller": "core.attach",
    "handover": "core.merging.fold",
    "merge_report": "core.merging.report",
    "merged_factors": "core.merging.merge",
    "merged_forward": "core.merging.merge",
    "merged_state_dict": "core.merging.state_dict",
    "optimize_for_training": "diffusion.models.optimize",
    "relative_output_errors": "core.merging.calibrate",
}
__all__ = sorted(HOMES)  # noqa: PLE0605

register_with_peft()  # so that `PeftModel.from_pretrained` of an unmerged adapter works


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
