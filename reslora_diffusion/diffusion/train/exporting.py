"""The LoRA files of a run, and what their headers say of its training."""

import json
from collections.abc import Sequence
from pathlib import Path

from reslora_diffusion.core.merging.report import MergeReport
from reslora_diffusion.export import ExportReport, export_lora
from reslora_diffusion.export.embeddings import write_embeddings
from reslora_diffusion.export.embeddings_header import SUFFIX
from reslora_diffusion.export.geometry import ARCHITECTURE

from ..data.concepts import Concept
from ..data.wordings import tag_counts
from ..models.adapters import Adapters
from ..models.families import Family
from ..models.load import DTYPES, base_model_name
from ..options import IN_HEADER, DreamBoothOptions
from ..options.plan import Plan
from .best import Factors, Rows
from .record import export_name

OF_EMBEDDINGS = ("base_model", "trigger_words", "steps", "seed")  # facts in the header of embeddings


def header_facts(
    options: DreamBoothOptions,
    family: Family,
    method: dict[str, str],
    step: int,
    report: MergeReport | None = None,
) -> dict[str, str]:
    """Facts of training for the headers; kohya's `ss_*` are made from the same names.

    Args:
        method: shortcut and merge method, as the adapters were trained.
    """
    facts = {
        **{name: getattr(options, name) for name in IN_HEADER},
        "method": options.method,
        **method,
        "num_previous": options.num_previous,
        "handover": options.handover,
        "ss_clip_skip": options.skip_clip_layers and options.skip_clip_layers + 1,  # kohya counts from 1
        "base_model": base_model_name(options),
        ARCHITECTURE: family.architecture,
        "trigger_words": options.instance_prompt and options.worded(options.instance_prompt),
        "steps": step,
        "seed": options.seed,
        "merge_gap": report.gap if report else None,
    }
    return {key: str(value) for key, value in facts.items() if value is not None}


def tag_frequency(concepts: Sequence[Concept], dataset: str | None = None) -> str:
    """kohya's `ss_tag_frequency`, which A1111 shows: how many captions of each folder have each tag. A dataset's images
    lie in a folder of the cache, so they go by the dataset's name."""
    found: dict[str, dict[str, int]] = {}
    for concept in concepts:
        captions = [image.caption or concept.instance_prompt or "" for image in concept.trained]
        name = Path(dataset).name if dataset else concept.instance.folder.name
        found.setdefault(name, {}).update(tag_counts(captions))
    return json.dumps(found, ensure_ascii=False)


def checkpoint_number(options: DreamBoothOptions, plan: Plan, step: int) -> str:
    """The number of a checkpoint's file for ComfyUI and A1111: its step, or with `--checkpointing_epochs` as kohya's
    scripts number theirs, by passes and by steps between them."""
    if not options.checkpointing_epochs:
        return f"{step:06d}"
    passes, rest = divmod(step, plan.steps_per_epoch)
    return f"step{step:08d}" if rest else f"{passes:06d}"


def export_adapter(
    options: DreamBoothOptions,
    family: Family,
    adapters: Adapters,
    factors: Factors,
    rows: Rows,
    folder: Path,
    facts: dict[str, str],
    number: str,
) -> ExportReport:
    """Write a plain LoRA, and the embeddings [n, D] of new tokens by component if there are any; in a checkpoint, the
    file for ComfyUI and A1111 is numbered."""
    name = export_name(options)
    exported = export_lora(
        folder,
        factors,
        name=name if folder == Path(options.output_dir) else f"{name}-{number}",
        dtype=DTYPES[options.save_precision],
        facts=facts,
        models=adapters.models if options.use_dora else None,  # a file for ComfyUI needs their norms
    )
    if not rows:
        return exported
    path = folder / f"{name}{SUFFIX}"
    known = {name: value for name, value in facts.items() if name in OF_EMBEDDINGS}
    write_embeddings(path, {family.embedding_keys[part]: own for part, own in rows.items()}, options.new_tokens, known)
    return exported.with_embeddings(path)
