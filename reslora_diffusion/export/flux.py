"""FLUX.1 in the names of Black Forest Labs, which kohya, ComfyUI and Forge use: q, k and v are one layer there.

    double_blocks.0.img_attn.qkv    to_q, to_k, to_v               A = [A_q; A_k; A_v]    B = diag(B_q, B_k, B_v)
    single_blocks.0.linear1         to_q, to_k, to_v, proj_mlp     likewise, of four

`join` is exact: what a file does not adapt has zeros. `split` is exact for any factors: a part gets the rank-one terms
whose columns of B reach its rows, so that of a joined module the parts come back, and of one that was trained as a
whole each part has all of A.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # names are looked at without waiting for torch
    from reslora_diffusion.core.functional import LoraFactors, Magnitude

LAYERS = {  # theirs, with dots -> the layers of diffusers that it is made of
    "double_blocks": {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "img_attn.proj": ("attn.to_out.0",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "img_mod.lin": ("norm1.linear",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn.proj": ("attn.to_add_out",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
        "txt_mod.lin": ("norm1_context.linear",),
    },
    "single_blocks": {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",),
    },
}
STACKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
WIDTHS = {"proj_mlp": 4}  # of what is joined, in widths of the model
NAME = re.compile(r"lora_unet_(double_blocks|single_blocks)_(\d+)_(\w+)")


def layer_of(path: str) -> str | None:
    """The layer that a layer of diffusers is, or is part of, in theirs; None if it is in none of the blocks."""
    stack, _, rest = path.partition(".")
    number, _, leaf = rest.partition(".")
    for theirs, ours in STACKS.items():
        for layer, parts in LAYERS[theirs].items():
            if stack == ours and leaf in parts:
                return f"{theirs}.{number}.{layer}"
    return None


def from_kohya_name(name: str) -> str | None:
    """Their layer, with dots, of a name in a kohya file; None if it is none of FLUX.1's blocks."""
    if match := NAME.fullmatch(name):
        for layer in LAYERS[match[1]]:
            if layer.replace(".", "_") == match[3]:
                return f"{match[1]}.{match[2]}.{layer}"
    return None


def parts_of(path: str, rows: int) -> dict[str, int]:
    """The layers of diffusers that a layer is made of, and how many of its `rows` outputs each has, in order; a layer
    that has no other name in theirs is itself."""
    stack, _, rest = path.partition(".")
    number, _, layer = rest.partition(".")
    if layer not in LAYERS.get(stack, {}):
        return {path: rows}
    parts = LAYERS[stack][layer]
    shares = [WIDTHS.get(part, 1) for part in parts]
    return {
        f"{STACKS[stack]}.{number}.{part}": rows * share // sum(shares)
        for part, share in zip(parts, shares, strict=True)
    }


def join(modules: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Factors by their layers. Those that are given have one rank and scaling 1, and are in the blocks."""
    joined: dict[str, LoraFactors] = {}
    for path, factors in modules.items():
        theirs = layer_of(path)
        assert theirs
        if theirs in joined:
            continue
        rank, wide = factors.lora_A.shape
        width = len(factors.lora_B) // WIDTHS.get(path.rpartition(".")[2], 1)
        layer = theirs.split(".", 2)[2]
        shares = [WIDTHS.get(part, 1) for part in LAYERS[theirs.partition(".")[0]][layer]]
        if len(shares) == 1:
            joined[theirs] = factors
            continue
        A = factors.lora_A.new_zeros(len(shares) * rank, wide)
        B = factors.lora_B.new_zeros(sum(shares) * width, len(shares) * rank)
        row = 0
        for place, (part, rows) in enumerate(parts_of(theirs, len(B)).items()):
            if part in modules:
                terms = slice(place * rank, (place + 1) * rank)
                A[terms], B[row : row + rows, terms] = modules[part].lora_A, modules[part].lora_B
            row += rows
        joined[theirs] = factors._replace(lora_A=A, lora_B=B)
    return joined


def split(modules: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Inverse of `join`; of a joined layer the parts that do something, or all of them if none does."""
    from reslora_diffusion.core.functional import LoraFactors, with_magnitude

    found: dict[str, LoraFactors] = {}
    for path, factors in modules.items():
        parts = parts_of(path, len(factors.lora_B))
        if len(parts) == 1:
            found[next(iter(parts))] = factors
            continue
        rows = [*parts.values()]
        lengths = magnitudes(path, factors, rows)
        for (part, _), B, magnitude in zip(parts.items(), factors.lora_B.split(rows), lengths, strict=True):
            terms = B.ne(0).any(0)
            if terms.any():
                own = LoraFactors(factors.lora_A[terms], B[:, terms], factors.scaling)
                found[part] = with_magnitude(own, magnitude)
            elif magnitude is not None or not factors.lora_B.any():
                found[part] = with_magnitude(LoraFactors(factors.lora_A, B, factors.scaling), magnitude)
    return found


def magnitudes(path: str, factors: LoraFactors, rows: list[int]) -> Sequence[Magnitude | None]:
    """The magnitude of a joined layer's DoRA, taken apart as its rows are.

    Raises:
        ValueError: it is of columns, which go through all parts.
    """
    if factors.magnitude is None:
        return [None] * len(rows)
    from reslora_diffusion.core.functional import Magnitude

    values, of_base = factors.magnitude
    if values.shape[1] != 1:
        raise ValueError(f"{path}: its dora_scale is the length of columns of several layers of diffusers together")
    return [Magnitude(part, of_base) for part in values.split(rows)]
