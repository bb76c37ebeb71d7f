"""Tiny transformers in one file under the names that they were released with: what `from_single_file` converts.

Each table has patterns of diffusers' names and what stands there instead, tried in order; `#n` marks the n-th part of a
tensor that is whole in the file, `~` one whose halves (scale and shift) are the other way round there.
"""

import re
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Names = tuple[tuple[str, str], ...]


def qkv(ours: str, theirs: str) -> Names:
    """Three projections that are one layer in the file; `ours` has a place for their letter."""
    return tuple((re.escape(ours.format(letter)), f"{theirs}#{n}") for n, letter in enumerate("qkv"))


def embedder(ours: str, theirs: str, layers: tuple[str, str] = ("in_layer", "out_layer")) -> Names:
    """The two layers of a network that embeds a time, a guidance or a pooled text."""
    return tuple((rf"{re.escape(ours)}\.linear_{n}", f"{theirs}.{layer}") for n, layer in enumerate(layers, 1))


BLOCKS_OF_FLUX = (
    (r"^single_transformer_blocks", "single_blocks"),
    (r"^transformer_blocks", "double_blocks"),
    (r"(single_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"(single_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
    (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
    (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
    (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
    *qkv("attn.add_{}_proj", "txt_attn.qkv"),
    (r"attn\.to_add_out", "txt_attn.proj"),
    (r"attn\.to_out\.0", "img_attn.proj"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1~"),
    (r"^proj_out", "final_layer.linear"),
    (r"^x_embedder", "img_in"),
    (r"^context_embedder", "txt_in"),
)
FLUX_2 = (
    *BLOCKS_OF_FLUX,
    (r"attn\.to_qkv_mlp_proj", "linear1"),
    *qkv("attn.to_{}", "img_attn.qkv"),
    (r"attn\.to_out", "linear2"),
    (r"ff\.linear_in", "img_mlp.0"),
    (r"ff\.linear_out", "img_mlp.2"),
    (r"ff_context\.linear_in", "txt_mlp.0"),
    (r"ff_context\.linear_out", "txt_mlp.2"),
    (r"modulation_(img|txt)\.linear", r"modulation_\1.lin"),
    (r"modulation\.linear", "modulation.lin"),
    *embedder("time_guidance_embed.timestep_embedder", "time_in"),
    *embedder("time_guidance_embed.guidance_embedder", "guidance_in"),
)
OF_FLUX_1 = (
    *BLOCKS_OF_FLUX,
    (r"(single_blocks\.\d+)\.attn\.to_q", r"\1.linear1#0"),
    (r"(single_blocks\.\d+)\.attn\.to_k", r"\1.linear1#1"),
    (r"(single_blocks\.\d+)\.attn\.to_v", r"\1.linear1#2"),
    (r"proj_mlp", "linear1#3"),
    (r"(single_blocks\.\d+)\.proj_out", r"\1.linear2"),
    *qkv("attn.to_{}", "img_attn.qkv"),
    (r"ff\.net\.0\.proj", "img_mlp.0"),
    (r"ff\.net\.2", "img_mlp.2"),
    (r"ff_context\.net\.0\.proj", "txt_mlp.0"),
    (r"ff_context\.net\.2", "txt_mlp.2"),
)
FLUX_1 = (
    *OF_FLUX_1,
    (r"norm1\.linear", "img_mod.lin"),
    (r"norm1_context\.linear", "txt_mod.lin"),
    (r"norm\.linear", "modulation.lin"),
    *embedder("time_text_embed.timestep_embedder", "time_in"),
    *embedder("time_text_embed.guidance_embedder", "guidance_in"),
    *embedder("time_text_embed.text_embedder", "vector_in"),
)
CHROMA = (
    *OF_FLUX_1,
    (r"(guidance_layer\.layers\.\d+)\.linear_1", r"\1.in_layer"),
    (r"(guidance_layer\.layers\.\d+)\.linear_2", r"\1.out_layer"),
    (r"(guidance_layer\.norms\.\d+)\.weight", r"\1.scale"),
)
SD_3 = (
    (r"^transformer_blocks", "joint_blocks"),
    *qkv("attn.to_{}", "x_block.attn.qkv"),
    *qkv("attn2.to_{}", "x_block.attn2.qkv"),
    *qkv("attn.add_{}_proj", "context_block.attn.qkv"),
    (r"(attn2?)\.norm_([qk])", r"x_block.\1.ln_\2"),
    (r"attn\.norm_added_([qk])", r"context_block.attn.ln_\1"),
    (r"(attn2?)\.to_out\.0", r"x_block.\1.proj"),
    (r"attn\.to_add_out", "context_block.attn.proj"),
    (r"norm1\.linear", "x_block.adaLN_modulation.1"),
    (r"blocks\.3\.norm1_context\.linear", "blocks.3.context_block.adaLN_modulation.1~"),  # the last of four
    (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
    (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
    (r"ff\.net\.2", "x_block.mlp.fc2"),
    (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
    (r"ff_context\.net\.2", "context_block.mlp.fc2"),
    (r"pos_embed\.pos_embed", "pos_embed"),
    (r"pos_embed\.proj", "x_embedder.proj"),
    *embedder("time_text_embed.timestep_embedder", "t_embedder", ("mlp.0", "mlp.2")),
    *embedder("time_text_embed.text_embedder", "y_embedder", ("mlp.0", "mlp.2")),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1~"),
    (r"^proj_out", "final_layer.linear"),
)
Z_IMAGE = (
    *qkv("attention.to_{}", "attention.qkv"),
    (r"attention\.to_out\.0", "attention.out"),
    (r"attention\.norm_([qk])", r"attention.\1_norm"),
    (r"all_final_layer\.2-1", "final_layer"),
    (r"all_x_embedder\.2-1", "x_embedder"),
)
QWEN_IMAGE: Names = ()  # released in diffusers' names


def original(state: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """A transformer's tensors under the names of a table."""
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, value in state.items():
        for ours, theirs in names:
            name = re.sub(ours, theirs, name)
        if "~" in name:
            scale, shift = value.chunk(2)
            name, value = name.replace("~", ""), torch.cat([shift, scale])
        found = re.search(r"#(\d)", name)
        parts[re.sub(r"#\d", "", name)][int(found[1]) if found else 0] = value
    return {name: torch.cat([own[n] for n in sorted(own)]) if len(own) > 1 else own[0] for name, own in parts.items()}


def write_transformer(transformer: torch.nn.Module, names: Names, path: Path, prefix: str = "") -> Path:
    state = original(transformer.state_dict(), names)
    save_file({prefix + name: value.contiguous().clone() for name, value in state.items()}, path)
    return path
