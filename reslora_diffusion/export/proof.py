"""The proof of an export: each file is reopened as its loader reads it, and must mean what was to be written.

    reader            what it reads
    diffusers         the installed loader itself, `load_lora_weights` into hollow models (`hollow`); both files pass
                      through it, and what is compared is what arrived in the layers: (A, B, scaling)
    PEFT              likewise, `PeftModel.from_pretrained`
    kohya's rules     scale = alpha / rank per module, names split at the first dot
    ComfyUI, A1111    names only, by the maps of `geometry`; for the released bases SD 1.x, 2.x and XL

The measure is ||delta_read - delta_wanted||_F / ||delta_wanted||_F per module. What rounding to the file's precision
may cost is `TOLERANCE`; a missing, extra or misread module is an infinite error.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from reslora_diffusion.core.functional import LoraFactors

from ..utils.problems import listing
from .dora import is_dora
from .factors import TOLERANCE, Components, relative_error
from .geometry import GEOMETRIES, BaseKind, a1111_applies, comfyui_names
from .header import open_safetensors
from .keys import Naming, from_kohya, projects
from .limits import CheckFailed, LoaderCheck
from .products import ProductFactors
from .progress import progress
from .reader import read_lora


def tensors_of(factors: LoraFactors) -> Iterable[Tensor]:
    """Return the tensors that are multiplied to make a layer's update."""
    return factors.tensors.values() if isinstance(factors, ProductFactors) else (factors.lora_A, factors.lora_B)


def finiteness_problems(components: Components) -> list[str]:
    """Modules that hold NaN or infinity, in one message."""
    bad = []
    for component, modules in components.items():
        for path, f in modules.items():
            if not all(tensor.isfinite().all() for tensor in tensors_of(f)):
                bad.append(f"{component}.{path}")
            elif not math.isfinite(f.scaling):
                bad.append(f"{component}.{path} (scaling {f.scaling})")
            elif f.magnitude is not None and not f.magnitude.values.isfinite().all():
                bad.append(f"{component}.{path} (magnitude)")
    return [f"{len(bad)} modules hold NaN or infinity: {listing(bad)}"] if bad else []


def health_problems(components: Components) -> list[str]:
    """Reasons never to export: numbers that are not finite, and adapters that do nothing."""
    problems = finiteness_problems(components)
    zero = [
        f"{component}.{path}"
        for component, modules in components.items()
        for path, f in modules.items()
        if f.magnitude is None and (f.scaling == 0 or not all(tensor.any() for tensor in tensors_of(f)))
    ]
    if not any(components.values()):
        problems.append("there are no modules")
    elif sum(map(len, components.values())) == len(zero):
        problems.append(f"all {len(zero)} modules are zero: the adapter changes nothing")
    else:
        for component, modules in components.items():
            if modules and all(f"{component}.{path}" in zero for path in modules):
                problems.append(f"all {len(modules)} modules of {component} are zero: it was never trained")
    return problems


def flat_layout_differs(path: Path) -> list[str]:
    """Text-encoder keys of a diffusers file that are not there, alike, in both CLIP layouts."""
    with open_safetensors(path) as file:
        keys = [key for key in file.keys() if key.startswith("text_encoder.")]
        classic = {key for key in keys if ".text_model." in key}
        twins = {key: key.replace(".text_model.", ".") for key in classic if ".encoder.layers." in key}
        missing = [key for key, twin in twins.items() if twin not in keys]
        unlike = [
            k for k, twin in twins.items() if k not in missing and not file.get_tensor(k).equal(file.get_tensor(twin))
        ]
        return missing + unlike + sorted(set(keys) - classic - set(twins.values()))


# -------------------------------------------------------------------------------------------------- checking


def errors_against(got: Components, wanted: Components) -> dict[tuple[str, str], float]:
    """Relative error of every module in either; one that only `got` has, and that does nothing, is not counted."""
    extra = {(c, p) for c, modules in got.items() for p, f in modules.items() if f.lora_A.any() and f.lora_B.any()}
    names = {(c, p) for c, modules in wanted.items() for p in modules} | extra
    errors = {}
    for component, path in progress(sorted(names), "comparing"):
        read, reference = got.get(component, {}).get(path), wanted.get(component, {}).get(path)
        missing = float("inf")
        errors[component, path] = missing if read is None or reference is None else relative_error(read, reference)
    return errors


