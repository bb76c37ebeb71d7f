"""The released Stable Diffusion geometries, and the name maps by which ComfyUI and A1111 find a LoRA's modules.

Both programs hold Stability's checkpoint in Stability's module tree, so a name in a kohya file must resolve to a module
of that tree. ComfyUI walks the UNet's configuration, counting blocks, and lists every name it will accept; A1111 (and
Forge, and SD.Next) rewrites each name by regular expressions and looks the result up. The two rules are written here
from their behaviour, independently of `keys.to_sgm`, so that the proof of an export can hold one against the other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from .flux import STACKS
from .keys import KOHYA_COMPONENTS, Naming

if TYPE_CHECKING:  # names are looked up without waiting for torch
    from .factors import Components


class BaseKind(StrEnum):
    """The model that a LoRA is for, as far as its names and shapes tell."""

    SD1 = "Stable Diffusion 1.x"
    SD2 = "Stable Diffusion 2.x"
    SDXL = "Stable Diffusion XL"
    FLUX = "FLUX.1"
    CHROMA = "Chroma"
    TRANSFORMER = "a diffusion transformer"
    CUSTOM = "a custom Stable Diffusion geometry"
    OTHER = "no Stable Diffusion"

    @property
    def is_named(self) -> bool:
        """Return whether the family of the base is known."""
        return self in GEOMETRIES


@dataclass(frozen=True)
class Geometry:
    """Transformer depth per level (0 = no attention), cross-attention width, CLIP layers per text encoder."""

    depths: tuple[int, ...]
    mid_depth: int
    cross_attention_dim: int
    clip_layers: dict[str, int]


GEOMETRIES = {
    BaseKind.SD1: Geometry((1, 1, 1, 0), 1, 768, {"text_encoder": 12}),
    BaseKind.SD2: Geometry((1, 1, 1, 0), 1, 1024, {"text_encoder": 23}),
    BaseKind.SDXL: Geometry((0, 2, 10), 10, 2048, {"text_encoder": 12, "text_encoder_2": 32}),
}
OF_FLUX_2 = re.compile(r"single_transformer_blocks\.\d+\.attn\.to_(qkv_mlp_proj|out)$")  # klein is as wide as FLUX.1
ARCHITECTURE, CHROMA = "modelspec.architecture", "chroma"  # a key of headers, and what it says for Chroma
FLUX_WIDTH, FLUX_BLOCKS = 3072, ("single_transformer_blocks.", *(f"{stack}." for stack in STACKS))
BLOCK = [f"attn{n}.to_{p}" for n in (1, 2) for p in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION_PARTS = ("q", "k", "v", "out")
CLIP_LAYER = [f"self_attn.{p}_proj" for p in ATTENTION_PARTS] + ["mlp.fc1", "mlp.fc2"]


def family_of(components: Components) -> BaseKind:
    """The base model that names and shapes point to."""
    return family_of_widths({c: {p: f.lora_A.shape[1] for p, f in m.items()} for c, m in components.items()})


def family_of_widths(widths: Mapping[str, Mapping[str, int]]) -> BaseKind:
    """The base model that names and numbers of inputs point to: component -> path -> width."""
    if transformer := widths.get("transformer"):
        read = {n for path, n in transformer.items() if path.endswith((".attn.to_q", "_attn.qkv", ".linear1"))}
        blocks = any(path.startswith(FLUX_BLOCKS) for path in transformer) and not any(
            map(OF_FLUX_2.search, transformer)
        )
        return BaseKind.FLUX if blocks and read == {FLUX_WIDTH} else BaseKind.TRANSFORMER
    if not widths.keys() <= set(KOHYA_COMPONENTS):
        return BaseKind.OTHER
    cross = {n for path, n in widths.get("unet", {}).items() if path.endswith(("attn2.to_k", "attn2.to_v"))}
    clip = {n for path, n in widths.get("text_encoder", {}).items() if path.endswith("q_proj")}
    for family, geometry in GEOMETRIES.items():
        paths = module_paths(geometry)
        fits = all(modules.keys() <= paths.get(component, set()) for component, modules in widths.items())
        second = ("text_encoder_2" in widths) == (family is BaseKind.SDXL) or "unet" in widths
        text_width = 1024 if family is BaseKind.SD2 else 768
        if fits and second and cross <= {geometry.cross_attention_dim} and clip <= {text_width}:
            return family
    return BaseKind.CUSTOM


def told_apart(family: BaseKind, header: Mapping[str, object]) -> BaseKind:
    """Chroma where a header says so, whose blocks have the names and widths of FLUX.1's; any other family as it is."""
    return BaseKind.CHROMA if family is BaseKind.FLUX and says_chroma(header) else family


