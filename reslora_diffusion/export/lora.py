"""`export_lora`: merged factors to standard LoRA files that are proved before they replace anything.

    out/
      pytorch_lora_weights.safetensors    pipe.load_lora_weights("out")
      kohya/<name>.safetensors            ComfyUI, A1111, Forge, kohya
      export_report.json                  what was checked, and the error of every module

Order of events: refuse what is not finite, all zero, wrongly shaped or too large; choose the rank; write into a hidden
folder beside the old files; reopen and prove; rename into place. A process killed at any point leaves whole files.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..utils.files import fresh_folder, replace_files
from ..utils.names import composed, file_name_problem
from ..utils.problems import listing
from ..utils.versions import loader_versions
from .base import base_problems
from .dora import by_norms_of, dora_facts, is_dora, kohya_dora, magnitude_problems, weights_in, with_magnitudes_of
from .factors import TOLERANCE, Components, delta_norm, on_cpu, rank_of
from .flux import layer_of
from .geometry import BaseKind, family_of, naming_of, told_apart
from .header import DIFFUSERS_FILE, KOHYA_FOLDER
from .keys import COMPONENTS, Dialect, Naming, classic_path
from .limits import LARGEST_EXPORT, Rank
from .proof import errors_against, health_problems, prove
from .ranks import at_rank, smallest_rank
from .reader import read_lora
from .report import REPORT_FILE, ExportReport
from .writer import (
    diffusers_metadata,
    diffusers_tensors,
    kohya_header,
    kohya_tensors,
    recognisable,
    reslora_header,
    save_tensors,
    uniform,
)


def export_lora(
    output_dir: str | os.PathLike,
    components: Components,
    *,
    name: str = "reslora",
    dtype: torch.dtype = torch.float16,
    rank: Rank = "full",
    allow_lossy: bool = False,
    facts: Mapping[str, object] | None = None,
    models: Mapping[str, nn.Module] | None = None,
    naming: Naming | None = None,
    formats: Sequence[str] | None = None,
) -> ExportReport:
    """Write and prove the LoRA files of a diffusion model.

    Args:
        output_dir: where the files go; what is there is replaced only after the proof.
        components: `{"unet": merged_factors(unet), "text_encoder": merged_factors(text_encoder), ...}`.
        name: of the kohya file, without suffix: what users type in a prompt.
        dtype: precision of the files; scaling is folded in float32 first.
        rank: "full", a number, or "auto" (see `ranks`).
        allow_lossy: write although a module loses more than `limits.LOSSY_ERROR` of its delta.
        facts: for the header, under `reslora.`: shortcut, num_previous, merge_method, merge_gap, base_model,
            trigger_words, ... Keys that start with `ss_` or `modelspec.` are written as they are.
        models: the base modules by component; names and shapes are then checked against them, and the loaders load
            into their architecture.
        naming: of the kohya file; found from the components if not given.
        formats: which of the two files; both, if not given, and for a transformer other than FLUX.1 the first.

    >>> report = export_lora("out", {"unet": merged_factors(unet)}, facts={"base_model": "runwayml/..."})
    >>> print(report)

    Raises:
        ValueError: the factors cannot be exported.
        CheckFailed: a ValueError too; the rank loses too much, or a written file failed its proof.
    """
    if formats is None:
        joined = is_dora({"": components.get("transformer", {})})
        formats = ("diffusers", "kohya") if has_kohya_names(components) and not joined else ("diffusers",)
    if not formats or not set(formats) <= {"diffusers", "kohya"}:
        raise ValueError(f"formats: got {list(formats)}, wanted 'diffusers', 'kohya' or both")
    name = composed(name)
    homes = {Dialect.DIFFUSERS: Path(DIFFUSERS_FILE), Dialect.KOHYA: Path(KOHYA_FOLDER, f"{name}.safetensors")}
    files = {Dialect(kind): homes[Dialect(kind)] for kind in formats}
    return write_proved(
        Path(output_dir), files, components, name, dtype, rank, allow_lossy, facts or {}, models or {}, naming, True
    )


def write_lora_file(
    path: str | os.PathLike,
    components: Components,
    dialect: Dialect | str,
    *,
    dtype: torch.dtype = torch.float16,
    rank: Rank = "full",
    allow_lossy: bool = False,
    facts: Mapping[str, object] | None = None,
    models: Mapping[str, nn.Module] | None = None,
    naming: Naming | None = None,
) -> ExportReport:
    """One proved file of any name, in diffusers' or kohya's dialect; arguments as in `export_lora`.

    >>> write_lora_file("my_lora.safetensors", read_lora("out").components, "kohya")
    """
    path = Path(path)
    files = {Dialect(dialect): Path(path.name)}
    return write_proved(
        path.parent, files, components, path.stem, dtype, rank, allow_lossy, facts or {}, models or {}, naming, False
    )


def write_proved(
    folder: Path,
    files: Mapping[Dialect, Path],
    components: Components,
    name: str,
    dtype: torch.dtype,
    rank: Rank,
    allow_lossy: bool,
    facts: Mapping[str, object],
    models: Mapping[str, nn.Module],
    naming: Naming | None,
    save_report: bool,
) -> ExportReport:
    """Both of the above: `files` gives each dialect its place inside `folder`."""
    components = {
        c: {classic_path(c, path): on_cpu(f) for path, f in modules.items()} for c, modules in components.items()
    }
    components = {c: modules for c, modules in components.items() if modules}
    problems = input_problems(components, name, files) + health_problems(components)
    if not problems and Dialect.DIFFUSERS in files:
        problems += magnitude_problems(recognised(components), kohya=False)
    problems += base_problems(components, models)
    if problems:
        raise ValueError("\n".join(["this LoRA cannot be exported:", *(f"  - {p}" for p in problems)]))
    family = told_apart(family_of(components), facts)
    naming = naming or naming_of(components)
    cut, file_rank, losses = at_rank(components, rank, allow_lossy=allow_lossy)
    if problem := size_problem(folder, cut, file_rank, dtype, len(files)):
        raise ValueError(f"this LoRA cannot be exported: {problem}")
    stored = uniform(cut, file_rank, dtype)
    in_kohya = by_norms_of(cut, weights_in(models, cut), base=True) if is_dora(cut) else cut
    with fresh_folder(folder) as fresh:
        placed = {dialect: fresh / path for dialect, path in files.items()}
        for path in placed.values():
            path.parent.mkdir(exist_ok=True)
        if diffusers_file := placed.get(Dialect.DIFFUSERS):
            metadata = reslora_header(facts) | diffusers_metadata(stored, file_rank)
            save_tensors(diffusers_tensors(stored), diffusers_file, metadata=metadata)
        if kohya_file := placed.get(Dialect.KOHYA):
            tensors = kohya_tensors(with_magnitudes_of(stored, in_kohya), naming)
            stated = dict(facts) | dora_facts(in_kohya)
            header = kohya_header(tensors, stated, name=name, rank=file_rank, family=family)
            save_tensors(tensors, kohya_file, metadata=header)
        checks = prove(
            placed.get(Dialect.DIFFUSERS), placed.get(Dialect.KOHYA), cut, dtype, family, naming, models, in_kohya
        )
        notes: list[str] = []
        if kohya_file and is_dora(cut):
            notes, checked = kohya_dora(kohya_file, cut, in_kohya, models, naming, TOLERANCE[dtype])
            checks += checked
        written = read_lora(next(iter(placed.values())), dora=True).components
        reference = components if Dialect.DIFFUSERS in files else with_magnitudes_of(components, in_kohya)
        report = ExportReport(
            folder=folder,
            files={str(dialect): folder / path for dialect, path in files.items()},
            sha256={str(dialect): hashlib.sha256(path.read_bytes()).hexdigest() for dialect, path in placed.items()},
            family=str(family),
            dtype=str(dtype).removeprefix("torch."),
            rank=file_rank,
            asked_rank=rank,
            rank_needed=smallest_rank(components) if rank == "full" and facts.get("shortcut") == "block" else None,
            losses=losses,
            errors=errors_against(written, reference),
            norms={(c, path): delta_norm(f) for c, modules in components.items() for path, f in modules.items()},
            ranks={(c, path): rank_of(f) for c, modules in components.items() for path, f in modules.items()},
            checks=checks,
            versions=loader_versions(),
            facts={key: str(value) for key, value in facts.items()},
            notes=notes,
        )
        moved = list(files.values())
        if save_report:
            (fresh / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
            moved.append(Path(REPORT_FILE))
        replace_files(fresh, folder, moved)
    return report


def recognised(components: Components) -> Components:
    """Return the components of a file for diffusers, with the zeros by which its text encoders are recognised."""
    return {c: recognisable(c, modules, Dialect.DIFFUSERS) for c, modules in components.items()}


def has_kohya_names(components: Components) -> bool:
    """Return whether kohya's trainer has names for the adapted layers; of transformers, only FLUX.1's blocks have."""
    transformer = components.get("transformer")
    return not transformer or (family_of(components) is BaseKind.FLUX and all(map(layer_of, transformer)))


def input_problems(components: Components, name: str, files: Mapping[Dialect, Path]) -> list[str]:
    """Faults of the request itself."""
    problems = []
    if Dialect.KOHYA in files and (problem := file_name_problem(name)):
        problems.append(f"name {problem}")
    if strange := components.keys() - set(COMPONENTS):
        problems.append(f"components {sorted(strange)}; wanted some of {', '.join(COMPONENTS)}")
    if Dialect.KOHYA in files and is_dora({"": components.get("transformer", {})}):
        problems.append(
            "a kohya file has one dora_scale for layers of FLUX.1 that are several in diffusers; wanted diffusers' "
            "dialect alone (formats), or a plain LoRA"
        )
    elif Dialect.KOHYA in files and not has_kohya_names(components):
        problems.append(
            "a kohya file is for a unet or FLUX.1's blocks, and this LoRA is not; wanted diffusers' dialect"
        )
    unpaired = [
        f"{component}.{path}: lora_A {list(f.lora_A.shape)}, lora_B {list(f.lora_B.shape)}"
        for component, modules in components.items()
        for path, f in modules.items()
        if f.lora_A.ndim != f.lora_B.ndim or f.lora_A.shape[0] != f.lora_B.shape[1]
    ]
    if unpaired:
        problems.append(f"lora_A [R, in] and lora_B [out, R] disagree in {listing(unpaired)}")
    return problems


def size_problem(folder: Path, components: Components, rank: int, dtype: torch.dtype, files: int = 1) -> str | None:
    """Return why files of this size are refused, before anything is padded to that rank."""
    numbers = sum(
        rank * (f.lora_A[0].numel() + f.lora_B.shape[0]) * (2 if component == "text_encoder" else 1)
        for component, modules in components.items()
        for f in modules.values()
    )
    size = numbers * dtype.itemsize
    if size > LARGEST_EXPORT:
        return (
            f"every module at rank {rank} makes {size / 2**30:.1f} GiB, more than {LARGEST_EXPORT / 2**30:.0f}; "
            "choose a smaller rank, or 'auto'"
        )
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if (free := shutil.disk_usage(existing).free) < size * files:
        return f"{size * files / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free in {folder}"
    return None
