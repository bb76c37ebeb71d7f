"""Which adapted layers are joined to which: a pure function of names, shapes and token classes.

    site     one adapted linear layer
    tower    the stack of like layers that it is in: encoder and decoder, text and vision, refiner and trunk differ
    role     what it does inside its layer, "attn1.to_q", "self_attn.q_proj": self- and cross-attention differ
    chain    a maximal run, in execution order, of sites of one tower and role whose neighbours admit the link; a site
             without such a neighbour is alone in its chain and computes plain LoRA
    link     a site reading from its predecessor in the chain; window: the up to m predecessors that it reaches

    shortcut   neighbours admit the link if
    input      equal in_features and equal tokens
    middle     equal rank and equal tokens
    block      equal in_features and out_features

Two things must not be read off `named_modules()`. Order: a UNet registers its blocks down, up, mid and runs them down,
mid, up. Tokens: equal widths do not mean equal resolutions; the resolution follows from the down- and upsamplers.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from .config import Shortcut

UNET_STAGES = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
# Stacks that go on with the stream of another, in diffusers' transformers of FLUX's kind.
SAME_TOWER = {"single_transformer_blocks": "transformer_blocks"}
EXPERTS = re.compile(r"(^|\.)experts\.\d+(\.|$)")


@dataclass(frozen=True)
class Site:
    """One adapted layer. `tokens` names the sequences that it sees: equal names, equal numbers of tokens."""

    name: str
    role: str
    in_features: int
    out_features: int
    rank: int
    tokens: str
    unlinked: str = ""  # why it never takes part in a chain, if so


@dataclass(frozen=True)
class Chain:
    """Sites of one role in execution order, each admitting a link to the one before."""

    role: str
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Explanation:
    """The chains of an adapted model: `str()` is a table, `to_dict()` the data behind it."""

    shortcut: Shortcut
    num_previous: int | None
    chains: tuple[Chain, ...]
    unjoined: dict[str, str]  # layers of other kinds, adapted by plain LoRA: name -> kind

    @property
    def links(self) -> int:
        """Pairs of neighbours that are joined."""
        return sum(len(chain.sites) - 1 for chain in self.chains) if self.shortcut is not Shortcut.NONE else 0

    @property
    def sites(self) -> int:
        return sum(len(chain.sites) for chain in self.chains)

    @property
    def alone(self) -> tuple[Site, ...]:
        """Sites that the shortcut joins to no other: they compute plain LoRA."""
        if self.shortcut is Shortcut.NONE or self.num_previous == 0:
            return ()
        return tuple(chain.sites[0] for chain in self.chains if len(chain.sites) == 1)

    @property
    def joined_to_nothing(self) -> Counter[str]:
        """How many layers of each role or kind compute plain LoRA."""
        sites = Counter(f"{site.role} ({site.unlinked})" if site.unlinked else site.role for site in self.alone)
        return sites + Counter(self.unjoined.values())

    def to_dict(self) -> dict:
        return {
            "shortcut": str(self.shortcut),
            "num_previous": self.num_previous,
            "sites": self.sites,
            "links": self.links,
            "chains": [{"role": c.role, "sites": [asdict(site) for site in c.sites]} for c in self.chains],
            "alone": [site.name for site in self.alone],
            "unjoined": self.unjoined,
        }

    def __str__(self) -> str:
        reach = "all" if self.num_previous is None else self.num_previous
        head = f"shortcut {self.shortcut}, num_previous {reach}: {self.links} links between {self.sites} layers"
        rows = [("role", "layers", "in", "out", "rank", "tokens", "first", "last")]
        for chain in self.chains:
            first, last = chain.sites[0], chain.sites[-1]
            outs = {site.out_features for site in chain.sites}
            rows.append(
                (
                    chain.role,
                    str(len(chain.sites)),
                    str(first.in_features),
                    "/".join(map(str, sorted(outs))),
                    str(first.rank),
                    first.tokens,
                    first.name,
                    last.name if len(chain.sites) > 1 else "",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        rest = [f"plain LoRA, joined to nothing: {n} x {what}" for what, n in self.joined_to_nothing.items()]
        return "\n".join([head, *lines, *rest])


# ----------------------------------------------------------------------------------------------- roles and tokens


def is_linear_like(module: nn.Module) -> bool:
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def linear_layers(module: nn.Module) -> int:
    """How many are in a module; one that is adapted counts once, with all that its adapters add."""
    return 1 if is_linear_like(module) else sum(map(linear_layers, module.children()))


def is_layer(container: nn.Module, element: nn.Module) -> bool:
    """Whether a numbered child is one of a stack of like layers, rather than a part of one layer (`to_out.0`)."""
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
    """Towers by what tells them apart: {"encoder.block.layer": "encoder", "decoder.block.layer": "decoder"}."""
    parts = {tower: tower.split(".") for tower in towers}
    for end in (-1, 0):
        while all(parts.values()) and len({names[end] for names in parts.values()}) == 1:
            for names in parts.values():
                names.pop(end)
    return {tower: ".".join(names) for tower, names in parts.items()}


def runs_twice(model: nn.Module, name: str) -> bool:
    """Whether a layer projects the tokens and their relative positions too, in one forward (DeBERTa)."""
    parent, _, leaf = name.rpartition(".")
    attention = model.get_submodule(parent)
    shares = bool(getattr(attention, "share_att_key", False)) and bool(getattr(attention, "relative_attention", False))
    return shares and leaf in ("query_proj", "key_proj")


def reads_context(model: nn.Module, name: str) -> bool:
    """Whether a layer projects the prompt, which is the same tensor at every depth (diffusers' `Attention`)."""
    parent, _, leaf = name.rpartition(".")
    return leaf in ("to_k", "to_v") and bool(getattr(model.get_submodule(parent), "is_cross_attention", False))


def unet_level(model: nn.Module, parts: Sequence[str]) -> int | None:
    """How often the input of a UNet's block has been halved; None outside the blocks of a UNet."""
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


# ----------------------------------------------------------------------------------------------------- chains


def admits_link(shortcut: Shortcut, previous: Site, site: Site, same_resolution_only: bool = False) -> bool:
    """Whether `site` may read from `previous`, its predecessor in the same role."""
    if previous.unlinked or site.unlinked or shortcut is Shortcut.NONE:
        return False
    same_tokens = previous.tokens == site.tokens
    if shortcut is Shortcut.INPUT:
        return same_tokens and previous.in_features == site.in_features
    if shortcut is Shortcut.MIDDLE:
        return same_tokens and previous.rank == site.rank
    same_shape = (previous.in_features, previous.out_features) == (site.in_features, site.out_features)
    return same_shape and (same_tokens or not same_resolution_only)


def build_chains(sites: Iterable[Site], shortcut: Shortcut, same_resolution_only: bool = False) -> tuple[Chain, ...]:
    """Cut the sites of each role, in their order, into chains. Every site is in one of them."""
    by_role: dict[str, list[Site]] = {}
    for site in sites:
        by_role.setdefault(site.role, []).append(site)
    chains = []
    for role, members in by_role.items():
        run = [members[0]]
        for previous, site in zip(members, members[1:], strict=False):
            if not admits_link(shortcut, previous, site, same_resolution_only):
                chains.append(Chain(role, tuple(run)))
                run = []
            run.append(site)
        chains.append(Chain(role, tuple(run)))
    return tuple(chains)


def windows(chains: Iterable[Chain], num_previous: int | None) -> dict[str, tuple[str, ...]]:
    """For each site the names of the predecessors that it reaches, nearest first."""
    return {
        site.name: tuple(s.name for s in reversed(chain.sites[:place]))[:num_previous]
        for chain in chains
        for place, site in enumerate(chain.sites)
    }
