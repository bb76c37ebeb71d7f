"""`export_peft`: factors to a folder that PEFT and vLLM load as a plain LoRA, proved by PEFT itself.

    out/
      adapter_config.json          peft_type LORA; one rank r, lora_alpha = r, so scaling is 1 for every module
      adapter_model.safetensors    base_model.model.<path>.lora_A.weight [r, in], .lora_B.weight [out, r], and what the
                                   model has trained beside: a head, tokens (`beside`)
      export_report.json

The configuration holds only fields that every PEFT knows: it is strict about the others. A diffusion model's parts are
models of their own to PEFT and get a folder each (`export_peft_components`).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

import torch
from torch import nn

from reslora_diffusion.core.functional import LoraFactors
from reslora_diffusion.rules import DEFAULT_ADAPTER

from ..utils.files import fresh_folder, replace_files
from ..utils.problems import listing
from ..utils.versions import loader_versions
from .base import base_layer, base_problems, is_transposed
from .beside import Beside, hold_values, missing_head, trained_beside, trained_by_hand, unlike, without_peft
from .dora import is_dora, magnitude_problems, stored
from .factors import Components, delta_norm, on_cpu, rank_of
from .geometry import family_of
from .header import PEFT_CONFIG, PEFT_FILE
from .keys import CLIP_COMPONENTS, PEFT_PREFIX, classic_path, flat_path, magnitude_keys, peft_keys
from .limits import CheckFailed, Rank
from .lora import REPORT_FILE, size_problem
from .outputs import OutputProof, Outputs, start_proof, unmoved
from .proof import TOLERANCE, LoaderCheck, compare, errors_against, health_problems, misreading
from .ranks import RankSettings, at_rank
from .reader import read_lora
from .report import ExportReport
from .sample_inputs import Inputs
from .writer import reslora_header, save_tensors, uniform

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank accepts
MODEL = "model"


def export_peft(
    output_dir: str | os.PathLike,
    factors: Mapping[str, LoraFactors],
    *,
    base_model: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    dtype: torch.dtype = torch.float16,
    rank: Rank = "full",
    allow_lossy: bool = False,
    facts: Mapping[str, object] | None = None,
    model: nn.Module | None = None,
    component: str = MODEL,
    beside: Beside | None = None,
    adapter_name: str = DEFAULT_ADAPTER,
    inputs: Inputs | None = None,
) -> ExportReport:
    """Write and prove a PEFT adapter folder.

    Args:
        output_dir: where the files go; what is there is replaced only after the proof.
        factors: `merged_factors(model)`: module path -> factors.
        base_model: name or folder of the base, for `adapter_config.json`.
        task_type: PEFT's: "CAUSAL_LM", "SEQ_CLS", ..., or None.
        dtype, rank, allow_lossy, facts: as in `export_lora`.
        model: the trained model, or the base; names and shapes are checked against it, and `target_modules` shortens
            to what it allows. What a trained model has beside the factors is written too: `modules_to_save`, tokens, a
            resized embedding; and its outputs are compared with those that PEFT computes from the folder.
        component: "model", or what part of a diffusion pipeline this is.
        beside: what was trained beside, where it was gathered already (`beside.trained_beside`).
        adapter_name: of the adapter on `model` that the factors are.
        inputs: of the model's forward, to compare outputs on; random ones of the model's kind if not given.

    >>> report = export_peft("out", merged_factors(llm), base_model="meta-llama/...", model=llm)
    >>> print(report)   # with the --max-lora-rank that vLLM needs

    Raises:
        ValueError: the factors cannot be exported.
        CheckFailed: a ValueError too; the rank loses too much, or the written folder failed its proof.
    """
    output_dir, facts = Path(output_dir), dict(facts or {})
    if base_model:
        facts.setdefault("base_model", base_model)
    modules = {classic_path(component, path.removeprefix(PEFT_PREFIX)): on_cpu(f) for path, f in factors.items()}
    components = {component: modules} if modules else {}
    models = {component: unwrapped(model)} if model is not None else {}
    if beside is None:
        beside = trained_beside(model, adapter_name, base_model) if model is not None else Beside({}, {})
    problems = health_problems(components) + base_problems(components, models)
    problems += magnitude_problems(components, kohya=False)
    problems += [problem] if (problem := missing_head(task_type, beside.tensors)) else []
    problems += [problem] if model is not None and (problem := trained_by_hand(model, beside)) else []
    if problems:
        raise ValueError("\n".join(["this LoRA cannot be exported:", *(f"  - {p}" for p in problems)]))
    cut, file_rank, losses = at_rank(components, rank, allow_lossy=allow_lossy)
    if problem := size_problem(output_dir, cut, file_rank, dtype):
        raise ValueError(f"this LoRA cannot be exported: {problem}")
    held = uniform(cut, file_rank, dtype)[component]
    config = adapter_config(component, modules, file_rank, base_model, task_type, models.get(component)) | beside.fields
    trained = {path.removeprefix(PEFT_PREFIX): f for path, f in factors.items()}
    proof = start_proof(model, trained, adapter_name, beside, inputs)
    with fresh_folder(output_dir) as fresh, unmoved(model):
        more = {f"{PEFT_PREFIX}{name}": value.cpu().contiguous().clone() for name, value in beside.tensors.items()}
        save_tensors(peft_tensors(component, held) | more, fresh / PEFT_FILE, metadata=reslora_header(facts))
        (fresh / PEFT_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        worst = max(loss.relative_error for loss in losses.values())
        base = models.get(component)
        checks, outputs = prove_peft(fresh, component, cut[component], dtype, base, beside, proof, worst)
        paths = {"peft": Path(PEFT_FILE), "config": Path(PEFT_CONFIG)}
        written = {
            path: f
            for parts in read_lora(fresh, beside=True, dora=True).components.values()
            for path, f in parts.items()
        }
        report = ExportReport(
            folder=output_dir,
            files={kind: output_dir / path for kind, path in paths.items()},
            sha256={kind: hashlib.sha256((fresh / path).read_bytes()).hexdigest() for kind, path in paths.items()},
            family="a language model" if component == MODEL else str(family_of(components)),
            dtype=str(dtype).removeprefix("torch."),
            rank=file_rank,
            asked_rank=rank,
            rank_needed=None,
            losses=losses,
            errors=errors_against({component: written}, components),
            norms={(component, path): delta_norm(f) for path, f in modules.items()},
            ranks={(component, path): rank_of(f) for path, f in modules.items()},
            checks=checks,
            versions=loader_versions(),
            facts={key: str(value) for key, value in facts.items()},
            notes=served_notes(file_rank, is_dora(cut), beside) if component == MODEL else beside_notes(beside),
            outputs=outputs,
        )
        (fresh / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
        replace_files(fresh, output_dir, (*paths.values(), REPORT_FILE))
    return report


class PeftSettings(RankSettings, total=False):
    """The settings that `export_peft` takes besides the factors and where they belong."""

    base_model: str | None
    task_type: str | None
    facts: Mapping[str, object] | None
    beside: Beside | None


def export_peft_components(
    output_dir: str | os.PathLike,
    components: Components,
    *,
    models: Mapping[str, nn.Module] | None = None,
    **settings: Unpack[PeftSettings],
) -> list[ExportReport]:
    """One folder for a language model, or a folder for each part of a diffusion model: `out/unet`, ...

    >>> export_peft_components("out", read_lora("my_lora.safetensors").components)
    >>> PeftModel.from_pretrained(pipe.unet, "out/unet")
    """
    models = models or {}
    if components.keys() == {MODEL}:
        return [export_peft(output_dir, components[MODEL], model=models.get(MODEL), **settings)]
    settings.setdefault("task_type", None)
    return [
        export_peft(Path(output_dir, component), modules, component=component, model=models.get(component), **settings)
        for component, modules in components.items()
    ]


def unwrapped(model: nn.Module) -> nn.Module:
    """The base under PEFT's and torch.compile's wrappers."""
    return without_peft(getattr(model, "_orig_mod", model))


def beside_notes(beside: Beside) -> list[str]:
    """Return notes on what the folder holds besides, which programs other than PEFT do not load."""
    return [f"and what was trained beside the factors, for PEFT: {listing(beside.tensors)}"] if beside.tensors else []


def served_notes(rank: int, dora: bool, beside: Beside) -> list[str]:
    """Return notes on the programs that serve language models."""
    if not beside.tensors:
        return [vllm_note(rank, dora)]
    return [
        *beside_notes(beside),
        "vLLM and llama.cpp take factors alone: give them the whole model (PEFT's merge_and_unload)",
    ]


def vllm_note(rank: int, dora: bool = False) -> str:
    """Return the options by which vLLM serves the adapter, or why it cannot."""
    if dora:
        return "vLLM serves no DoRA: merge it into its base for that (`reslora merge`)"
    needed = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if needed is None:
        return f"vLLM serves ranks of at most {VLLM_RANKS[-1]}, this one has {rank}: export at a smaller rank"
    return f"vLLM: --enable-lora --max-lora-rank {needed}"


def peft_tensors(component: str, modules: Mapping[str, LoraFactors]) -> dict[str, torch.Tensor]:
    """Tensors of `adapter_model.safetensors`; CLIP's keys in both layouts, of which PEFT takes the one that fits."""
    tensors = {}
    for path, f in modules.items():
        for layout in sorted({path, flat_path(path)} if component == "text_encoder" else {path}):
            key_A, key_B = peft_keys(layout)
            tensors[key_A], tensors[key_B] = f.lora_A.clone(), f.lora_B.clone()
            if f.magnitude is not None:
                tensors |= {key: stored(f, kohya=False) for key in magnitude_keys(key_A, by_transformers=True)}
    return tensors


