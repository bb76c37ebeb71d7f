"""Reports on an adapter, as tables and as data: which layers are joined, and which kernel computes each."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from ..rules import Shortcut
from .chains import Chain, Site


def columns(rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of text with aligned columns."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]


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
        """Return how many layers of each role or kind compute plain LoRA."""
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
        rows: list[tuple[object, ...]] = [("role", "layers", "in", "out", "rank", "tokens", "first", "last")]
        for chain in self.chains:
            first, last = chain.sites[0], chain.sites[-1]
            outs = "/".join(map(str, sorted({site.out_features for site in chain.sites})))
            names = first.name, last.name if last is not first else ""
            rows.append((chain.role, len(chain.sites), first.in_features, outs, first.rank, first.tokens, *names))
        rest = [f"plain LoRA, joined to nothing: {n} x {what}" for what, n in self.joined_to_nothing.items()]
        return "\n".join([head, *columns(rows), *rest])


@dataclass(frozen=True)
class KernelReport:
    """`(kernel, reason)` of each layer in its last forward; None for layers that have not run."""

    layers: Mapping[str, tuple[str, str] | None]

    def __str__(self) -> str:
        found: dict[tuple[str, str], list[str]] = {}
        for name, choice in self.layers.items():
            found.setdefault(choice or ("-", "has not run yet"), []).append(name)
        rows = [(kernel, len(names), why, names[0]) for (kernel, why), names in found.items()]
        return "\n".join(columns([("kernel", "layers", "why", "such as"), *rows]))
