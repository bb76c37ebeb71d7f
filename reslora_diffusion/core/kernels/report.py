"""Which kernel computes each layer of a model, and why."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class KernelReport:
    """`(kernel, reason)` of each layer in its last forward; None for layers that have not run."""

    layers: Mapping[str, tuple[str, str] | None]

    def __str__(self) -> str:
        found: dict[tuple[str, str], list[str]] = {}
        for name, choice in self.layers.items():
            found.setdefault(choice or ("-", "has not run yet"), []).append(name)
        rows = [("kernel", "layers", "why", "such as")]
        rows += [(kernel, str(len(names)), why, names[0]) for (kernel, why), names in found.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
