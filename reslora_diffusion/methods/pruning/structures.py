"""Heads and channels of a model, and the rows and columns of its layers that each of them owns.

    attention      head h: rows of q, k and v, columns of the output projection. Where several heads share a key and a
                   value (grouped-query attention), they are one group: k and v could not lose their rows otherwise
    feed-forward   channel c: a row of the first projection, or one of each half if it is gated, a column of the last

The width of the residual stream, which all blocks share, is left as it is. Layers are found by the names that
transformers and diffusers give them:

    Llama, Qwen, Mistral, Gemma   q_proj k_proj v_proj o_proj        gate_proj up_proj down_proj
    T5                            q k v o                            wi or wi_0 wi_1, wo
    UNet, SD3, FLUX               to_q to_k to_v to_out.0, add_*     net.0.proj net.2;  FLUX's proj_mlp proj_out

A T5 stack adds one position bias, a value for each head, in all its layers: their self-attentions lose the same heads.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core.discovery import execution_order
from ..blocks import block_of

ROWS, COLUMNS = 0, 1


class Kind(StrEnum):
    """The part of a structure that is cut out."""

    HEADS = "heads"
    CHANNELS = "channels"


class Slice(NamedTuple):
    """One axis of the weight of a layer; `group` [size of the axis] says which group owns each place, -1 if none."""

    layer: str
    axis: int
    group: Tensor


@dataclass(frozen=True)
class Structure:
    """Groups of one attention or feed-forward layer, of which some are cut out.

    Attributes:
        count: how many groups there are.
        widths: names in the model's configuration that state a width, and how much of it one group has. Empty where the
            configuration cannot state it.
        attributes: numbers that modules hold besides, likewise, by module and name.
        fixed: what the configuration must state once a width is another, as it is derived from that otherwise.
    """

    name: str
    kind: Kind
    count: int
    slices: tuple[Slice, ...]
    widths: Mapping[str, int] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)

    @property
    def blocks(self) -> frozenset[str]:
        return frozenset(block_of(slice.layer) for slice in self.slices)

    @property
    def layers(self) -> frozenset[str]:
        return frozenset(slice.layer for slice in self.slices)


def base_of(module: nn.Module) -> Any:
    """The frozen layer inside one of PEFT's."""
    return getattr(module, "base_layer", module)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    out_features, in_features = base_of(module).weight.shape
    return out_features, in_features


def linear_children(module: nn.Module, *names: str) -> list[nn.Module] | None:
    """Linear layers by their names inside a module; None unless all of them are there."""
    found = []
    for name in names:
        child: Any = module
        for part in name.split("."):
            child = child._modules.get(part) if isinstance(child, nn.Module) else None
        weight = getattr(base_of(child), "weight", None) if child is not None else None
        if not torch.is_tensor(weight) or weight.ndim != 2:
            return None
        found.append(child)
    return found


def evenly(size: int, groups: int) -> Tensor:
    """Equal stretches, one after another."""
    return torch.arange(size) // (size // groups)


def whole_base(model: nn.Module) -> nn.Module:
    """The model that names of layers are relative to, without the wrapper of PEFT."""
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model


# ------------------------------------------------------------------------------------------------------- attention


