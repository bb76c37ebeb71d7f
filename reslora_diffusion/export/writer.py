"""The tensors and headers of the two files of an export. No single file satisfies every loader, hence two.

    pytorch_lora_weights.safetensors   diffusers: PEFT keys. No alpha tensors (its loader refuses them); of
                                       `lora_adapter_metadata` only fields that every PEFT knows (it is strict about
                                       the others), which repeat what the tensors say; the CLIP text encoder's keys in
                                       the classic and the flat layout, because a diffusers that does not translate
                                       them finds only the one it runs on.
    kohya/<name>.safetensors           ComfyUI, A1111, Forge, kohya: classic names only (Forge refuses a file with a
                                       dozen unknown keys), one alpha for all modules (diffusers misreads several).

Both rely on alpha = rank and one rank for the whole file, the only convention that every loader of every age reads the
same way; so scaling is folded into the factors, in float32, and smaller modules are padded with zeros.

Equal factors and facts make equal bytes: headers are in the order of their keys, and hold no time of day. A date that
the caller states (`modelspec.date`), or SOURCE_DATE_EPOCH, is written.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from reslora_diffusion.core.functional import LoraFactors

from ..utils.problems import listing
from ..utils.versions import loader_versions
from .dora import stored
from .factors import TOLERANCE, Components, folded, padded
from .flux import join
from .geometry import ARCHITECTURE, ATTENTION_PARTS, CHROMA, BaseKind, family_of, is_open_clip, says_chroma
from .header import DIFFUSERS_METADATA
from .keys import CLIP_COMPONENTS, Dialect, Naming, diffusers_keys, flat_path, magnitude_keys, projects, to_kohya
from .progress import progress

ARCHITECTURES = {
    BaseKind.SD1: "stable-diffusion-v1",
    BaseKind.SD2: "stable-diffusion-v2-512",
    BaseKind.SDXL: "stable-diffusion-xl-v1-base",
    BaseKind.CUSTOM: "stable-diffusion-custom",
    BaseKind.FLUX: "flux-1-dev",
    BaseKind.CHROMA: CHROMA,
}
KOHYA_BASES = {
    BaseKind.SD1: "sd_v1",
    BaseKind.SD2: "sd_v2",
    BaseKind.SDXL: "sdxl_base_v1-0",
    BaseKind.FLUX: "flux1",
    BaseKind.CHROMA: CHROMA,
}
IMPLEMENTATIONS = {
    BaseKind.SDXL: "https://github.com/Stability-AI/generative-models",
    BaseKind.FLUX: "https://github.com/black-forest-labs/flux",
    BaseKind.CHROMA: "https://huggingface.co/lodestones/Chroma",
}
# Facts that kohya's trainer states under the same name, or under another.
KOHYA_FACTS = {
    name: f"ss_{name}"
    for name in """steps max_train_steps num_epochs epoch seed learning_rate unet_lr text_encoder_lr optimizer
    lr_scheduler lr_warmup_steps gradient_accumulation_steps gradient_checkpointing mixed_precision noise_offset
    max_grad_norm num_train_images num_reg_images""".split()
} | {"snr_gamma": "ss_min_snr_gamma", "train_batch_size": "ss_total_batch_size", "base_model": "ss_sd_model_name"}
# What describes a file rather than its training: written anew, never carried over from another file.
COMPUTED = re.compile(
    r"ss_(network_(module|dim|alpha|args)|output_name|v2|base_model_version)|sshs_\w+|reslora\.version\..*"
    r"|reslora\.dora_norm|modelspec\.(sai_model_spec|architecture|implementation|title|date|hash_sha256)"
)


def uniform(components: Components, rank: int, dtype: torch.dtype) -> Components:
    """Every module with scaling 1 at `rank`, in `dtype`.

    Raises:
        ValueError: a number does not fit `dtype`, or next to nothing would be left of a module.
    """
    held: Components = {component: {} for component in components}
    todo = [(c, path, factors) for c, modules in components.items() for path, factors in modules.items()]
    too_large, too_small = [], []
    for component, path, factors in progress(todo, "folding"):
        exact = padded(folded(factors), rank)
        cast = exact._replace(lora_A=exact.lora_A.to(dtype), lora_B=exact.lora_B.to(dtype))
        if not (cast.lora_A.isfinite().all() and cast.lora_B.isfinite().all()):
            too_large.append(f"{component}.{path}")
        elif any(lost(kept, given) > TOLERANCE[dtype] for kept, given in zip(cast[:2], exact[:2], strict=True)):
            too_small.append(f"{component}.{path}")
        held[component][path] = cast
    if too_large:
        raise ValueError(f"{listing(too_large, 1)} overflow {dtype}; write float32 or bfloat16")
    if too_small:
        raise ValueError(
            f"{listing(too_small, 1)} vanish in {dtype}: their numbers are too small for it. The adapter was hardly "
            "trained, or not at all; write float32 or bfloat16 if it is to be kept"
        )
    return held


def lost(kept: Tensor, given: Tensor) -> float:
    """||kept - given|| / ||given||: what a precision swallowed of one factor."""
    size = given.double().norm()
    return ((kept.double() - given.double()).norm() / size).item() if size else 0.0


def diffusers_tensors(components: Components) -> dict[str, Tensor]:
    """Tensors of `pytorch_lora_weights.safetensors`."""
    tensors = {}
    for component, modules in components.items():
        for path, factors in recognisable(component, modules, Dialect.DIFFUSERS).items():
            flat = component == "text_encoder" and not projects(component, components)
            layouts = {path, flat_path(path)} if flat else {path}
            for layout in sorted(layouts):
                key_A, key_B = diffusers_keys(component, layout)
                tensors[key_A], tensors[key_B] = factors.lora_A.clone(), factors.lora_B.clone()
                if factors.magnitude is not None:
                    for key in magnitude_keys(key_A, by_transformers=component in CLIP_COMPONENTS):
                        tensors[key] = stored(factors, kohya=False)
    return tensors


def diffusers_metadata(components: Components, rank: int) -> dict[str, str]:
    """`lora_adapter_metadata` as diffusers' `save_lora_weights` writes it; it repeats that alpha is the rank."""
    stated: dict[str, object] = {}
    for component, modules in components.items():
        paths = recognisable(component, modules, Dialect.DIFFUSERS)
        targets = sorted(flat_path(path) if component in CLIP_COMPONENTS else path for path in paths)
        fields: dict[str, object] = {"r": rank, "lora_alpha": rank, "target_modules": targets}
        if any(f.magnitude is not None for f in modules.values()):
            fields["use_dora"] = True
        stated |= {f"{component}.{field}": value for field, value in fields.items()}
    return {DIFFUSERS_METADATA: json.dumps(stated, sort_keys=True)}


