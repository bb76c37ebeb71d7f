"""What an export proved, as data (`export_report.json`) and as a short table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .proof import LoaderCheck
from .ranks import LOSSY_ERROR, Losses


@dataclass(frozen=True)
class ExportReport:
    """Files of one export, and the evidence that they are what was trained.

    `errors` compares what loaders read from the files with the exact merge, so it holds truncation and rounding both.
    """

    files: dict[str, Path]
    sha256: dict[str, str]
    family: str
    dtype: str
    rank: int
    asked_rank: int | str
    losses: Losses
    errors: dict[tuple[str, str], float]
    ranks: dict[tuple[str, str], int]
    checks: list[LoaderCheck]
    facts: dict[str, str]

    @property
    def energy_kept(self) -> float:
        """Smallest share of a module's squared norm that survived the choice of rank."""
        return min(loss.energy_kept for loss in self.losses.values())

    def to_dict(self) -> dict:
        modules = {
            f"{component}.{path}": {
                "rank_before": self.ranks[component, path],
                "truncation_error": loss.relative_error,
                "energy_kept": loss.energy_kept,
                "file_error": self.errors[component, path],
            }
            for (component, path), loss in self.losses.items()
        }
        return {
            "files": {kind: {"path": str(path), "sha256": self.sha256[kind]} for kind, path in self.files.items()},
            "family": self.family,
            "dtype": self.dtype,
            "rank": self.rank,
            "asked_rank": self.asked_rank,
            "lossy_above": LOSSY_ERROR,
            "smallest_energy_kept": self.energy_kept,
            "largest_relative_error": max(self.errors.values()),
            "loaders": [check.to_dict() for check in self.checks],
            "facts": self.facts,
            "modules": modules,
        }

    def __str__(self) -> str:
        count = len(self.losses)
        worst = max(self.losses.values(), key=lambda loss: loss.relative_error)
        cut = f"cut to rank {self.rank} ({self.asked_rank})" if self.asked_rank != "full" else f"rank {self.rank}, full"
        rows = [
            (
                check.loader,
                check.file,
                f"{check.matched}/{check.expected}",
                "names" if check.largest_relative_error is None else f"{check.largest_relative_error:.1e}",
            )
            for check in self.checks
        ]
        return "\n".join(
            [
                f"{count} modules of {self.family}, {cut}, {self.dtype}",
                f"truncation: largest relative error {worst.relative_error:.1e}, energy kept {self.energy_kept:.4%}",
                *table(("read by", "file", "modules", "largest error"), rows),
                *(f"wrote {path}" for path in self.files.values()),
            ]
        )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a left-aligned text table."""
    cells = [tuple(map(str, head)), *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