def says_chroma(header: Mapping[str, object]) -> bool:
    """Return whether a header says that its LoRA is for Chroma."""
    return str(header.get(ARCHITECTURE, "")).startswith(CHROMA)


def naming_of(components: Components) -> Naming:
    """Return the scheme by which a kohya file names these modules."""
    if named := {BaseKind.SDXL: Naming.SDXL, BaseKind.FLUX: Naming.FLUX}.get(family_of(components)):
        return named
    return Naming.TWO_ENCODERS if "text_encoder_2" in components else Naming.SD


def module_paths(geometry: Geometry) -> dict[str, set[str]]:
    """Every module of the base that a LoRA may adapt, in diffusers' names."""
    layers = {c: {f"text_model.encoder.layers.{n}.{m}" for n in range(count) for m in CLIP_LAYER}
              for c, count in geometry.clip_layers.items()}  # fmt: skip
    return {"unet": {ours for ours, _ in unet_pairs(geometry)}, **layers}


def unet_pairs(geometry: Geometry) -> Iterator[tuple[str, str]]:
    """(diffusers name, Stability name) of every module, by walking the blocks in order and counting."""

    def attention(ours: str, sgm: str, depth: int) -> Iterator[tuple[str, str]]:
        for leaf in ("proj_in", "proj_out"):
            yield f"{ours}.{leaf}", f"{sgm}.{leaf}"
        for t in range(depth):
            yield from ((f"{ours}.transformer_blocks.{t}.{m}", f"{sgm}.transformer_blocks.{t}.{m}") for m in BLOCK)

    def resnet(ours: str, sgm: str) -> Iterator[tuple[str, str]]:
        yield from ((f"{ours}.{leaf}", f"{sgm}.{stability}") for leaf, stability in RESNET.items())

    levels = len(geometry.depths)
    count = 1  # input_blocks.0 is conv_in
    for level, depth in enumerate(geometry.depths):
        for j in range(2):
            yield from resnet(f"down_blocks.{level}.resnets.{j}", f"input_blocks.{count}.0")
            if depth:
                yield from attention(f"down_blocks.{level}.attentions.{j}", f"input_blocks.{count}.1", depth)
            count += 1
        if level < levels - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{count}.0.op"
            count += 1
    yield from resnet("mid_block.resnets.0", "middle_block.0")
    yield from attention("mid_block.attentions.0", "middle_block.1", geometry.mid_depth)
    yield from resnet("mid_block.resnets.1", "middle_block.2")
    count = 0
    for level, depth in enumerate(reversed(geometry.depths)):
        for j in range(3):
            yield from resnet(f"up_blocks.{level}.resnets.{j}", f"output_blocks.{count}.0")
            if depth:
                yield from attention(f"up_blocks.{level}.attentions.{j}", f"output_blocks.{count}.1", depth)
            if j == 2 and level < levels - 1:
                yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{count}.{2 if depth else 1}.conv"
            count += 1
    yield from (
        ("conv_in", "input_blocks.0.0"),
        ("conv_out", "out.2"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
    )
    if levels == 3:  # only SDXL embeds sizes and pooled text
        yield from (("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"))


def comfyui_names(family: BaseKind) -> dict[str, tuple[str, str]]:
    """Every LoRA name that ComfyUI accepts for this base, and the module it patches, in diffusers' terms."""
    names = {}
    geometry = GEOMETRIES[family]
    for ours, sgm in unet_pairs(geometry):
        for name in (ours, sgm):
            names[f"lora_unet_{name.replace('.', '_')}"] = ("unet", ours)
    for component, paths in module_paths(geometry).items():
        prefixes = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}.get(component, ())
        names |= {prefix + path.replace(".", "_"): (component, path) for prefix in prefixes for path in paths}
    return names