def compare(loader: str, file: str, got: Components, wanted: Components, tolerance: float) -> LoaderCheck:
    """One loader's reading of one file against what was to be written."""
    errors = errors_against(got, wanted)
    misread = [f"{component}.{path}" for (component, path), error in errors.items() if not error <= tolerance]
    return LoaderCheck(loader, file, len(errors) - len(misread), len(errors), max(errors.values()), misread)


def check_names(path: Path, wanted: Components, family: BaseKind) -> list[LoaderCheck]:
    """The names in a kohya file, looked up in ComfyUI's and A1111's maps of the base."""
    if family not in GEOMETRIES:
        return []
    comfyui = comfyui_names(family)
    with open_safetensors(path) as file:
        names = {key.partition(".")[0] for key in file.keys()}
    modules = {(c, path) for c, paths in wanted.items() for path in paths}
    in_comfyui = {comfyui[name] for name in names if name in comfyui} & modules
    in_a1111 = {from_kohya(name) for name in a1111_applies(names, family)} & modules
    return [
        LoaderCheck(
            f"{program}'s names", path.name, len(known), len(modules), None, sorted(map(".".join, modules - known))
        )
        for program, known in (("ComfyUI", in_comfyui), ("A1111 and Forge", in_a1111))
    ]


def diffusers_checks(
    files: list[Path], wanted: Components, tolerance: float, naming: Naming, models: Mapping[str, nn.Module]
) -> tuple[list[LoaderCheck], list[str]]:
    """Load each file with the installed diffusers and compare: `(checks, problems)`.

    Args:
        models: the base, by component; placeholders stand for those that are not there.
    """
    from diffusers import __version__

    from .hollow import like, placeholders
    from .loaders import load_diffusers

    checks, problems = [], []
    for file in progress(files, "loading by diffusers"):
        absent = {component: modules for component, modules in wanted.items() if component not in models}
        fresh = {component: like(models[component]) for component in wanted if component in models}
        try:
            got = load_diffusers(file, fresh | placeholders(absent), naming)
        except ValueError as error:
            problems.append(str(error))
            continue
        checks.append(compare(f"diffusers {__version__}", file.name, got, wanted, tolerance))
        problems += [f"{file.name}: {problem}" for problem in health_problems(got)]
    return checks, problems


def misreading(check: LoaderCheck, tolerance: float) -> str | None:
    """Return the fault that a check found."""
    if check.matched == check.expected:
        return None
    error = check.largest_relative_error
    off = "" if error is None else f", largest relative error {error:.1e}, allowed {tolerance:.0e}"
    count = f"{check.matched} of {check.expected} modules"
    return f"{check.loader} reads {count} of {check.file}{off}; not {listing(check.misread)}"


def prove(
    diffusers_file: Path | None,
    kohya_file: Path | None,
    wanted: Components,
    dtype: torch.dtype,
    family: BaseKind,
    naming: Naming,
    models: Mapping[str, nn.Module],
    kohya: Components | None = None,
) -> list[LoaderCheck]:
    """Check the files of an export through every loader.

    Args:
        kohya: what its file shall say, where that is something else: a DoRA is divided by other norms there. diffusers
            is not asked about that file, whose `dora_scale` it drops.

    Raises:
        CheckFailed: a file does not mean what it should.
    """
    tolerance = TOLERANCE[dtype]
    files = [file for file in (diffusers_file, kohya_file) if file and not (file is kohya_file and is_dora(wanted))]
    checks, problems = diffusers_checks(files, wanted, tolerance, naming, models)
    if kohya_file:
        read = read_lora(kohya_file, dora=True).components
        checks.append(compare("kohya's rules", kohya_file.name, read, wanted if kohya is None else kohya, tolerance))
        checks += check_names(kohya_file, wanted, family)
    problems += [problem for check in checks if (problem := misreading(check, tolerance))]
    flat = not projects("text_encoder", wanted)
    if diffusers_file and flat and (differs := flat_layout_differs(diffusers_file)):
        problems.append(f"the classic and flat text-encoder keys of {diffusers_file.name} differ: {listing(differs)}")
    if problems:
        raise CheckFailed(
            "\n".join(["the export failed its proof; nothing was replaced:", *(f"  - {p}" for p in problems)])
        )
    return checks