def grouped_query_attention(name: str, module: Any) -> Structure | None:
    """The structures of Llama and its like."""
    found = linear_children(module, "q_proj", "k_proj", "v_proj", "o_proj")
    size = getattr(module, "head_dim", None)
    if found is None or not isinstance(size, int):
        return None
    (q, _), (k, _), (v, _), (_, o) = map(shape_of, found)
    if q != o or k != v or k % size or q % k or weighs_heads(module, size):
        return None
    count = k // size
    return Structure(
        name,
        Kind.HEADS,
        count,
        (
            Slice(f"{name}.q_proj", ROWS, evenly(q, count)),
            Slice(f"{name}.k_proj", ROWS, evenly(k, count)),
            Slice(f"{name}.v_proj", ROWS, evenly(v, count)),
            Slice(f"{name}.o_proj", COLUMNS, evenly(o, count)),
        ),
        widths={"num_attention_heads": q // k, "num_key_value_heads": 1},
        attributes={name: {"num_heads": q // k, "num_key_value_heads": 1}},
        fixed={"head_dim": size},
    )


def weighs_heads(module: nn.Module, size: int) -> bool:
    """Return whether something besides the projections has a weight for every head, as OLMo 2's norms and GPT-OSS's
    sinks do: it would have to be cut as well, and a norm across heads depends on those that go."""
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    others = (p for name, p in module.named_parameters() if name.partition(".")[0] not in projections)
    return any(parameter.numel() != size for parameter in others)


def t5_attention(name: str, module: Any) -> Structure | None:
    found = linear_children(module, "q", "k", "v", "o")
    size = getattr(module, "key_value_proj_dim", None)
    if found is None or not isinstance(size, int):
        return None
    inner = shape_of(found[0])[0]
    if inner % size or [shape_of(part)[0] for part in found[:3]] != [inner] * 3:
        return None
    count = inner // size
    slices = [Slice(f"{name}.{part}", ROWS, evenly(inner, count)) for part in "qkv"]
    slices.append(Slice(f"{name}.o", COLUMNS, evenly(inner, count)))
    if "relative_attention_bias" in module._modules:
        slices.append(Slice(f"{name}.relative_attention_bias", COLUMNS, torch.arange(count)))
    attributes = {name: {"n_heads": 1, "inner_dim": size}}
    return Structure(name, Kind.HEADS, count, tuple(slices), {"num_heads": 1}, attributes)


OWN, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def diffusers_attention(name: str, module: Any) -> Structure | None:
    """Attention of one stream or, as in SD3 and FLUX, of image and text. No configuration states its inner width."""
    heads, own = getattr(module, "heads", None), linear_children(module, *OWN)
    if own is None or not isinstance(heads, int):
        return None
    inner = shape_of(own[0])[0]
    if inner % heads or [shape_of(part)[0] for part in own] != [inner] * 3 or normalises_across_heads(module, inner):
        return None
    rows = [*OWN, *(part for part in ADDED if linear_children(module, part))]
    columns = [part for part in ("to_out.0", "to_add_out") if linear_children(module, part)]
    slices = [Slice(f"{name}.{part}", ROWS, evenly(inner, heads)) for part in rows]
    slices += [Slice(f"{name}.{part}", COLUMNS, evenly(inner, heads)) for part in columns]
    size = inner // heads
    attributes = {name: {"heads": 1, "inner_dim": size, "inner_kv_dim": size, "sliceable_head_dim": 1}}
    return Structure(name, Kind.HEADS, heads, tuple(slices), attributes=attributes)


def normalises_across_heads(module: Any, inner: int) -> bool:
    weights = (getattr(module._modules.get(norm), "weight", None) for norm in ("norm_q", "norm_k"))
    return any(weight is not None and weight.numel() == inner != inner // module.heads for weight in weights)


# ---------------------------------------------------------------------------------------------------- feed-forward


def gated_feed_forward(name: str, module: Any) -> Structure | None:
    """The structures of Llama and its like."""
    found = linear_children(module, "gate_proj", "up_proj", "down_proj")
    return (
        None if found is None else feed_forward(name, ("gate_proj", "up_proj"), "down_proj", found, "intermediate_size")
    )


def t5_feed_forward(name: str, module: Any) -> Structure | None:
    for first in (("wi",), ("wi_0", "wi_1")):
        if (found := linear_children(module, *first, "wo")) is not None:
            return feed_forward(name, first, "wo", found, "d_ff")
    return None


def diffusers_feed_forward(name: str, module: Any) -> Structure | None:
    """`FeedForward`; what is gated holds both halves in one layer, GEGLU's and SwiGLU's."""
    found = linear_children(module, "net.0.proj", "net.2")
    return None if found is None else feed_forward(name, ("net.0.proj",), "net.2", found)


def feed_forward(
    name: str, first: tuple[str, ...], last: str, layers: list[nn.Module], width: str | None = None
) -> Structure | None:
    inner = shape_of(layers[-1])[1]
    rows = [shape_of(layer)[0] for layer in layers[:-1]]
    if any(size not in (inner, 2 * inner) for size in rows):
        return None
    slices = [Slice(f"{name}.{part}", ROWS, torch.arange(size) % inner) for part, size in zip(first, rows, strict=True)]
    slices.append(Slice(f"{name}.{last}", COLUMNS, torch.arange(inner)))
    attributes = {name: {"intermediate_size": 1}}
    return Structure(name, Kind.CHANNELS, inner, tuple(slices), {width: 1} if width else {}, attributes)


def flux_single_block(name: str, module: Any) -> list[Structure]:
    """One projection takes in the heads of the attention, then the channels of the feed-forward part."""
    found = linear_children(module, "attn.to_q", "proj_mlp", "proj_out")
    if found is None or (attention := diffusers_attention(f"{name}.attn", module.attn)) is None:
        return []
    inner, hidden, columns = shape_of(found[0])[0], shape_of(found[1])[0], shape_of(found[2])[1]
    if columns != inner + hidden:
        return []
    heads = torch.cat([evenly(inner, attention.count), torch.full((hidden,), -1)])
    channels = torch.cat([torch.full((inner,), -1), torch.arange(hidden)])
    own = (Slice(f"{name}.proj_mlp", ROWS, torch.arange(hidden)), Slice(f"{name}.proj_out", COLUMNS, channels))
    return [
        Structure(
            attention.name,
            Kind.HEADS,
            attention.count,
            (*attention.slices, Slice(f"{name}.proj_out", COLUMNS, heads)),
            attributes=attention.attributes,
        ),
        Structure(name, Kind.CHANNELS, hidden, own, attributes={name: {"mlp_hidden_dim": 1}}),
    ]


# ------------------------------------------------------------------------------------------------------ everything

KINDS: tuple[Callable[[str, nn.Module], Structure | None], ...] = (
    grouped_query_attention,
    t5_attention,
    diffusers_attention,
    gated_feed_forward,
    t5_feed_forward,
    diffusers_feed_forward,
)


def find_structures(model: nn.Module) -> list[Structure]:
    """All structures of a model whose heads or channels can be cut out, in the order in which they run.

    The model may have adapters, and may be on the meta device.
    """
    found: dict[str, Structure] = {}
    for name, module in whole_base(model).named_modules():
        if name in found:
            continue
        several = flux_single_block(name, module)
        found |= {one.name: one for one in several or filter(None, (kind(name, module) for kind in KINDS))}
    structures = [*share_position_bias(found.values())]
    registered = [block_of(name) for name, _ in whole_base(model).named_modules()]
    place = {block: n for n, block in enumerate(execution_order(dict.fromkeys(registered)))}
    return sorted(structures, key=lambda s: place[block_of(s.slices[0].layer)])


def share_position_bias(structures: Iterable[Structure]) -> Iterator[Structure]:
    """One structure of all self-attentions of a T5 stack, where the first alone has the bias."""
    stacks: dict[str, list[Structure]] = {}
    for structure in structures:
        if structure.name.endswith(".SelfAttention") and "num_heads" in structure.widths:
            stacks.setdefault(structure.name.partition(".block.")[0], []).append(structure)
        else:
            yield structure
    for stack, members in stacks.items():
        biased = [any("relative_attention_bias" in s.layer for s in member.slices) for member in members]
        if all(biased):  # UMT5: every layer has its own
            yield from members
            continue
        yield Structure(
            f"{stack}.block.*.layer.0.SelfAttention",
            Kind.HEADS,
            members[0].count,
            tuple(slice for member in members for slice in member.slices),
            members[0].widths,
            {name: numbers for member in members for name, numbers in member.attributes.items()},
        )


def chosen(structures: list[Structure], parts: str, spare: int | None) -> list[Structure]:
    """Return the structures to prune: parts "heads", "channels" or "all", without the first and last `spare` blocks.

    Args:
        spare: None spares the outer blocks where no configuration could state the widths anyway.
    """
    count = (0 if all(s.widths for s in structures) else 1) if spare is None else spare
    blocks = list(dict.fromkeys(block_of(s.slices[0].layer) for s in structures))
    spared = set(blocks[:count]) | set(blocks[len(blocks) - count :]) if count else set()
    return [s for s in structures if parts in ("all", s.kind) and not s.blocks & spared]