def a1111_module(name: str, family: BaseKind) -> str:
    """The module of Stability's tree that A1111 patches for a LoRA name; the name itself if no rule applies."""
    resnet = {ours: sgm.replace(".", "_") for ours, sgm in RESNET.items()}

    def block(place: str, kind: str, rest: str) -> str:
        return f"diffusion_model_{place}_{1 if kind == 'attentions' else 0}_" + (
            rest if kind == "attentions" else resnet.get(rest, rest)
        )

    if m := re.fullmatch(r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        return block(f"input_blocks_{1 + int(m[1]) * 3 + int(m[3])}", m[2], m[4])
    if m := re.fullmatch(r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        return block(f"output_blocks_{int(m[1]) * 3 + int(m[3])}", m[2], m[4])
    if m := re.fullmatch(r"lora_unet_mid_block_attentions_0_(.+)", name):
        return f"diffusion_model_middle_block_1_{m[1]}"
    if m := re.fullmatch(r"lora_unet_mid_block_resnets_(\d)_(.+)", name):
        return f"diffusion_model_middle_block_{int(m[1]) * 2}_{resnet.get(m[2], m[2])}"
    if m := re.fullmatch(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", name):
        return f"diffusion_model_input_blocks_{3 + int(m[1]) * 3}_0_op"
    if m := re.fullmatch(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", name):
        return f"diffusion_model_output_blocks_{2 + int(m[1]) * 3}_{2 if int(m[1]) else 1}_conv"
    if m := re.fullmatch(r"lora_unet_time_embedding_linear_(\d)", name):
        return f"diffusion_model_time_embed_{int(m[1]) * 2 - 2}"
    if name in ("lora_unet_conv_in", "lora_unet_conv_out"):
        return "diffusion_model_" + {"in": "input_blocks_0_0", "out": "out_2"}[name.rpartition("_")[2]]
    if m := re.fullmatch(r"lora_te(\d?)_text_model_encoder_layers_(\d+)_(.+)", name):
        if m[1] == "2" or family is BaseKind.SD2:  # held as OpenCLIP, whose q, k and v are one tensor
            leaf = m[3].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj")
            leaf = re.sub(r"^self_attn(_[qkv]_proj)?", "attn", leaf)
            return f"{'1_' if m[1] == '2' else ''}model_transformer_resblocks_{m[2]}_{leaf}"
        return f"{'0_' if family is BaseKind.SDXL else ''}transformer_text_model_encoder_layers_{m[2]}_{m[3]}"
    return name.replace("lora_unet_", "diffusion_model_")  # SDXL files carry Stability's names already


def is_open_clip(component: str, family: BaseKind) -> bool:
    """Return whether Stability's tree has a text encoder of OpenCLIP, whose attention is `nn.MultiheadAttention`."""
    return component == "text_encoder_2" or (component == "text_encoder" and family is BaseKind.SD2)


def a1111_applies(names: Collection[str], family: BaseKind) -> set[str]:
    """The names in a kohya file whose modules A1111 patches.

    It patches the attention of an OpenCLIP encoder only where q, k, v and out are all in the file
    (`network_apply_weights`: `if module_q and module_k and module_v and module_out`), and else passes it over.
    """
    tree = a1111_modules(family)
    found = {name for name in names if a1111_module(name, family) in tree}
    encoders = ("lora_te2_",) if family is BaseKind.SDXL else ("lora_te_",) if family is BaseKind.SD2 else ()
    attention = re.compile(rf"((?:{'|'.join(encoders)}).+_self_attn)_(?:q|k|v|out)_proj")
    layers = {name: match[1] for name in found if encoders and (match := attention.fullmatch(name))}
    whole = {layer for layer in layers.values() if all(f"{layer}_{part}_proj" in found for part in ATTENTION_PARTS)}
    return {name for name in found if name not in layers or layers[name] in whole}


def a1111_modules(family: BaseKind) -> set[str]:
    """Names of the modules in A1111's tree of this base."""
    geometry = GEOMETRIES[family]
    tree = {f"diffusion_model_{sgm.replace('.', '_')}" for _, sgm in unet_pairs(geometry)}
    for component, layers in geometry.clip_layers.items():
        slot = ("0_" if component == "text_encoder" else "1_") if family is BaseKind.SDXL else ""
        open_clip = is_open_clip(component, family)
        for n in range(layers):
            if open_clip:
                leaves = ("attn", "attn_out_proj", "mlp_c_fc", "mlp_c_proj")
                tree |= {f"{slot}model_transformer_resblocks_{n}_{leaf}" for leaf in leaves}
            else:
                layer = f"{slot}transformer_text_model_encoder_layers_{n}_"
                tree |= {layer + leaf.replace(".", "_") for leaf in CLIP_LAYER}
    return tree
