"""The public names and where they are defined; `__init__.py` imports each on first use."""

from .core.attach import (
    AdaptedModel,
    attach,
    detach,
    explain,
    explain_kernels,
    get_adapter,
    get_controller,
)
from .core.config import ResLoraConfig
from .core.functional import LoraFactors
from .core.merging.calibrate import calibrate, relative_output_errors
from .core.merging.distill import distill
from .core.merging.fold import handover
from .core.merging.merge import merged_factors, merged_forward
from .core.merging.report import MergeReport, merge_report
from .diffusion.models.optimize import optimize_for_training
from .export.pipeline import export_pipeline
from .export.state_dict import merged_state_dict
from .methods.optimizers.pairs import factor_pairs
from .rules import MergeMethod, Shortcut

__all__ = [
    "AdaptedModel",
    "LoraFactors",
    "MergeMethod",
    "MergeReport",
    "ResLoraConfig",
    "Shortcut",
    "attach",
    "calibrate",
    "detach",
    "distill",
    "explain",
    "explain_kernels",
    "export_pipeline",
    "factor_pairs",
    "get_adapter",
    "get_controller",
    "handover",
    "merge_report",
    "merged_factors",
    "merged_forward",
    "merged_state_dict",
    "optimize_for_training",
    "relative_output_errors",
]
