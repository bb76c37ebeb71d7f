"""LoRA files to LoRA files: resize, combine, convert. Any dialect is read; what is written is proved as an export is.

    resize     every module cut to its N largest singular values
    combine    sum_k w_k delta_k, exactly by concatenation, or cut to a rank
    convert    the same LoRA for another program

A target that ends in `.safetensors` is one file; any other is a folder with everything that applies: both files of
`export_lora`, or PEFT's folder for what only PEFT can hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch
from torch import nn

from ..utils.names import file_name_from
from ..utils.problems import listing
from .combining import cancels, combined_facts, unlike_problems, weighted_sum
from .dora import by_norms_of, is_dora, plain_of, weights_in
from .embeddings_carrying import with_new_tokens
from .factors import Components
from .fusing import filled
from .generation import carry_generation
from .header import DIFFUSERS_FILE, KOHYA_FOLDER, PEFT_FILE, parts
from .hollow import Models, fitting_models
from .keys import COMPONENTS, Dialect
from .limits import LOSSY_ERROR, CheckFailed, Rank, check_weights
from .lora import export_lora, write_lora_file
from .peft_folder import MODEL, export_peft_components
from .products import plain_products, products_in
from .proof import health_problems
from .ranks import Losses, RankSettings, needed_rank
from .reader import LoraFile, read_lora
from .report import ExportReport
from .writer import carried_facts

STORABLE = (torch.float32, torch.float16, torch.bfloat16)


def resize(
    source: str | Path,
    output: str | Path,
    rank: Rank,
    *,
    dtype: torch.dtype | None = None,
    allow_lossy: bool = False,
) -> list[ExportReport]:
    """Write a LoRA at another rank, in the dialect it came in where `output` is one file.

    >>> resize("big.safetensors", "small.safetensors", 8, allow_lossy=True)

    Raises:
        ValueError: the file cannot be used.
        CheckFailed: a ValueError too; the rank loses too much, or the result failed its proof.
    """
    lora = read_lora(source, dora=True, products=True)
    dialect, components, said = lora.dialect, lora.components, list[str]()
    if products_in(components):
        components, note = cut_products(components, rank, allow_lossy)
        rank, said = "full", [note]
    reports = save_lora(
        output,
        components,
        dialect,
        sources=[source],
        dtype=dtype or kept_dtype(lora),
        rank=rank,
        allow_lossy=allow_lossy,
        facts=carried_facts(lora.metadata),
    )
    return [replace(report, notes=[*report.notes, *said]) for report in reports]


def convert(
    source: str | Path,
    output: str | Path,
    to: Dialect | str,
    *,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    rank: int | None = None,
    allow_lossy: bool = False,
) -> list[ExportReport]:
    """Write the same LoRA for another program; of a DoRA also a plain LoRA, which every program reads alike, and of a
    LoHa or LoKr that alone.

    Args:
        dtype: precision of the file; as it is, if not given.
        base: folder or hub name of the base of a DoRA, for a kohya file that ComfyUI reads as it was trained, and for
            a plain LoRA.
        rank: make a plain LoRA of this rank of a DoRA, LoHa or LoKr: the nearest to what it changes in the base.
        allow_lossy: write it although a module loses more than `limits.LOSSY_ERROR` of its change.

    >>> convert("from_civitai.safetensors", "out", "diffusers")   # out/pytorch_lora_weights.safetensors
    >>> convert("out", "for_comfyui.safetensors", "kohya")
    >>> convert("out", "adapters", "peft")                        # adapters/unet, adapters/text_encoder

    Raises:
        ValueError: the file cannot be used, or the other program has no name for its modules.
        CheckFailed: a ValueError too; the result failed its proof.
    """
    lora, to = read_lora(source, dora=True, products=True), Dialect(to)
    facts = carried_facts(lora.metadata)
    precision = dtype or kept_dtype(lora)
    components, models, note = with_base(lora.components, base, rank, to, allow_lossy)
    if to is Dialect.PEFT or Path(output).suffix == ".safetensors":
        reports = save_lora(
            output, components, to, sources=[source], facts=facts, dtype=precision, models=models, rank="full"
        )
    else:
        refuse_overwriting(output, [source])
        name, formats = file_name(output), (to,)
        report = export_lora(
            output, components, name=name, formats=formats, facts=facts, dtype=precision, models=models, rank="full"
        )
        reports = with_new_tokens([report], [source], output, name)
    return [replace(report, notes=[*report.notes, *note]) for report in reports]


def with_base(
    components: Components, base: str | None, rank: int | None, to: Dialect, allow_lossy: bool
) -> tuple[Components, Models, list[str]]:
    """Prepare a DoRA whose base is known, or a LoHa or LoKr, for writing: components, models with weights, and notes
    to print.

    Raises:
        ValueError: it is a plain LoRA, or there is a rank and no base.
        CheckFailed: a ValueError too; the rank loses too much.
    """
    if products_in(components):
        if base is not None:
            raise ValueError("--base is for DoRA, and this is a LoHa or LoKr, whose update does not depend on it")
        plain, said = cut_products(components, "full" if rank is None else rank, allow_lossy)
        return plain, {}, [said]
    if not is_dora(components):
        if base is not None or rank is not None:
            raise ValueError("--base and --rank are for DoRA, and this is a plain LoRA; `reslora resize` cuts one")
        return components, {}, []
    if base is None:
        if rank is not None:
            raise ValueError("a plain LoRA of a DoRA depends on the base: wanted --base MODEL beside --rank")
        return components, {}, []
    models = filled(fitting_models(components, base), components, base)
    if rank is None:
        if to is not Dialect.KOHYA:
            components = by_norms_of(components, weights_in(models, components), base=False)
        return components, models, []
    plain, losses = plain_of(components, weights_in(models, components), rank)
    return plain, models, [held(losses, rank, "the DoRA", allow_lossy)]


def held(losses: Losses, rank: int, what: str, allow_lossy: bool) -> str:
    """Return a note on the share of an update that a plain LoRA of this rank holds.

    Raises:
        CheckFailed: it loses more than `LOSSY_ERROR` of a module, which was not allowed.
    """
    worst, loss = max(losses.items(), key=lambda item: item[1].relative_error)
    kept = sum(one.energy_kept for one in losses.values()) / len(losses)
    said = (
        f"a plain LoRA of rank {rank} holds {kept:.1%} of what {what} changes, a module on average; most is lost of "
        f"{'.'.join(worst)} ({loss.relative_error:.0%})"
    )
    if loss.relative_error > LOSSY_ERROR and not allow_lossy:
        raise CheckFailed(f"{said}. Choose a larger --rank, or allow the loss (--allow_lossy)")
    return said


def cut_products(components: Components, rank: Rank, allow_lossy: bool) -> tuple[Components, str]:
    """The nearest plain LoRA of a LoHa or LoKr, and a line on what it loses. "auto" is the smallest rank that loses at
    most `LOSSY_ERROR` of every module.

    Raises:
        ValueError: there is no rank.
        CheckFailed: a ValueError too; the rank loses too much.
    """
    if problems := health_problems(components):
        raise ValueError("; ".join(problems))
    kind = " and ".join(sorted({components[c][path].kind for c, path in products_in(components)}))  # type: ignore[attr-defined]
    if rank != "full" and rank != "auto":
        plain, losses = plain_products(components, rank)
        return plain, held(losses, rank, f"the {kind}", allow_lossy)
    places = products_in(components)
    needed = max(needed_rank(components[c][path].singular_values()) for c, path in places)  # type: ignore[attr-defined]
    if rank == "auto":
        return cut_products(components, needed, allow_lossy)
    raise ValueError(
        f"a {kind} is no plain LoRA of a small rank; wanted --rank N: {needed} would lose at most {LOSSY_ERROR:.0%} of "
        "a module"
    )


def combine(
    sources: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    *,
    rank: Rank = "full",
    dtype: torch.dtype | None = None,
    allow_lossy: bool = False,
) -> list[ExportReport]:
    """Write the weighted sum of several LoRAs; exact unless `rank` cuts it.

    >>> combine(["subject.safetensors", "style.safetensors"], "both", [1.0, 0.6])

    Raises:
        ValueError: a file cannot be used, or they are not for one base.
        CheckFailed: a ValueError too; the rank loses too much, or the result failed its proof.
    """
    check_weights(weights or (), sources)
    weights = list(weights) if weights else [1.0] * len(sources)
    loras = [read_lora(source) for source in sources]
    problems = unlike_problems(loras)
    if problems:
        raise ValueError("\n".join(["these files cannot be combined:", *(f"  - {p}" for p in problems)]))
    total = weighted_sum([lora.components for lora in loras], weights)
    if cancels(total, [lora.components for lora in loras], weights):
        terms = " + ".join(f"{weight:g} x {source}" for weight, source in zip(weights, sources, strict=True))
        raise ValueError(f"these LoRAs cancel each other: {terms} is zero; wanted other weights, or other files")
    dialects = {lora.dialect for lora in loras}
    dtypes = [kept_dtype(lora) for lora in loras]
    return save_lora(
        output,
        total,
        loras[0].dialect if len(dialects) == 1 else Dialect.DIFFUSERS,
        sources=sources,
        dtype=dtype or (dtypes[0] if len(set(dtypes)) == 1 else torch.float32),
        rank=rank,
        allow_lossy=allow_lossy,
        facts=combined_facts(loras, weights),
    )


# -------------------------------------------------------------------------------------------------------- saving


def save_lora(
    output: str | Path,
    components: Components,
    dialect: Dialect,
    *,
    sources: Sequence[str | Path] = (),
    facts: Mapping[str, object],
    name: str | None = None,
    models: Mapping[str, nn.Module] | None = None,
    **settings: Unpack[RankSettings],
) -> list[ExportReport]:
    """One file in `dialect`, or a folder, whose kohya file has a `name`; never over one of the `sources`."""
    refuse_overwriting(output, sources)
    if Path(output).suffix == ".safetensors":
        if dialect is Dialect.PEFT:
            raise ValueError(f"{output} is a file; PEFT keeps its configuration beside the weights and wants a folder")
        done = [write_lora_file(output, components, dialect, facts=facts, models=models, **settings)]
        return with_new_tokens(done, sources, output, Path(output).stem)
    if dialect is Dialect.PEFT or not components.keys() <= set(COMPONENTS):
        stated = facts.get("base_model")
        base_model = None if stated is None else str(stated)
        done = export_peft_components(output, components, models=models, base_model=base_model, facts=facts, **settings)
        if components.keys() == {MODEL}:
            carry_generation(sources, output)
        return with_new_tokens(done, sources, output, file_name(output))
    name = name or file_name(output)
    done = [export_lora(output, components, name=name, facts=facts, models=models, **settings)]
    return with_new_tokens(done, sources, output, name)


def refuse_overwriting(output: str | Path, sources: Sequence[str | Path]) -> None:
    """Raise ValueError if writing `output` would replace a file that is being read."""
    output = Path(output)
    targets = [output] if output.suffix == ".safetensors" else [output / DIFFUSERS_FILE, output / PEFT_FILE]
    targets += [output / component / PEFT_FILE for component in COMPONENTS]
    targets += [output / KOHYA_FOLDER / f"{file_name(output)}.safetensors"]
    written = {target.resolve() for target in targets}
    if own := [str(path) for source in sources for path, _ in parts(Path(source)) if path.resolve() in written]:
        raise ValueError(f"writing {output} would replace {listing(own)}, which is being read; choose another output")
    if output.suffix == ".safetensors" and output.is_dir():
        raise ValueError(f"{output} is a folder, wanted a file name")
    if output.suffix != ".safetensors" and output.is_file():
        raise ValueError(f"{output} is a file; wanted a folder, or a name that ends in .safetensors")


def file_name(output: str | Path) -> str:
    """A name for the kohya file from the name of its folder."""
    return file_name_from(Path(output).resolve().name)


def kept_dtype(lora: LoraFile) -> torch.dtype:
    """The precision a file already has; the finest of several."""
    held = {getattr(torch, name) for name in lora.dtypes}
    if len(held) == 1 and held <= set(STORABLE):
        return held.pop()
    return torch.float16 if all(dtype.itemsize == 1 for dtype in held) else torch.float32
