"""Names and shapes of a LoRA compared with those of a base model, whichever CLIP layout the model has."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from ..utils.hub import unreachable
from ..utils.model_files import Files, Unknown
from ..utils.problems import BadInput, Unusable, listing
from .flux import parts_of
from .geometry import family_of_widths
from .header import Header
from .keys import classic_path, flat_path
from .single_file import read_single_file

if TYPE_CHECKING:  # names of bases are looked at without waiting for torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from .factors import Components


def base_layer(modules: Mapping[str, nn.Module], path: str) -> nn.Module | None:
    """The module at a classic path, without its adapter's wrapper; `modules` is `dict(model.named_modules())`."""
    module = modules.get(path, modules.get(flat_path(path)))
    return getattr(module, "base_layer", module)


def is_transposed(layer: nn.Module | None) -> TypeGuard[Conv1D]:
    """Return whether its weight is [in, out], as in GPT-2's `Conv1D`."""
    return type(layer).__name__ == "Conv1D"


def shape_of(layer: nn.Module | None) -> list[int] | None:
    """[out, in, ...], also of a linear layer whose weight is packed (4 bit) or elsewhere (DeepSpeed ZeRO-3)."""
    if is_transposed(layer):
        return [layer.nf, layer.nx]
    width, out = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if width is not None and out is not None:
        return [out, width]
    weight = getattr(layer, "weight", None)
    return None if weight is None else list(weight.shape)


Wanted = Mapping[str, Mapping[str, list[int]]]  # component -> path -> [out, in, ...] of a LoRA's product
Found = Mapping[str, Callable[[str], list[int] | None]]  # component of a base -> path -> shape of the layer's weight


def base_problems(components: Components, models: Mapping[str, nn.Module]) -> list[str]:
    """Modules that the base does not have, or has in another shape."""
    return shape_problems(wanted_shapes(components), found_shapes(models))


def wanted_shapes(components: Components) -> Wanted:
    return {
        component: {path: [f.lora_B.shape[0], *f.lora_A.shape[1:]] for path, f in modules.items()}
        for component, modules in components.items()
    }


def found_shapes(models: Mapping[str, nn.Module]) -> Found:
    def of(model: nn.Module) -> Callable[[str], list[int] | None]:
        modules = dict(model.named_modules())
        return lambda path: shape_of(base_layer(modules, path))

    return {component: of(model) for component, model in models.items()}


def shape_problems(wanted: Wanted, found: Found) -> list[str]:
    absent, unlike = [], []
    for component, shape_at in found.items():
        for path, shape in wanted.get(component, {}).items():
            if (own := shape_at(path)) is None:
                absent.append(f"{component}.{path}")
            elif own != shape and [own[0], math.prod(own[1:])] != shape:  # as LyCORIS flattens a kernel
                unlike.append(f"{component}.{path} {own}, the LoRA's {shape}")
    problems = [f"the base lacks {len(absent)} of the modules: {listing(absent)}"] if absent else []
    if unlike:
        problems.append(f"{len(unlike)} modules have other shapes in the base: {listing(unlike)}")
    return problems


def misfits(components: Components, models: Mapping[str, nn.Module], name: str) -> list[str]:
    """Return why a LoRA does not fit the base called `name`, and which base it fits if that is known."""
    return shape_misfits(wanted_shapes(components), found_shapes(models), name)


def shape_misfits(wanted: Wanted, found: Found, name: str) -> list[str]:
    problems = shape_problems(wanted, found)
    if foreign := sorted(wanted.keys() - found.keys()):
        named = ("a language model" if component == "model" else component for component in foreign)
        problems.append(f"the LoRA is for {', '.join(named)}, which the base lacks")
    family = family_of_widths({c: {path: shape[1] for path, shape in m.items()} for c, m in wanted.items()})
    if problems and family.is_named:
        problems.insert(0, f"the LoRA is for {family}, and {name} is not")
    return problems


def check_stored(headers: Sequence[Header], name: str) -> None:
    """Find misfits by the files of a pipeline, before torch is imported; files that do not say enough are passed over.

    Raises:
        ValueError: the LoRA is for another base.
    """
    files = Files(name, None)
    wanted: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for lora in headers:
        for (component, path), parts in lora.modules().items():
            out, *inside = lora.layer_shape(parts)
            for part, rows in parts_of(path, out).items():
                wanted[component][part] = [rows, *inside]
    try:
        index = files.json("model_index.json")
        stored = {component: files.shapes(component) for component in wanted if (index.get(component) or [None])[0]}
    except (Unknown, OSError, ValueError, LookupError, TypeError, AttributeError):
        return

    def of(shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], list[int] | None]:
        by_path = {classic_path("text_encoder", name): [*shape] for name, shape in shapes.items()}
        return lambda path: by_path.get(f"{path}.weight")

    found = {component: of(shapes) for component, shapes in stored.items()}
    if problems := shape_misfits(wanted, found, name):
        raise unfit(name, problems)


def unfit(name: str, problems: Sequence[str]) -> ValueError:
    return ValueError("\n".join([f"the LoRA does not fit {name}:", *(f"  - {p}" for p in problems)]))


def check_base_name(name: str) -> list[str]:
    """Return why `name` can be neither a folder nor a hub name of a model, before anything is loaded or requested."""
    path = Path(name)
    if path.is_dir():
        if any((path / index).is_file() for index in ("model_index.json", "config.json")):
            return []
        return [f"{name} holds neither model_index.json nor config.json: no diffusers pipeline, no transformers model"]
    if path.is_file():
        try:
            read_single_file(path)
        except BadInput as error:
            return error.problems
        return []
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        return [f"{name} does not exist"]
    files = Files(name, None)
    if not any(files.path(index) for index in ("model_index.json", "config.json")) and (why := unreachable()):
        return [f"{name} is no folder here and not in the hub's cache, and {why}"]
    return []


def check_base(name: str) -> None:
    """Raises ValueError if `name` can be no model."""
    if problems := check_base_name(name):
        raise Unusable(name, problems)


def check_merge(
    source: str | Path,
    base: str,
    output: Path,
    overwrite: bool = False,
    unhealthy: Sequence[str] = (),
    scale: float = 1.0,
) -> None:
    """Raises ValueError if a LoRA cannot be merged into a base of that name, or its result not be put there."""
    problems = [*check_base_name(base), *taken(output, overwrite), *unhealthy]
    if not math.isfinite(scale):
        problems.append(f"scale: got {scale}, wanted a finite number")
    if (
        output.exists()
        and Path(base).exists()
        and output.resolve() in (Path(base).resolve(), *Path(base).resolve().parents)
    ):
        problems.append(f"{output} is or holds the base, which is being read; choose another output")
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
