"""The report of an export says what was proved, as data (`export_report.json`) and as a short table."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.files import write_text
from .limits import LOSSY_ERROR
from .proof import LoaderCheck
from .ranks import Losses
from .tables import table

if TYPE_CHECKING:  # which waits for PEFT
    from .outputs import Outputs

REPORT_FILE = "export_report.json"
EMBEDDINGS = "embeddings"  # among the files
SHOWN = 5  # modules that a cut hurt most


@dataclass(frozen=True)
class ExportReport:
    """Files of one export, and the evidence that they are what was trained.

    `errors` compares what loaders read from the files with the exact merge, so it holds truncation and rounding both.
    """

    folder: Path
    files: dict[str, Path]
    sha256: dict[str, str]
    family: str
    dtype: str
    rank: int
    asked_rank: int | str
    rank_needed: int | None
    losses: Losses
    errors: dict[tuple[str, str], float]
    norms: dict[tuple[str, str], float]
    ranks: dict[tuple[str, str], int]
    checks: list[LoaderCheck]
    versions: dict[str, str]
    facts: dict[str, str]
    notes: list[str] = field(default_factory=list)
    outputs: "Outputs | None" = None  # of the whole model, in a PEFT folder

    def with_embeddings(self, path: Path) -> "ExportReport":
        """Name the embeddings of new tokens, which lie beside the LoRA, in the report and in its file."""
        found = replace(
            self,
            files={**self.files, EMBEDDINGS: path},
            sha256={**self.sha256, EMBEDDINGS: hashlib.sha256(path.read_bytes()).hexdigest()},
        )
        write_text(self.folder / REPORT_FILE, json.dumps(found.to_dict(), indent=2))
        return found

    @property
    def energy_kept(self) -> float:
        """Share of the squared norm of all modules together that survived the choice of rank."""
        energies = {name: norm**2 for name, norm in self.norms.items()}
        return sum(energies[name] * loss.energy_kept for name, loss in self.losses.items()) / sum(energies.values())

    @property
    def largest_error(self) -> float:
        return max(self.errors.values())

    def to_dict(self) -> dict:
        modules = {
            f"{component}.{path}": {
                "rank_before": self.ranks[component, path],
                "norm": self.norms[component, path],
                "truncation_error": loss.relative_error,
                "energy_kept": loss.energy_kept,
                "file_error": self.errors[component, path],
            }
            for (component, path), loss in self.losses.items()
        }
        return {
            "files": {
                kind: {"path": path.relative_to(self.folder).as_posix(), "sha256": self.sha256[kind]}
                for kind, path in self.files.items()
            },
            "family": self.family,
            "dtype": self.dtype,
            "rank": self.rank,
            "asked_rank": self.asked_rank,
            "rank_needed": self.rank_needed,
            "lossy_above": LOSSY_ERROR,
            "energy_kept": self.energy_kept,
            "largest_relative_error": self.largest_error,
            "loaders": [check.to_dict() for check in self.checks],
            **({"outputs": self.outputs.to_dict()} if self.outputs else {}),
            "versions": self.versions,
            "notes": self.notes,
            "facts": self.facts,
            "modules": modules,
        }

    def __str__(self) -> str:
        rows = [(check.loader, check.file, f"{check.matched}/{check.expected}", check.error) for check in self.checks]
        return "\n".join(
            [
                f"{len(self.losses)} modules of {self.family}, rank {self.rank}, {self.dtype}: "
                f"largest relative error {self.largest_error:.1e}",
                *self.merging(),
                *self.truncation(),
                *table(("read by", "file", "modules", "largest error"), rows),
                *([str(self.outputs)] if self.outputs else []),
                *(f"wrote {path}" for path in self.files.values()),
                *self.notes,
            ]
        )

    def merging(self) -> list[str]:
        """A line about what merging a shortcut cost, where the training measured it."""
        method, gap = self.facts.get("merge_method"), self.facts.get("merge_gap")
        return [f"{self.facts.get('shortcut')} shortcut merged by {method}: loss changed by {gap}"] if gap else []

    def truncation(self) -> list[str]:
        """Lines about the rank: what a cut cost, or why there was none."""
        if self.asked_rank == "full":
            if self.rank_needed is None:
                return []
            fewer = (
                f"{self.rank_needed} ('auto') would keep every module within {LOSSY_ERROR:.0%}"
                if self.rank_needed < self.rank
                else f"no smaller rank would keep every module within {LOSSY_ERROR:.0%}"
            )
            return [f"a block shortcut merges exactly at full rank, here {self.rank}, hence the default; {fewer}"]
        worst = sorted(self.losses.items(), key=lambda item: -item[1].relative_error)
        shown = ", ".join(f"{c}.{path} {loss.relative_error:.1e}" for (c, path), loss in worst[:SHOWN])
        return [f"cut to rank {self.rank} ({self.asked_rank}): energy kept {self.energy_kept:.4%}; most lost: {shown}"]