def adapter_config(
    component: str,
    modules: Mapping[str, LoraFactors],
    rank: int,
    base_model: str | None,
    task_type: str | None,
    model: nn.Module | None,
) -> dict:
    """`adapter_config.json`."""
    found = dict(model.named_modules()) if model is not None else {}
    transposed = {is_transposed(base_layer(found, path)) for path in modules}
    if len(transposed) > 1:
        raise ValueError("this LoRA cannot be exported: PEFT has one fan_in_fan_out for Conv1D and Linear together")
    dora = {"use_dora": True} if is_dora({component: dict(modules)}) else {}  # a field that old versions lack
    return dora | {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": None,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": target_modules(component, list(modules), found),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed == {True},
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def target_modules(component: str, paths: list[str], found: Mapping[str, nn.Module]) -> list[str]:
    """Last names, where a base is at hand and has no other modules that are called so; else whole paths."""
    if component in CLIP_COMPONENTS:
        paths = [flat_path(path) for path in paths]  # the end of the name in either layout
    leaves = {path.rpartition(".")[2] for path in paths}
    called_so = {name for name in found if name.rpartition(".")[2] in leaves and not name.endswith(".base_layer")}
    if found and {flat_path(name) if component in CLIP_COMPONENTS else name for name in called_so} == set(paths):
        return sorted(leaves)
    return sorted(paths)


def prove_peft(
    folder: Path,
    component: str,
    wanted: Mapping[str, LoraFactors],
    dtype: torch.dtype,
    model: nn.Module | None,
    beside: Beside,
    proof: OutputProof | Outputs,
    cut: float = 0.0,
) -> tuple[list[LoaderCheck], Outputs]:
    """Load the folder by PEFT, and compare the factors, all that was trained beside them, and the model's outputs.

    Args:
        folder: of PEFT.
        component: of which pipeline part, or "model".
        wanted: the factors that it should hold.
        dtype: their precision.
        model: the base, if there is one.
        beside: what was trained beside.
        proof: of the outputs; its base is loaded into. Where they cannot be compared, a hollow model is.
        cut: what the choice of a rank cost the worst module.

    Raises:
        CheckFailed: it does not mean what it should.
    """
    from peft import __version__

    from .hollow import like, placeholders
    from .loaders import ADAPTER, load_peft

    tolerance = TOLERANCE[dtype]
    if isinstance(proof, OutputProof):
        base = proof.base
    else:
        base = like(model) if model is not None else placeholders({component: dict(wanted)})[component]
        hold_values(base, beside)
    try:
        got = {component: load_peft(folder, base, component)}
    except ValueError as error:
        raise CheckFailed(f"the export failed its proof; nothing was replaced:\n  - {error}") from error
    check = compare(f"PEFT {__version__}", PEFT_FILE, got, {component: dict(wanted)}, tolerance)
    problems = [problem] if (problem := misreading(check, tolerance)) else []
    problems += health_problems(got)
    if beside.fields and (lost := unlike(trained_beside(base, ADAPTER).tensors, beside.tensors)):
        problems.append(f"PEFT does not read what was trained beside the factors: {listing(lost)}")
    outputs = proof if isinstance(proof, Outputs) else proof.compare(dtype, cut)
    problems += [outputs.problem] if outputs.problem and not problems else []
    if problems:
        raise CheckFailed(f"the export failed its proof; nothing was replaced: {listing(problems)}")
    return [check], outputs
