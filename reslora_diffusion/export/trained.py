"""The LoRA of a training run: which one, and at which precision.

    run/                                        the finished run's LoRA, or else its newest checkpoint's
    run/checkpoint-N/                           the LoRA as it would be exported at that step
    run/checkpoint-N/state/merged.safetensors   the same in full precision: preferred where it is there

`save_merged` writes that last file: merged factors in float32, ranks as they are, scaling folded in. `export_trained`
is the command `reslora export`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..utils.files import atomic_write
from .header import DIFFUSERS_FILE, PEFT_FILE, read_headers
from .keys import Dialect, classic_path, diffusers_keys, magnitude_keys
from .limits import LOSSY_ERROR, Rank

if TYPE_CHECKING:
    import torch

    from .factors import Components
    from .reader import LoraFile
    from .report import ExportReport

STATE_FOLDER, MERGED_FILE = "state", "merged.safetensors"


class Trained(NamedTuple):
    """A LoRA, what its training was, and the name its run goes by."""

    lora: LoraFile
    facts: dict[str, str]
    name: str


def save_merged(folder: str | os.PathLike, components: Components, facts: Mapping[str, object] | None = None) -> Path:
    """Keep merged factors in full precision in a checkpoint's `state` folder, for exports at another rank.

    >>> save_merged("run/checkpoint-100/state", {"unet": merged_factors(unet)})
    """
    from .dora import stored
    from .factors import folded, on_cpu
    from .writer import reslora_header, save_tensors

    path = Path(folder) / MERGED_FILE
    tensors = {}
    for component, modules in components.items():
        for name, factors in modules.items():
            exact = folded(on_cpu(factors))
            key_A, key_B = diffusers_keys(component, classic_path(component, name))
            tensors[key_A], tensors[key_B] = exact.lora_A, exact.lora_B
            if exact.magnitude is not None:
                tensors[magnitude_keys(key_A, by_transformers=False)[0]] = stored(exact, kohya=False)
    with atomic_write(path) as fresh:
        save_tensors(tensors, fresh, metadata=reslora_header(facts or {}))
    return path


def checkpoints(run: Path) -> list[Path]:
    """Folders `checkpoint-N` that hold a LoRA, newest first."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    found = [path for path in found if has_lora(path)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def has_lora(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (DIFFUSERS_FILE, PEFT_FILE))


def lora_of(source: str | Path) -> Path:
    """Return the path of the LoRA of a run, a checkpoint or an export; a file or folder with a LoRA is returned as is.

    Raises:
        ValueError: there is none, or it is broken.
    """
    source = Path(source)
    folder = source
    if source.is_dir() and not has_lora(source):
        folder = next(iter(checkpoints(source)), source)
    if (
        folder.is_dir()
        and not has_lora(folder)
        and ((folder / "run.json").is_file() or (folder / STATE_FOLDER).is_dir())
    ):
        raise ValueError(
            f"{source} has trained, but holds no LoRA yet; wanted {DIFFUSERS_FILE} in it or in a checkpoint"
        )
    read_headers(folder, dora=True)
    return folder


def read_trained(source: str | Path) -> Trained:
    """The LoRA of a run, of a checkpoint, of an export folder or in a file.

    >>> read_trained("run").lora.components["unet"].keys()

    Raises:
        ValueError: there is none, or it cannot be used.
    """
    from .proof import errors_against
    from .reader import read_lora
    from .writer import carried_facts

    source, place = Path(source), lora_of(source)
    lora = read_lora(place, dora=True)
    facts = carried_facts(lora.metadata)
    if source.is_file():
        return Trained(lora, facts, source.stem)
    twins = [
        path for path in (place, *checkpoints(source)) if path.name in (place.name, f"checkpoint-{facts.get('steps')}")
    ]
    for twin in twins:
        merged = twin / STATE_FOLDER / MERGED_FILE
        if merged.is_file():
            exact = read_lora(merged, dora=True)
            if max(errors_against(lora.components, exact.components).values()) <= LOSSY_ERROR:  # one LoRA, not two
                lora = exact
                break
    run = source.resolve()
    return Trained(lora, facts, run.parent.name if run.name.startswith("checkpoint-") else run.name)


def export_trained(
    source: str | Path,
    output: str | Path,
    *,
    rank: Rank = "full",
    dtype: torch.dtype | None = None,
    name: str | None = None,
    base: str | None = None,
    allow_lossy: bool = False,
) -> list[ExportReport]:
    """Write a run's LoRA at another rank, precision or name, and prove it.

    Args:
        source: a run, a checkpoint, or anything else that holds a LoRA.
        output: a folder, or one kohya file that ends in `.safetensors`.
        rank, allow_lossy: as in `export_lora`.
        dtype: precision of the files; float16 if not given.
        name: of the kohya file; the run's if not given.
        base: folder or hub name of the base, to check names and shapes against.

    >>> export_trained("runs/panda", "panda", rank="auto")

    Raises:
        ValueError: there is no LoRA, or it does not fit the base.
        CheckFailed: a ValueError too; the rank loses too much, or a written file failed its proof.
    """
    import torch

    from .tools import save_lora

    trained = read_trained(source)
    models = {}
    if base:
        from .dora import is_dora
        from .fusing import filled
        from .hollow import fitting_models

        models = fitting_models(trained.lora.components, base)
        if is_dora(trained.lora.components):
            models = filled(models, trained.lora.components, base)
    return save_lora(
        output,
        trained.lora.components,
        Dialect.PEFT if trained.lora.dialect is Dialect.PEFT else Dialect.KOHYA,
        sources=[source] if Path(source).is_file() else [trained.lora.path],
        facts=trained.facts,
        name=name or trained.name,
        models=models,
        rank=rank,
        dtype=dtype or torch.float16,
        allow_lossy=allow_lossy,
    )
