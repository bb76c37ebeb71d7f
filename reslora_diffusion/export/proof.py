"""The proof of an export: each file is reopened as its loader reads it, and must mean what was to be written.

    reader            what it reads
    diffusers         the installed loader's own functions, from file to (A, B, scaling) as PEFT would apply them;
                      both files pass through it
    kohya's rules     scale = alpha / rank per module, names split at the first dot
    ComfyUI, A1111    names only, by the maps of `geometry`; for the released bases SD 1.x, 2.x and XL

The measure is ||delta_read - delta_wanted||_F / ||delta_wanted||_F per module. What rounding to the file's precision
may cost is `TOLERANCE`; a missing, extra or misread module is an infinite error.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from reslora_diffusion.core.functional import LoraFactors

from .factors import Components, relative_error
from .geometry import GEOMETRIES, Family, a1111_module, a1111_modules, comfyui_names
from .keys import LAYERS_PER_BLOCK, Naming, classic_path, from_kohya, listing, to_kohya
from .reader import open_safetensors, read_lora

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class LoaderCheck:
    """One loader's view of one file."""

    loader: str
    file: str
    matched: int
    expected: int
    largest_relative_error: float | None  # None where only names were compared

    def to_dict(self) -> dict:
        return asdict(self)


def health_problems(components: Components) -> list[str]:
    """What must never be exported: numbers that are not finite, and adapters that do nothing."""
    bad, zero = [], []
    for component, modules in components.items():
        for path, f in modules.items():
            if not (f.lora_A.isfinite().all() and f.lora_B.isfinite().all()):
                bad.append(f"{component}.{path}")
            elif f.scaling == 0 or not f.lora_A.any() or not f.lora_B.any():
                zero.append(f"{component}.{path}")
    problems = [f"{len(bad)} modules hold NaN or infinity: {listing(bad)}"] if bad else []
    if not any(components.values()):
        problems.append("there are no modules")
    elif sum(map(len, components.values())) == len(zero):
        problems.append(f"all {len(zero)} modules are zero: the adapter changes nothing")
    else:
        for component, modules in components.items():
            if modules and all(f"{component}.{path}" in zero for path in modules):
                problems.append(f"all {len(modules)} modules of {component} are zero: it was never trained")
    return problems


# -------------------------------------------------------------------------------------------- diffusers' view


def read_as_diffusers(path: Path) -> Components:
    """The factors that the installed diffusers would apply, by its loader's own functions.

    Text-encoder keys are read as by a classic CLIPTextModel; `flat_layout_differs` holds the flat ones against them.
    """
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
        get_peft_kwargs,
    )

    unet_config = SimpleNamespace(layers_per_block=LAYERS_PER_BLOCK)
    state_dict, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        str(path), unet_config=unet_config, use_safetensors=True
    )
    components: Components = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        prefix = f"{component}."
        part = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if not part:
            continue
        if component == "unet":
            part = part if "lora_A" in next(iter(part)) else convert_unet_state_dict_to_peft(part)
        else:
            part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
            part = {classic_path(component, k): v for k, v in part.items()}
        ranks = {f"^{k}" if component == "unet" else k: v.shape[1] for k, v in part.items() if "lora_B" in k}
        network_alphas = {k.removeprefix(prefix): v for k, v in (alphas or {}).items() if k.startswith(prefix)} or None
        config = get_peft_kwargs(ranks, network_alphas, part, is_unet=component == "unet")
        components[component] = as_peft_applies(part, config)
    return components


def as_peft_applies(state_dict: dict[str, torch.Tensor], config: dict) -> dict[str, LoraFactors]:
    """Factors under the LoraConfig that a loader derived, scaling = alpha / r with PEFT's pattern matching."""

    def lookup(patterns: dict, path: str, default: float) -> float:
        return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", path)), default)

    factors = {}
    for key, A in state_dict.items():
        if key.endswith(".lora_A.weight"):
            path = key.removesuffix(".lora_A.weight")
            rank = lookup(config["rank_pattern"], path, config["r"])
            alpha = lookup(config["alpha_pattern"], path, config["lora_alpha"])
            factors[path] = LoraFactors(A, state_dict[f"{path}.lora_B.weight"], alpha / rank)
    return factors


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
    """Relative error of every module in either."""
    names = {(c, p) for parts in (got, wanted) for c, modules in parts.items() for p in modules}
    errors = {}
    for component, path in sorted(names):
        read, reference = got.get(component, {}).get(path), wanted.get(component, {}).get(path)
        present = read is not None and reference is not None
        errors[component, path] = relative_error(read, reference) if present else float("inf")
    return errors


def compare(loader: str, file: str, got: Components, wanted: Components, dtype: torch.dtype) -> LoaderCheck:
    """One loader's reading of one file against what was to be written."""
    errors = errors_against(got, wanted).values()
    matched = sum(error <= TOLERANCE[dtype] for error in errors)
    return LoaderCheck(loader, file, matched, len(errors), max(errors))


def check_names(path: Path, wanted: Components, family: Family, naming: Naming) -> list[LoaderCheck]:
    """The names in a kohya file, looked up in ComfyUI's and A1111's maps of the base."""
    if family not in GEOMETRIES:
        return []
    comfyui, a1111 = comfyui_names(family), a1111_modules(family)
    with open_safetensors(path) as file:
        names = {key.partition(".")[0] for key in file.keys()}
    intended = {to_kohya(c, p, naming): (c, p) for c, modules in wanted.items() for p in modules}
    in_comfyui = sum(name in comfyui and comfyui[name] == intended.get(name) for name in names)
    in_a1111 = sum(a1111_module(name, family) in a1111 and from_kohya(name) == intended.get(name) for name in names)
    return [
        LoaderCheck("ComfyUI's names", path.name, in_comfyui, len(intended), None),
        LoaderCheck("A1111's and Forge's names", path.name, in_a1111, len(intended), None),
    ]


def prove(
    diffusers_file: Path, kohya_file: Path, wanted: Components, dtype: torch.dtype, family: Family, naming: Naming
) -> list[LoaderCheck]:
    """Check both files through every loader.

    Raises:
        ValueError: a file does not mean what it should.
    """
    from diffusers import __version__

    read = {
        (f"diffusers {__version__}", diffusers_file): read_as_diffusers(diffusers_file),
        (f"diffusers {__version__}", kohya_file): read_as_diffusers(kohya_file),
        ("kohya's rules", kohya_file): read_lora(kohya_file).components,
    }
    problems = []
    checks = [compare(loader, file.name, got, wanted, dtype) for (loader, file), got in read.items()]
    checks += check_names(kohya_file, wanted, family, naming)
    for check in checks:
        if check.matched != check.expected:
            error = check.largest_relative_error
            off = "" if error is None else f", largest relative error {error:.1e}, allowed {TOLERANCE[dtype]:.0e}"
            problems.append(f"{check.loader} reads {check.matched} of {check.expected} modules of {check.file}{off}")
    if differs := flat_layout_differs(diffusers_file):
        problems.append(f"the classic and flat text-encoder keys of {diffusers_file.name} differ: {listing(differs)}")
    for file, got in read.items():
        problems += [f"{file[1].name}: {problem}" for problem in health_problems(got)]
    if problems:
        raise ValueError(
            "\n".join(["the export failed its proof; nothing was replaced:", *(f"  - {p}" for p in problems)])
        )
    return checks
