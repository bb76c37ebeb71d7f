"""What of a LoRA fits a base model: names and shapes, whichever CLIP layout the model has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .geometry import family_of
from .header import unusable
from .keys import flat_path, listing

if TYPE_CHECKING:  # names of bases are looked at without waiting for torch
    from torch import nn

    from .factors import Components


def base_layer(modules: Mapping[str, nn.Module], path: str) -> nn.Module | None:
    """The module at a classic path, without its adapter's wrapper; `modules` is `dict(model.named_modules())`."""
    module = modules.get(path, modules.get(flat_path(path)))
    return getattr(module, "base_layer", module)


def is_transposed(layer: nn.Module | None) -> bool:
    """Whether its weight is [in, out], as in GPT-2's `Conv1D`."""
    return type(layer).__name__ == "Conv1D"


def shape_of(layer: nn.Module | None) -> list[int] | None:
    """[out, in, ...], also of a linear layer whose weight is packed (4 bit) or elsewhere (DeepSpeed ZeRO-3)."""
    if is_transposed(layer):
        return [layer.nf, layer.nx]
    if hasattr(layer, "in_features"):
        return [layer.out_features, layer.in_features]
    weight = getattr(layer, "weight", None)
    return None if weight is None else list(weight.shape)


def base_problems(components: Components, models: Mapping[str, nn.Module]) -> list[str]:
    """Modules that the base does not have, or has in another shape."""
    absent, unlike = [], []
    for component, model in models.items():
        modules = dict(model.named_modules())
        for path, f in components.get(component, {}).items():
            layer = base_layer(modules, path)
            wanted = [f.lora_B.shape[0], *f.lora_A.shape[1:]]
            if (shape := shape_of(layer)) is None:
                absent.append(f"{component}.{path}")
            elif shape != wanted:
                unlike.append(f"{component}.{path} {shape}, the LoRA's {wanted}")
    problems = [f"the base lacks {len(absent)} of the modules: {listing(absent)}"] if absent else []
    if unlike:
        problems.append(f"{len(unlike)} modules have other shapes in the base: {listing(unlike)}")
    return problems


def misfits(components: Components, models: Mapping[str, nn.Module], name: str) -> list[str]:
    """Why a LoRA is not for the base called `name`, and what it is for if that can be told."""
    problems = base_problems(components, models)
    if foreign := sorted(components.keys() - models.keys()):
        problems.append(f"the base has no {', '.join(foreign)}; it has {', '.join(sorted(models)) or 'none of them'}")
    family = family_of(components)
    if problems and family.is_named:
        problems.insert(0, f"the LoRA is for {family}, and {name} is not")
    return problems


def check_base_name(name: str) -> list[str]:
    """Why `name` can be no folder and no hub name of a model, before anything is loaded or asked for."""
    path = Path(name)
    if path.is_dir():
        if any((path / index).is_file() for index in ("model_index.json", "config.json")):
            return []
        return [f"{name} holds neither model_index.json nor config.json: no diffusers pipeline, no transformers model"]
    if path.is_file():
        return [
            f"{name} is a single file; wanted the folder or hub name of a pipeline "
            "(StableDiffusionPipeline.from_single_file(...).save_pretrained(folder) makes one)"
        ]
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        return []
    return [f"{name} does not exist"]


def check_base(name: str) -> None:
    """Raises ValueError if `name` can be no model."""
    if problems := check_base_name(name):
        raise unusable(name, problems)


def check_merge(
    source: str | Path, base: str, output: Path, overwrite: bool = False, unhealthy: Sequence[str] = ()
) -> None:
    """Raises ValueError if a LoRA cannot be merged into a base of that name, or its result not be put there."""
    problems = [*check_base_name(base), *taken(output, overwrite), *unhealthy]
    if problems:
        raise ValueError("\n".join([f"{source} cannot be merged into {base}:", *(f"  - {p}" for p in problems)]))


def taken(output: Path, overwrite: bool) -> Iterator[str]:
    if output.is_file():
        yield f"{output} is a file, wanted a folder"
    elif output.is_dir() and any(output.iterdir()) and not overwrite:
        yield f"{output} is not empty; give another folder, or allow it to be replaced (--overwrite)"


def check_pair(tuned: str, base: str) -> None:
    """Raises ValueError if two models of these names cannot be compared."""
    if problems := [*check_base_name(tuned), *check_base_name(base)]:
        raise ValueError("; ".join(problems))
    local = [Path(name) for name in (tuned, base) if Path(name).is_dir()]
    if len({(folder / "model_index.json").is_file() for folder in local}) == 2:
        raise ValueError(f"one of {tuned} and {base} is a pipeline and the other is not")


def check_weights(weights: Sequence[float], sources: Sequence[object]) -> None:
    if weights and len(weights) != len(sources):
        raise ValueError(f"got {len(weights)} weights for {len(sources)} files; wanted one for each, or none")
