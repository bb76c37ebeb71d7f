"""`export_lora`: merged factors to standard LoRA files that are proved before they replace anything.

    out/
      pytorch_lora_weights.safetensors    pipe.load_lora_weights("out")
      kohya/<name>.safetensors            ComfyUI, A1111, Forge, kohya
      export_report.json                  what was checked, and the error of every module

Order of events: refuse what is not finite, all zero or wrongly shaped; choose the rank; write into a hidden folder
beside the old files; reopen and prove; rename into place. A process killed at any point leaves whole files.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from .base import base_problems
from .factors import Components, rank_of
from .geometry import family_of
from .keys import KOHYA_COMPONENTS, Naming, classic_path, listing
from .proof import errors_against, health_problems, prove
from .ranks import Rank, at_rank
from .reader import DIFFUSERS_FILE, read_lora
from .report import ExportReport
from .writer import diffusers_tensors, kohya_header, kohya_tensors, reslora_header, uniform

REPORT_FILE = "export_report.json"
KOHYA_FOLDER = "kohya"


def input_problems(components: Components, name: str) -> list[str]:
    """Faults of the request itself."""
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        problems.append(f"name {name!r} is not a file name (letters, digits and . _ + -)")
    if strange := components.keys() - set(KOHYA_COMPONENTS):
        problems.append(f"components {sorted(strange)}; wanted some of {', '.join(KOHYA_COMPONENTS)}")
    unpaired = [
        f"{component}.{path}: lora_A {list(f.lora_A.shape)}, lora_B {list(f.lora_B.shape)}"
        for component, modules in components.items()
        for path, f in modules.items()
        if f.lora_A.ndim != f.lora_B.ndim or f.lora_A.shape[0] != f.lora_B.shape[1]
    ]
    if unpaired:
        problems.append(f"lora_A [R, in] and lora_B [out, R] disagree in {listing(unpaired)}")
    return problems


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
) -> ExportReport:
    """Write and prove the two LoRA files of a diffusion model.

    Args:
        output_dir: where the files go; what is there is replaced only after the proof.
        components: `{"unet": merged_factors(unet), "text_encoder": merged_factors(text_encoder), ...}`.
        name: of the kohya file, without suffix: what users type in a prompt.
        dtype: precision of the files; scaling is folded in float32 first.
        rank: "full", a number, or "auto" (see `ranks`).
        allow_lossy: write although a module loses more than `ranks.LOSSY_ERROR` of its delta.
        facts: for the header, under `reslora.`: shortcut, num_previous, merge_method, merge_gap, base_model,
            trigger_words, ... Keys that start with `ss_` or `modelspec.` are written as they are.
        models: the base modules by component; names and shapes are then checked against them.
        naming: of the kohya file; found from the components if not given (SDXL if there is a second text encoder).

    >>> report = export_lora("out", {"unet": merged_factors(unet)}, facts={"base_model": "runwayml/..."})
    >>> print(report)

    Raises:
        ValueError: the factors cannot be exported, or a written file failed its proof.
    """
    output_dir, facts = Path(output_dir), dict(facts or {})
    components = {c: {classic_path(c, path): f for path, f in modules.items()} for c, modules in components.items()}
    components = {c: modules for c, modules in components.items() if modules}
    problems = input_problems(components, name) + health_problems(components) + base_problems(components, models or {})
    if problems:
        raise ValueError("\n".join(["this LoRA cannot be exported:", *(f"  - {p}" for p in problems)]))
    family = family_of(components)
    naming = naming or (Naming.SDXL if "text_encoder_2" in components else family.naming)
    cut, file_rank, losses = at_rank(components, rank, allow_lossy=allow_lossy)
    stored = uniform(cut, file_rank, dtype)

    fresh = output_dir / ".export"
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / KOHYA_FOLDER).mkdir(parents=True)
    relative = {"diffusers": Path(DIFFUSERS_FILE), "kohya": Path(KOHYA_FOLDER, f"{name}.safetensors")}
    try:
        save_file(diffusers_tensors(stored), fresh / relative["diffusers"], metadata=reslora_header(facts))
        tensors = kohya_tensors(stored, naming)
        header = kohya_header(tensors, facts, name=name, rank=file_rank, family=family)
        save_file(tensors, fresh / relative["kohya"], metadata=header)
        checks = prove(fresh / relative["diffusers"], fresh / relative["kohya"], cut, dtype, family, naming)
        report = ExportReport(
            files={kind: output_dir / path for kind, path in relative.items()},
            sha256={k: hashlib.sha256((fresh / path).read_bytes()).hexdigest() for k, path in relative.items()},
            family=family.value,
            dtype=str(dtype).removeprefix("torch."),
            rank=file_rank,
            asked_rank=rank,
            losses=losses,
            errors=errors_against(read_lora(fresh / relative["diffusers"]).components, components),
            ranks={(c, path): rank_of(f) for c, modules in components.items() for path, f in modules.items()},
            checks=checks,
            facts={key: str(value) for key, value in facts.items()},
        )
        (fresh / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=2))
        (output_dir / KOHYA_FOLDER).mkdir(exist_ok=True)
        for path in (*relative.values(), Path(REPORT_FILE)):
            os.replace(fresh / path, output_dir / path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return report
