"""Tiny pipelines in one file under the original names of Stable Diffusion 1.x and XL: what `from_single_file` reads."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
AROUND = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def renamed(name: str, names: dict[str, str]) -> str:
    return next((new + name[len(old) :] for old, new in names.items() if name.startswith(f"{old}.")), name)


def unet_name(name: str, layers: int) -> str:
    part, *rest = name.split(".")
    if part == "mid_block":
        place = {"resnets": 2 * int(rest[1]), "attentions": 1}[rest[0]]
        return f"middle_block.{place}." + renamed(".".join(rest[2:]), RESNET)
    if part not in ("down_blocks", "up_blocks"):
        return renamed(name, AROUND)
    block, kind, number = int(rest[0]), rest[1], int(rest[2])
    inner = renamed(".".join(rest[3:]), RESNET)
    first = block * (layers + 1) + (part == "down_blocks")
    where = "input_blocks" if part == "down_blocks" else "output_blocks"
    if kind == "downsamplers":
        return f"{where}.{first + layers}.0.{inner.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"{where}.{first + layers}.2.{inner}"
    return f"{where}.{first + number}.{int(kind == 'attentions')}.{inner}"


def vae_name(name: str, blocks: int) -> str:
    parts = name.split(".")
    for old, new in (("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"), ("group_norm", "norm")):
        name = name.replace(old, new)
    for old, new in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f".{old}.", f".{new}.")
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for n in (0, 1):
        name = name.replace(f"mid_block.resnets.{n}", f"mid.block_{n + 1}")
    if parts[1] in ("down_blocks", "up_blocks"):
        way = "down" if parts[1] == "down_blocks" else "up"
        place = int(parts[2]) if way == "down" else blocks - 1 - int(parts[2])
        rest = ".".join(name.split(".")[3:]).replace("resnets", "block").replace(f"{way}samplers.0", f"{way}sample")
        return f"{parts[0]}.{way}.{place}.{rest}"
    return name


def clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()}


def open_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    found = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
    }
    for name, value in state.items():
        if not name.startswith("encoder.layers."):
            continue
        number, inner = name.removeprefix("encoder.layers.").split(".", 1)
        block = f"transformer.resblocks.{number}."
        if inner.startswith("self_attn.q_proj"):
            end = inner.rpartition(".")[2]
            three = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"{block}attn.in_proj_{end}"] = torch.cat(three)
        elif not inner.startswith(("self_attn.k_proj", "self_attn.v_proj")):
            found[block + renamed(inner, OPEN_CLIP)] = value
    return {prefix + name: value for name, value in found.items()}


def write_single_file(pipeline, path: Path, **more: Tensor) -> Path:
    """The pipeline's weights in one file; `more` stands beside them, as the key `v_pred` does."""
    unet, vae = pipeline.unet, pipeline.vae
    layers, blocks = unet.config.layers_per_block, len(vae.config.block_out_channels)
    state = {f"model.diffusion_model.{unet_name(name, layers)}": value for name, value in unet.state_dict().items()}
    for name, value in vae.state_dict().items():
        is_attention = ".attentions." in name and value.ndim == 2
        state[f"first_stage_model.{vae_name(name, blocks)}"] = value[..., None, None] if is_attention else value
    if hasattr(pipeline, "text_encoder_2"):
        state |= clip(pipeline.text_encoder.state_dict(), "conditioner.embedders.0.transformer.")
        state |= open_clip(pipeline.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    else:
        state |= clip(pipeline.text_encoder.state_dict(), "cond_stage_model.transformer.")
    save_file({name: value.contiguous().clone() for name, value in (state | more).items()}, path)
    return path
