"""DoRA in files: how the length of a weight's rows is written in each dialect, and what programs make of it.

    diffusers, PEFT    <module>.lora_magnitude_vector    [out], of a convolution [1, out, 1, 1]: rows of W + dW
    kohya              <module>.dora_scale               [out, 1, ..]: rows; [1, in, ..]: columns, of a convolution's
                                                         input channels

Programs disagree on the norm that a row of `dora_scale` is divided by (columns are always those of W + dW):

    LyCORIS with wd_on_out, OneTrainer    the row of W + dW, as it was trained
    ComfyUI, Forge                        the row of W alone (`weight_decompose` of comfy/weight_adapter/base.py)
    A1111, ComfyUI before mid 2025        know columns only, and multiply rows by them all the same
    diffusers                             drops `dora_scale` with a warning, and loads the rest as a plain LoRA

So a kohya file is written for ComfyUI where the base weights are at hand, m |W| / |W + dW|, and says so in its header
(`reslora.dora_norm`); without them it holds m, and the report says for whom. A plain LoRA of a rank (`plain_of`), or a
merged base, is read alike by all.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from reslora_diffusion.core.dora import decomposed_weight
from reslora_diffusion.core.functional import LoraFactors, Magnitude, with_magnitude

from ..utils.problems import listing
from .base import base_layer, is_transposed
from .factors import Components, Loss, from_matrix
from .header import open_safetensors
from .keys import Naming, to_kohya
from .limits import CheckFailed, LoaderCheck

Weights = Iterable[tuple[str, str, Tensor]]  # component, path, W [out, in, ...]
DORA_NORM = "dora_norm"  # of the header, under `reslora.`: "base" where rows are divided by norms of W
STRENGTH = "a DoRA: its strength is not linear, and it cannot be added to others"
ROUNDING = 4 * torch.finfo(torch.float32).eps
KOHYA_LOADERS = (
    "dora_scale is read by ComfyUI, Forge and LyCORIS; diffusers drops it with a warning, and A1111 knows columns "
    "alone (docs/export.md)"
)
KOHYA_READERS = (
    "the kohya file is a DoRA's: {rule}. diffusers drops its dora_scale, with a warning, and would load something else "
    "(there, load pytorch_lora_weights.safetensors); A1111 normalises columns, and would compute something else. For "
    "those, `reslora merge` it, or make a plain LoRA of it: `reslora convert --base MODEL --rank N`"
)
FOR_COMFYUI = "its rows are those that ComfyUI and Forge divide by norms of the base"
AS_TRAINED = (
    "its rows are divided by norms of W + dW, as LyCORIS trains them, and ComfyUI and Forge divide by norms of the "
    "base alone; with --base MODEL it is written for these"
)


def is_dora(components: Components) -> bool:
    return any(f.magnitude is not None for modules in components.values() for f in modules.values())


def has_rows(factors: LoraFactors) -> bool:
    """Return whether a magnitude is of rows."""
    return factors.magnitude is not None and factors.magnitude.values.shape[1] == 1


def shape_in_file(factors: LoraFactors, kohya: bool) -> tuple[int, ...]:
    """The shape of a magnitude's tensor."""
    assert factors.magnitude is not None
    out, width = factors.magnitude.values.shape
    trailing = (1,) * (factors.lora_A.ndim - 2)
    if kohya:
        return (out, width, *trailing)
    return (1, out, *trailing) if trailing else (out,)


def stored(factors: LoraFactors, kohya: bool) -> Tensor:
    """The tensor that a file holds of a magnitude. It is float32: half of it would move W, and not only dW."""
    assert factors.magnitude is not None
    return factors.magnitude.values.float().reshape(shape_in_file(factors, kohya)).contiguous().clone()


def magnitude_problems(components: Components, kohya: bool) -> list[str]:
    """Return why the magnitudes cannot be written in a dialect as they are."""
    problems = []
    for component, modules in components.items():
        having = {path: f for path, f in modules.items() if f.magnitude is not None}
        if not having or kohya:
            continue
        if lacking := [path for path in modules if path not in having]:
            problems.append(f"{len(lacking)} modules of {component} have no magnitude, such as {lacking[0]}")
        if columns := [path for path, f in having.items() if not has_rows(f)]:
            problems.append(
                f"{len(columns)} magnitudes of {component} are of columns, such as {columns[0]}, and PEFT has rows; "
                "merge it, or make a plain LoRA of it (--base and --rank)"
            )
        elif of_base := [path for path, f in having.items() if f.magnitude and f.magnitude.of_base]:
            problems.append(
                f"{len(of_base)} magnitudes of {component} are divided by norms of the base, as ComfyUI has them, such "
                f"as {of_base[0]}; give the base (--base MODEL)"
            )
    return problems


# ------------------------------------------------------------------------------------------------- with a base


def weights_in(models: Mapping[str, nn.Module], components: Components) -> Iterator[tuple[str, str, Tensor]]:
    """Weights of the adapted modules, on the CPU as the factors are. Only of models that hold them: hollow ones, and
    packed or sharded weights, do not."""
    for component, model in models.items():
        modules = dict(model.named_modules())
        for path in components.get(component, {}):
            layer = base_layer(modules, path)
            weight = getattr(layer, "weight", None)
            if not torch.is_tensor(weight) or weight.is_meta or 0 in weight.stride() or hasattr(weight, "full_tensor"):
                continue
            packed = type(weight).__module__.startswith("torchao")  # they call themselves bfloat16
            if weight.is_floating_point() and weight.dtype.itemsize > 1 and not packed:
                yield component, path, (weight.T if is_transposed(layer) else weight).detach().cpu()


