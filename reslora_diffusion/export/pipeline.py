"""`export_pipeline`: the adapters on a pipeline's components to LoRA files, in one call.

It is `export_lora` with the components, factors and facts taken from the pipeline. What it writes replaces diffusers'
`save_lora_weights`, which cannot know that a shortcut has to be merged first.
"""

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from reslora_diffusion.core.peft.variant import find_adapter
from reslora_diffusion.rules import DEFAULT_ADAPTER

from .dora import is_dora
from .lora import export_lora
from .report import ExportReport
from .state_dict import adapter_factors


def export_pipeline(
    pipe: Any,
    output_dir: str | os.PathLike,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    facts: Mapping[str, object] | None = None,
    **options: Any,
) -> ExportReport:
    """Write the adapter of that name on every component of a pipeline as standard LoRA files, and prove them.

    >>> pipe.unet.add_adapter(ResLoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    >>> ...  # train, and calibrate what has to be
    >>> print(export_pipeline(pipe, "out"))

    Args:
        pipe: a diffusers pipeline, or a mapping of component names to models.
        output_dir: where the files go, as in `export_lora`.
        adapter_name: ResLoRA and plain LoRA adapters of this name are exported, components without one are left out.
        facts: for the header, beside shortcut, num_previous and merge_method of the first ResLoRA component.
        options: of `export_lora`: name, dtype, rank, allow_lossy, naming, formats.

    Raises:
        ValueError: no component has such an adapter, or some cannot be exported; every problem is named.
        CheckFailed: a ValueError too; a written file failed its proof.
    """
    components = pipe if isinstance(pipe, Mapping) else pipe.components
    adapted = {
        name: model
        for name, model in components.items()
        if isinstance(model, nn.Module) and adapter_name in getattr(model, "peft_config", {})
    }
    if not adapted:
        raise ValueError(f"no component of {type(pipe).__name__} has an adapter {adapter_name!r}")
    factors, problems = {}, []
    for name, model in adapted.items():
        try:
            factors[name] = adapter_factors(model, adapter_name)
        except ValueError as error:
            problems.append(f"  - {name}: {error}")
    if problems:
        raise ValueError("\n".join(["the adapters of this pipeline cannot be exported:", *problems]))
    if is_dora(factors):
        options.setdefault("models", adapted)  # whose norms a file for ComfyUI is divided by
    return export_lora(output_dir, factors, facts=method_of(adapted, adapter_name) | dict(facts or {}), **options)


def method_of(adapted: Mapping[str, nn.Module], adapter_name: str) -> dict[str, object]:
    """Return how the first ResLoRA component was trained and merged; nothing for plain LoRA."""
    controllers = (find_adapter(model, adapter_name) for model in adapted.values())
    if (first := next(filter(None, controllers), None)) is None:
        return {}
    merge_method = "none" if first.is_plain else str(first.config.merge_method)
    found = {"shortcut": str(first.shortcut), "num_previous": first.config.num_previous, "merge_method": merge_method}
    return {key: str(value) for key, value in found.items()}
