"""Chains are built from sites by a pure function, which decides which adapted layers are joined.

    site     one adapted linear layer
    tower    the stack of like layers that it is in: encoder and decoder, text and vision, refiner and trunk differ
    role     what it does inside its layer, "attn1.to_q", "self_attn.q_proj": self- and cross-attention differ
    chain    a maximal run, in execution order, of sites of one tower and role whose neighbours admit the link; a site
             without such a neighbour is alone in its chain and computes plain LoRA
    link     a site reading from its predecessor in the chain; window: the up to m predecessors that it reaches

Which neighbours admit a link is said by each shortcut (`core.shortcuts`); sites are found by `core.discovery`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


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
    """The names of the predecessors that each site reaches, nearest first."""
    return {
        site.name: tuple(s.name for s in reversed(chain.sites[:place]))[:num_previous]
        for chain in chains
        for place, site in enumerate(chain.sites)
    }