def row_lengths(weight: Tensor) -> Tensor:
    return weight.double().flatten(1).norm(dim=1, keepdim=True)


def by_norms_of(components: Components, weights: Weights, base: bool) -> Components:
    """The same DoRA with rows that are divided by norms of W (`base`), or of W + dW, where the weights are known."""
    changed: Components = {component: dict(modules) for component, modules in components.items()}
    for component, path, weight in weights:
        f = components[component][path]
        if f.magnitude is None or not has_rows(f) or f.magnitude.of_base == base:
            continue
        W = weight.double()
        V = decomposed_weight(W, LoraFactors(*f))
        ratio = row_lengths(W) / row_lengths(V)
        values = f.magnitude.values.double() * (ratio if base else 1 / ratio)
        changed[component][path] = with_magnitude(f, Magnitude(values.nan_to_num(0, 0, 0).float(), base))
    return changed


def plain_of(components: Components, weights: Weights, rank: int) -> tuple[Components, dict[tuple[str, str], Loss]]:
    """The nearest plain LoRA of `rank` to what a DoRA changes, W' - W, and what was lost of each module."""
    found: Components = {component: {} for component in components}
    losses = {}
    for component, path, weight in weights:
        f = components[component][path]
        W = weight.double()
        factors, loss = from_matrix(decomposed_weight(W, f) - W, min(rank, *W.flatten(1).shape))
        found[component][path], losses[component, path] = factors, loss
    return found, losses


# ------------------------------------------------------------------------------------------------- ComfyUI's rule


def comfyui_weight(weight: Tensor, A: Tensor, B: Tensor, alpha: float, dora_scale: Tensor, strength: float) -> Tensor:
    """Compute a weight [out, in, ...] as ComfyUI does, in float64 (`weight_decompose`, comfy/weight_adapter/base.py).

    A, B, alpha and dora_scale as they are in the file.
    """
    W = weight.double()
    delta = alpha / len(A) * (B.double().flatten(1) @ A.double().flatten(1))
    V = W + delta.reshape(W.shape)
    if dora_scale.shape[0] == W.shape[0]:
        norms = W.flatten(1).norm(dim=1).reshape(-1, *[1] * (W.ndim - 1))
    else:
        norms = V.transpose(0, 1).flatten(1).norm(dim=1).reshape(-1, *[1] * (W.ndim - 1)).transpose(0, 1)
    whole = V * (dora_scale.double() / (norms + torch.finfo(weight.dtype).eps))
    return W + strength * (whole - W)


def kohya_dora(
    file: Path,
    trained: Components,
    written: Components,
    models: Mapping[str, nn.Module],
    naming: Naming,
    tolerance: float,
) -> "tuple[list[str], list[LoaderCheck]]":
    """Notes on a kohya file of a DoRA, and what ComfyUI's rule makes of the base with it, where the base is at hand.

    Args:
        file: it, written.
        trained, written: the same with rows by norms of W + dW, and as the file has them.
        tolerance: of W' - W, relative.

    Raises:
        CheckFailed: ComfyUI would compute something else.
    """
    rows = [f.magnitude for modules in written.values() for f in modules.values() if has_rows(f)]
    of_base = all(magnitude.of_base for magnitude in rows if magnitude is not None)
    notes = [KOHYA_READERS.format(rule=FOR_COMFYUI if of_base else AS_TRAINED)]
    errors: dict[str, float] = {}
    with open_safetensors(file) as tensors:
        for component, path, weight in weights_in(models, trained) if of_base else ():
            if trained[component][path].magnitude is None:
                continue
            name = to_kohya(component, path, naming)
            parts = ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
            A, B, alpha, scale = (tensors.get_tensor(f"{name}.{part}") for part in parts)
            exact = decomposed_weight(weight.double(), trained[component][path])
            got = comfyui_weight(weight.double(), A, B, float(alpha), scale, 1.0)
            size, off = (exact - weight.double()).norm(), (got - exact).norm()
            off = (off - ROUNDING * weight.double().norm()).clamp_min(0)  # all that float32 knows of a dora_scale
            errors[f"{component}.{path}"] = (off / size).item() if size else off.item()
    if not errors:
        return notes, []
    misread = [name for name, error in errors.items() if not error <= tolerance]
    if misread:
        raise CheckFailed(
            f"the export failed its proof; nothing was replaced: ComfyUI would compute something else in "
            f"{listing(misread)} (error {max(errors.values()):.1e} of the change)"
        )
    return notes, [LoaderCheck("ComfyUI's rule", file.name, len(errors), len(errors), max(errors.values()))]


def dora_facts(components: Components) -> dict[str, object]:
    """The entry of the header that says whose norms the rows of a kohya file are divided by."""
    rows = [f.magnitude for modules in components.values() for f in modules.values() if has_rows(f)]
    return {DORA_NORM: "base" if all(m and m.of_base for m in rows) else "sum"} if rows else {}


def by_base(components: Components) -> bool:
    """Return whether rows are divided by norms of the base."""
    return any(f.magnitude is not None and f.magnitude.of_base for m in components.values() for f in m.values())


def without_magnitudes(components: Components) -> Components:
    return {c: {path: LoraFactors(*f) for path, f in modules.items()} for c, modules in components.items()}


def with_magnitudes_of(components: Components, other: Components) -> Components:
    """The factors of one, with the magnitudes of the other."""
    return {
        component: {path: with_magnitude(f, other[component][path].magnitude) for path, f in modules.items()}
        for component, modules in components.items()
    }
