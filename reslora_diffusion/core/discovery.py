"""Finding the sites of an adapted model: what each layer does, in which order layers run, and which tokens they see.

Two things must not be read off `named_modules()`. Order: a UNet registers its blocks down, up, mid and runs them down,
mid, up. Tokens: equal widths do not mean equal resolutions; the resolution follows from the down- and upsamplers.
"""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from .chains import Site

UNET_STAGES = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
# Stacks that go on with the stream of another, in diffusers' transformers of FLUX's kind.
SAME_TOWER = dict.fromkeys(("single_transformer_blocks", "joint_transformer_blocks"), "transformer_blocks")
EXPERTS = re.compile(r"(^|\.)experts\.\d+(\.|$)")


def is_linear_like(module: nn.Module) -> bool:
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def linear_layers(module: nn.Module) -> int:
    """Return the number of linear layers in a module; an adapted layer counts once, with all that adapters add."""
    return 1 if is_linear_like(module) else sum(map(linear_layers, module.children()))


def is_layer(container: nn.Module, element: nn.Module) -> bool:
    """Return whether a numbered child is one of a stack of like layers and no part of a layer (`to_out.0`)."""
    if linear_layers(element) >= 2:
        return True
    kinds = {type(getattr(child, "base_layer", child)) for child in container.children()}
    return len(kinds) == 1 and len(list(container.children())) > 1


def split_name(model: nn.Module, name: str, known: dict[nn.Module, bool]) -> tuple[str, str | None, str]:
    """`(stack, tower, role)` of an adapted layer: ("encoder.block", "encoder.block.layer", "SelfAttention.q") for
    "encoder.block.3.layer.0.SelfAttention.q".

    The role is what follows the innermost number that counts layers, the tower what precedes it without such numbers,
    the stack what precedes the outermost. The stages of a UNet are one tower; a layer outside all stacks has none.

    Args:
        known: answers of `is_layer` so far, by element.
    """
    parts = name.split(".")
    counted = []
    module = model
    for depth, part in enumerate(parts):
        child = module.get_submodule(part)
        if part.isdecimal():
            if child not in known:
                known[child] = is_layer(module, child)
            if known[child]:
                counted.append(depth)
        module = child
    if not counted:
        return "", None, name
    before = [part for depth, part in enumerate(parts[: counted[-1]]) if depth not in counted]
    tower = ".".join(SAME_TOWER.get(part, part) for part in before if part not in UNET_STAGES)
    role = ".".join(parts[counted[-1] + 1 :])
    return ".".join(parts[: counted[0]]), tower, role or ".".join(parts[: counted[-1]])


def tower_names(towers: Iterable[str]) -> dict[str, str]:
    """Short names of towers, without the parts that they share.

    {"encoder.block.layer": "encoder", "decoder.block.layer": "decoder"}, for instance.
    """
    parts = {tower: tower.split(".") for tower in towers}
    for end in (-1, 0):
        while all(parts.values()) and len({names[end] for names in parts.values()}) == 1:
            for names in parts.values():
                names.pop(end)
    return {tower: ".".join(names) for tower, names in parts.items()}


def runs_twice(model: nn.Module, name: str) -> bool:
    """Return whether a layer projects the tokens and their relative positions too, in one forward (DeBERTa)."""
    parent, _, leaf = name.rpartition(".")
    attention = model.get_submodule(parent)
    shares = bool(getattr(attention, "share_att_key", False)) and bool(getattr(attention, "relative_attention", False))
    return shares and leaf in ("query_proj", "key_proj")


def reads_context(model: nn.Module, name: str) -> bool:
    """Return whether a layer projects the prompt, which is the same tensor at every depth (diffusers' `Attention`)."""
    parent, _, leaf = name.rpartition(".")
    return leaf in ("to_k", "to_v") and bool(getattr(model.get_submodule(parent), "is_cross_attention", False))


def unet_level(model: nn.Module, parts: Sequence[str]) -> int | None:
    """Return how often the input of a UNet's block has been halved; None outside the blocks of a UNet."""
    stage = next((part for part in parts if part in UNET_STAGES), None)
    if stage is None:
        return None
    at = parts.index(stage)
    unet = model.get_submodule(".".join(parts[:at]))
    down, up = (list(getattr(unet, name, ())) for name in ("down_blocks", "up_blocks"))
    index = int(parts[at + 1]) if stage != "mid_block" else 0
    halvings = down[:index] if stage == "down_blocks" else down
    doublings = up[:index] if stage == "up_blocks" else []
    return sum(getattr(block, "downsamplers", None) is not None for block in halvings) - sum(
        getattr(block, "upsamplers", None) is not None for block in doublings
    )


def token_class(model: nn.Module, name: str, stack: str) -> str:
    if reads_context(model, name):
        return "prompt"
    level = unet_level(model, name.split("."))
    return stack or "-" if level is None else f"1/{2**level}"


def execution_order(names: Iterable[str]) -> list[str]:
    """Names as registered, with a UNet's stages in the order in which they run."""

    def stage(name: str) -> int:
        return next((UNET_STAGES[part] for part in name.split(".") if part in UNET_STAGES), -1)

    return sorted(names, key=stage)


def find_sites(
    model: nn.Module, shapes: dict[str, tuple[int, int, int]], unlinked: dict[str, str] | None = None
) -> list[Site]:
    """Sites of adapted layers, in execution order.

    Args:
        shapes: `(in_features, out_features, rank)` by name, in the order of registration.
        unlinked: reasons by name of layers that must not be joined.
    """
    unlinked = dict(unlinked or {})
    known: dict[nn.Module, bool] = {}
    places = {name: split_name(model, name, known) for name in execution_order(shapes)}
    inside = {(tower, role) for _, tower, role in places.values() if tower is not None}
    names: dict[str, str] = {}
    if len(inside) > len({role for _, role in inside}):  # a role in several towers: it is another one in each
        names = tower_names(dict.fromkeys(tower for tower, _ in sorted(inside)))
    sites: list[Site] = []
    for name, (stack, tower, role) in places.items():
        role = ".".join(filter(None, [names.get(tower or ""), role]))
        if EXPERTS.search(name):
            unlinked.setdefault(name, "an expert sees other tokens in every layer")
        sites.append(Site(name, role, *shapes[name], token_class(model, name, stack), unlinked.get(name, "")))
    return sites
