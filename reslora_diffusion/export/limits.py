"""Thresholds, choices, and how a check ends, which several modules share. Nothing here waits for torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

LOSSY_ERROR = 0.05  # of a module's norm: a cut that loses more must be asked for
LARGEST_EXPORT = 8 * 2**30  # bytes of one file; the largest LoRAs in use have one
Rank = int | Literal["full", "auto"]


class CheckFailed(ValueError):
    """The input was sound, but what came of it did not pass: a failed proof, or a loss that nobody allowed."""


@dataclass(frozen=True)
class LoaderCheck:
    """One loader's view of one file."""

    loader: str
    file: str
    matched: int
    expected: int
    largest_relative_error: float | None  # None where only names were compared
    misread: list[str] = field(default_factory=list)

    @property
    def error(self) -> str:
        return "names only" if self.largest_relative_error is None else f"{self.largest_relative_error:.1e}"

    def to_dict(self) -> dict:
        return asdict(self)


def parse_rank(text: str) -> Rank:
    """`full`, `auto` or a positive number, as typed on a command line."""
    if text == "full":
        return "full"
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ValueError(f"rank must be 'full', 'auto' or a positive number, got {text!r}")


def check_weights(weights: Sequence[float], sources: Sequence[object]) -> None:
    """Raises ValueError if there is not one weight for each file, nor none at all."""
    if weights and len(weights) != len(sources):
        raise ValueError(f"got {len(weights)} weights for {len(sources)} files; wanted one for each, or none")
