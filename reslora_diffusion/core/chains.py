"""Which adapted layers are joined to which: a pure function of sites.

    site     one adapted linear layer
    tower    the stack of like layers that it is in: encoder and decoder, text and vision, refiner and trunk differ
    role     what it does inside its layer, "attn1.to_q", "self_attn.q_proj": self- and cross-attention differ
    chain    a maximal run, in execution order, of sites of one tower and role whose neighbours admit the link; a site
             without such a neighbour is alone in its chain and computes plain LoRA
    link     a site reading from its predecessor in the chain; window: the up to m predecessors that it reaches

Which neighbours admit a link is said by each shortcut (`core.shortcuts`); sites are found by `core.discovery`.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from ..rules import Shortcut


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


def build_chains(
    sites: Iterable[Site], links: Callable[[Site, Site], bool], same_resolution_only: bool = False
) -> tuple[Chain, ...]:
    """Cut the sites of each role, in their order, into chains. Every site is in one of them.

    Args:
        links: whether the second of two neighbours may read from the first, as far as the shortcut is concerned.
        same_resolution_only: cut where the number of tokens changes, whatever the shortcut says.
    """

    def joined(previous: Site, site: Site) -> bool:
        if previous.unlinked or site.unlinked or (same_resolution_only and previous.tokens != site.tokens):
            return False
        return links(previous, site)

    by_role: dict[str, list[Site]] = {}
    for site in sites:
        by_role.setdefault(site.role, []).append(site)
    chains = []
    for role, members in by_role.items():
        run = [members[0]]
        for previous, site in zip(members, members[1:], strict=False):
            if not joined(previous, site):
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