def kohya_tensors(components: Components, naming: Naming) -> dict[str, Tensor]:
    """Tensors of the kohya file: up, down and alpha, equal to the rank: one for all, but of FLUX.1's joined layers."""
    tensors = {}
    for component, modules in components.items():
        named = join(modules) if naming is Naming.FLUX and component == "transformer" else modules
        named = recognisable(component, named, Dialect.KOHYA)
        if is_open_clip(component, family_of(components)) and naming is not Naming.FLUX:
            named = whole_attention(named)
        for path, factors in named.items():
            name = to_kohya(component, path, naming)
            tensors[f"{name}.lora_down.weight"] = factors.lora_A.clone()
            tensors[f"{name}.lora_up.weight"] = factors.lora_B.clone()
            tensors[f"{name}.alpha"] = torch.tensor(float(factors.lora_A.shape[0]))
            if factors.magnitude is not None:
                tensors[f"{name}.dora_scale"] = stored(factors, kohya=True)
    return tensors


def out_projection(modules: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """A LoRA of zeros for the `out_proj` of one layer of a CLIP text encoder."""
    path, f = next(iter(modules.items()))
    width = f.lora_B.shape[0] if path.endswith("fc2") else f.lora_A.shape[1]
    A, B = f.lora_A.new_zeros(len(f.lora_A), width), f.lora_A.new_zeros(width, len(f.lora_A))
    layer = path.rpartition(".self_attn." if ".self_attn." in path else ".mlp.")[0]
    return {f"{layer}.self_attn.out_proj": LoraFactors(A, B, 1.0)}


def whole_attention(modules: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """The same LoRA of an OpenCLIP text encoder, with modules of zeros where a layer's attention lacks some of q, k, v
    and out: A1111 uses none of them otherwise (`geometry.a1111_applies`)."""
    whole = dict(modules)
    for path, factors in modules.items():
        layer, attention, _ = path.partition(".self_attn.")
        if attention:
            zeros = LoraFactors(torch.zeros_like(factors.lora_A), torch.zeros_like(factors.lora_B), 1.0)
            for part in ATTENTION_PARTS:
                whole.setdefault(f"{layer}.self_attn.{part}_proj", zeros)
    return whole


def recognisable(component: str, modules: Mapping[str, LoraFactors], dialect: Dialect) -> dict[str, LoraFactors]:
    """The same LoRA, with a module of zeros where diffusers would not recognise its text encoder otherwise.

    By the names of some modules its loader tells apart the dialects of text encoders, not by all: of a kohya file
    with attention but no `out_proj` it drops q, k and v; a file in its own dialect without attention it refuses.
    """
    attention = [path for path in modules if ".self_attn." in path]
    if dialect is Dialect.KOHYA:
        strange = attention and not any(path.endswith("out_proj") for path in attention)
    else:
        strange = not attention
    if component not in CLIP_COMPONENTS or not strange:
        return dict(modules)
    return {**modules, **out_projection(modules)}


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """`safetensors.torch.save_file`, with the header in order, and readable by whom the user's umask allows: the
    library lets nobody else read. `path` is not yet where others look: it is written to twice."""
    save_file(tensors, path, metadata=metadata)
    order_header(path)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def order_header(path: Path) -> None:
    """Sort the metadata of a safetensors file, which the library writes in another order each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        if len(ordered) != length:
            raise ValueError(f"{path}: its header has {length} bytes, and {len(ordered)} in order")
        file.seek(8)
        file.write(ordered)


def stated_date() -> dict[str, str]:
    """The time of a build that is to be repeatable, as reproducible-builds.org has it."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    return {"modelspec.date": datetime.fromtimestamp(int(seconds), UTC).isoformat()} if seconds.isdigit() else {}


def reslora_header(facts: Mapping[str, object]) -> dict[str, str]:
    """`reslora.*`: how the LoRA was trained and merged (shortcut, num_previous, merge_method, merge_gap, base_model,
    trigger_words, ...) and the versions that wrote it. Every loader ignores header keys it does not know."""
    versions = {f"version.{package}": number for package, number in loader_versions().items()}
    stated = {key: str(value) for key, value in (versions | dict(facts)).items()}
    return {"format": "pt"} | {
        key if key.startswith(("ss_", "modelspec.", "reslora.")) else f"reslora.{key}": value
        for key, value in stated.items()
    }


def carried_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """The facts of another file's header that stay true of a LoRA that is resized or converted."""
    known = {key: value for key, value in metadata.items() if key.startswith(("ss_", "modelspec.", "reslora."))}
    chroma = {ARCHITECTURE} if says_chroma(metadata) else set()  # nothing else tells
    return {
        key.removeprefix("reslora."): value
        for key, value in known.items()
        if key in chroma or not COMPUTED.fullmatch(key)
    }


def kohya_header(
    tensors: dict[str, Tensor], facts: Mapping[str, object], *, name: str, rank: int, family: BaseKind
) -> dict[str, str]:
    """Return the header that UIs show: kohya's `ss_*`, the hashes A1111 indexes by, Stability's model specification."""
    trained = {
        "ss_network_module": "networks.lora_flux" if family in (BaseKind.FLUX, BaseKind.CHROMA) else "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": "{}",
        "ss_output_name": name,
        "ss_v2": str(family is BaseKind.SD2),
    }
    predicts_v = facts.get("prediction_type") == "v_prediction"
    architecture = ARCHITECTURES[family]
    if family in KOHYA_BASES:
        trained["ss_base_model_version"] = KOHYA_BASES[family] + ("_v" if predicts_v else "")
    if family is BaseKind.SD2 and predicts_v:
        architecture = "stable-diffusion-v2-768-v"
    trained |= {theirs: str(facts[ours]) for ours, theirs in KOHYA_FACTS.items() if facts.get(ours) is not None}
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": IMPLEMENTATIONS.get(family, "diffusers"),
        "modelspec.title": name,
    } | stated_date()
    if resolution := facts.get("resolution"):
        trained["ss_resolution"] = f"({resolution}, {resolution})"
        spec["modelspec.resolution"] = f"{resolution}x{resolution}"
    if trigger := facts.get("trigger_words"):
        spec["modelspec.trigger_phrase"] = str(trigger)
    header = trained | spec | reslora_header(facts)
    return header | model_hashes(tensors, {k: v for k, v in header.items() if k.startswith("ss_")})


def model_hashes(tensors: dict[str, Tensor], trained: dict[str, str]) -> dict[str, str]:
    """The two hashes by which sd-webui-additional-networks and A1111 know a LoRA, over the file with `ss_*` alone."""
    data = save(tensors, trained)
    start = 8 + int.from_bytes(data[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }
