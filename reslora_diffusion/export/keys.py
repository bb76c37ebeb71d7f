"""Names of an adapted module in each dialect of LoRA files: pure functions of strings.

A module is known here by its component (`unet`, `text_encoder`, `text_encoder_2`) and its dotted path inside it. CLIP
paths are always in the classic layout, `text_model.encoder.layers...`: transformers 5 dropped `text_model.` from
CLIPTextModel (not from CLIPTextModelWithProjection), but files outlive versions.

    diffusers      unet.down_blocks.1.attentions.0....to_q.lora_A.weight   [r, in]    .lora_B.weight   [out, r]
    kohya          lora_unet_down_blocks_1_attentions_0_..._to_q.lora_down.weight     .lora_up.weight  .alpha
    kohya, SDXL    lora_unet_input_blocks_4_1_..._to_q.lora_down.weight    (names of Stability's own UNet, "SGM")
    kohya, FLUX.1  lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight (other layers too: `flux`)
    PEFT           base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

Every map stands beside its inverse. `to_sgm` numbers the blocks as Stability's UNet does: with L resnets to a block,
resnet j of down block i is `input_blocks[1 + i(L+1) + j]`, and of up block i `output_blocks[i(L+1) + j]`.
"""

import re
from collections.abc import Collection
from enum import StrEnum

from .flux import from_kohya_name

LAYERS_PER_BLOCK = 2  # of every released Stable Diffusion UNet
CLIP_COMPONENTS = ("text_encoder", "text_encoder_2")
KOHYA_COMPONENTS = ("unet", *CLIP_COMPONENTS)
COMPONENTS = (*KOHYA_COMPONENTS, "transformer")
DENOISERS = ("unet", "transformer")


class Dialect(StrEnum):
    """The three ways to write a LoRA down."""

    DIFFUSERS = "diffusers"
    KOHYA = "kohya"
    PEFT = "peft"


class Naming(StrEnum):
    """The ways to name modules in a kohya file: for SD 1.x and 2.x; for SDXL, by Stability's block numbers; for other
    geometries with two text encoders, whose blocks Stability's numbers do not fit, by diffusers' names; for FLUX.1."""

    SD = "sd"
    SDXL = "sdxl"
    TWO_ENCODERS = "two encoders"
    FLUX = "flux"


# ---------------------------------------------------------------------------------------------- CLIP layouts


def classic_path(component: str, path: str) -> str:
    """`encoder.layers.0.mlp.fc1` -> `text_model.encoder.layers.0.mlp.fc1`; other paths as they are."""
    return f"text_model.{path}" if component in CLIP_COMPONENTS and path.startswith("encoder.") else path


def flat_path(path: str) -> str:
    """Inverse of `classic_path`: the name of the module under transformers 5."""
    return path.removeprefix("text_model.")


def projects(component: str, components: Collection[str]) -> bool:
    """Return whether a text encoder of a LoRA for `components` ends in a projection, as the second of SDXL and both of
    SD3 do, and FLUX.1's does not. Those kept the classic layout in transformers 5."""
    both = {"transformer", "text_encoder_2"} <= set(components)
    return component == "text_encoder_2" or (component == "text_encoder" and both)


# ------------------------------------------------------------------------------------------------- diffusers


def diffusers_keys(component: str, path: str) -> tuple[str, str]:
    """Keys of lora_A and lora_B, understood by every diffusers since PEFT became its back end."""
    return f"{component}.{path}.lora_A.weight", f"{component}.{path}.lora_B.weight"


# ----------------------------------------------------------------------------------------------------- kohya

TWO = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
KOHYA_PREFIXES = {
    Naming.SD: {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    Naming.SDXL: TWO,
    Naming.TWO_ENCODERS: TWO,
    Naming.FLUX: {"transformer": "lora_unet_", "text_encoder": "lora_te1_"},
}
# Path segments that contain an underscore themselves: what must not be split when a kohya name is read back.
SEGMENTS = """
    down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out time_emb_proj
    conv_shortcut conv_in conv_out time_embedding add_embedding class_embedding linear_1 linear_2 time_embed
    label_emb input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection
    text_model self_attn q_proj k_proj v_proj out_proj text_projection
""".split()
PLAIN_SEGMENTS = "attentions resnets downsamplers upsamplers attn1 attn2 ff net proj conv conv1 conv2 op out \
    encoder layers mlp fc1 fc2".split()
SEGMENT = re.compile("|".join(sorted(SEGMENTS + PLAIN_SEGMENTS, key=len, reverse=True)) + r"|\d+")


def to_kohya(component: str, path: str, naming: Naming) -> str:
    """Name of a module in a kohya file, without `.lora_down.weight`; of a FLUX.1 transformer `path` is theirs (`flux`).

    Raises:
        ValueError: kohya's trainer has no name for such a module.
    """
    if component not in KOHYA_PREFIXES[naming]:
        raise ValueError(f"a kohya file for {naming} has no {component}; it has {', '.join(KOHYA_PREFIXES[naming])}")
    if component == "unet" and naming is Naming.SDXL:
        path = to_sgm(path)
    return KOHYA_PREFIXES[naming][component] + path.replace(".", "_")


def from_kohya(name: str) -> tuple[str, str]:
    """Inverse of `to_kohya` for every naming: `(component, path)`.

    Raises:
        ValueError: the name is not one of a Stable Diffusion UNet, FLUX.1's blocks or a CLIP text encoder.
    """
    if path := from_kohya_name(name):
        return "transformer", path
    prefixes = {prefix: c for by in KOHYA_PREFIXES.values() for c, prefix in by.items() if c != "transformer"}
    prefix = next((p for p in prefixes if name.startswith(p)), None)
    if prefix is None:
        raise ValueError(f"{name} starts with none of {', '.join(prefixes)}")
    component, rest = prefixes[prefix], name.removeprefix(prefix)
    segments = []
    while rest:
        match = SEGMENT.match(rest)
        if match is None or rest[match.end() : match.end() + 1] not in ("", "_"):
            raise ValueError(f"{name} is not a module of a Stable Diffusion UNet or a CLIP text encoder")
        segments.append(match.group())
        rest = rest[match.end() + 1 :]
    path = ".".join(segments)
    if path.startswith(("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")):
        path = from_sgm(path)
    return component, classic_path(component, path)


# ------------------------------------------------------------------------------------------ SGM block numbers

SGM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
SGM_FIXED = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
DIFFUSERS_RESNET = {sgm: ours for ours, sgm in SGM_RESNET.items()}
DIFFUSERS_FIXED = {sgm: ours for ours, sgm in SGM_FIXED.items()}


def to_sgm(path: str) -> str:
    """Path of a UNet module in Stability's naming.

    Raises:
        ValueError: the UNet has no such module, or more than two resnets to a block.
    """
    if path in SGM_FIXED:
        return SGM_FIXED[path]
    stride = LAYERS_PER_BLOCK + 1
    match path.split("."):
        case ["down_blocks", i, ("resnets" | "attentions") as kind, j, *rest] if int(j) < LAYERS_PER_BLOCK:
            block = f"input_blocks.{1 + int(i) * stride + int(j)}"
        case ["up_blocks", i, ("resnets" | "attentions") as kind, j, *rest] if int(j) <= LAYERS_PER_BLOCK:
            block = f"output_blocks.{int(i) * stride + int(j)}"
        case ["mid_block", "attentions", "0", *rest]:
            return ".".join(["middle_block.1", *rest])
        case ["mid_block", "resnets", j, *rest]:
            return f"middle_block.{2 * int(j)}.{SGM_RESNET['.'.join(rest)]}"
        case ["down_blocks", i, "downsamplers", "0", "conv"]:
            return f"input_blocks.{(int(i) + 1) * stride}.0.op"
        case ["up_blocks", i, "upsamplers", "0", "conv"]:
            return f"output_blocks.{int(i) * stride + LAYERS_PER_BLOCK}.2.conv"
        case _:
            raise ValueError(f"{path} has no name in Stability's UNet of {LAYERS_PER_BLOCK} resnets to a block")
    inner = ".".join(rest)
    return f"{block}.1.{inner}" if kind == "attentions" else f"{block}.0.{SGM_RESNET[inner]}"


def from_sgm(path: str) -> str:
    """Inverse of `to_sgm`.

    Raises:
        ValueError: not a path of that UNet.
    """
    if path in DIFFUSERS_FIXED:
        return DIFFUSERS_FIXED[path]
    stride = LAYERS_PER_BLOCK + 1
    match path.split("."):
        case ["input_blocks", n, "0", "op"]:
            return f"down_blocks.{int(n) // stride - 1}.downsamplers.0.conv"
        case ["output_blocks", n, _, "conv"]:
            return f"up_blocks.{int(n) // stride}.upsamplers.0.conv"
        case ["input_blocks", n, inner, *rest]:
            i, j = divmod(int(n) - 1, stride)
            block = f"down_blocks.{i}"
        case ["output_blocks", n, inner, *rest]:
            i, j = divmod(int(n), stride)
            block = f"up_blocks.{i}"
        case ["middle_block", "1", *rest]:
            block, inner, j = "mid_block", "1", 0
        case ["middle_block", ("0" | "2") as n, *rest]:
            block, inner, j = "mid_block", "0", int(n) // 2
        case _:
            raise ValueError(f"{path} is not a module of Stability's UNet")
    tail = ".".join(rest)
    if inner == "1":
        return f"{block}.attentions.{j}.{tail}"
    if inner == "0" and tail in DIFFUSERS_RESNET:
        return f"{block}.resnets.{j}.{DIFFUSERS_RESNET[tail]}"
    raise ValueError(f"{path} is not a module of Stability's UNet")


# ------------------------------------------------------------------------------------------------------ PEFT

PEFT_PREFIX = "base_model.model."


def magnitude_keys(key_A: str, by_transformers: bool) -> list[str]:
    """Keys of a DoRA's magnitude in the dialects of diffusers and PEFT, by that of its lora_A.

    Where transformers 5 may load them, there are two: its `load_adapter` looks for the whole name of the parameter, and
    leaves a magnitude under PEFT's name out, without a word. PEFT takes either.
    """
    key = f"{key_A.removesuffix('.lora_A.weight')}.lora_magnitude_vector"
    return [key, f"{key}.weight"] if by_transformers else [key]


def peft_keys(path: str) -> tuple[str, str]:
    """Keys of lora_A and lora_B in PEFT's `adapter_model.safetensors`."""
    return f"{PEFT_PREFIX}{path}.lora_A.weight", f"{PEFT_PREFIX}{path}.lora_B.weight"
