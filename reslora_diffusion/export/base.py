"""What of a LoRA fits a base model: names and shapes, whichever CLIP layout the model has."""

from collections.abc import Mapping

from torch import nn

from .factors import Components
from .keys import flat_path, listing


def base_layer(modules: Mapping[str, nn.Module], path: str) -> nn.Module | None:
    """The module at a classic path, without its adapter's wrapper; `modules` is `dict(model.named_modules())`."""
    module = modules.get(path, modules.get(flat_path(path)))
    return getattr(module, "base_layer", module)


def base_problems(components: Components, models: Mapping[str, nn.Module]) -> list[str]:
    """Modules that the base does not have, or has in another shape."""
    absent, unlike = [], []
    for component, model in models.items():
        modules = dict(model.named_modules())
        for path, f in components.get(component, {}).items():
            weight = getattr(base_layer(modules, path), "weight", None)
            wanted = [f.lora_B.shape[0], *f.lora_A.shape[1:]]
            if weight is None:
                absent.append(f"{component}.{path}")
            elif list(weight.shape) != wanted:
                unlike.append(f"{component}.{path} {list(weight.shape)}, the LoRA's {wanted}")
    problems = [f"the base lacks {len(absent)} of the modules: {listing(absent)}"] if absent else []
    if unlike:
        problems.append(f"{len(unlike)} modules have other shapes in the base: {listing(unlike)}")
    return problems
