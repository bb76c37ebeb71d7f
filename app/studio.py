"""Everything the tabs share: the pipeline, the visitors, the folders that may be read."""

from dataclasses import dataclass
from pathlib import Path

from .adapters import AdapterShelf
from .compare import Cell, Comparer
from .request import Adapter, CompareRequest
from .sessions import Sessions

HEAVY = {"concurrency_limit": 1, "concurrency_id": "pipeline"}  # events that paint, in one queue for all visitors
LIGHT = {"concurrency_limit": 16, "show_progress": "hidden"}
PRIVATE = {"api_visibility": "private"}
FIRST_SEEDS = (0, 1)


@dataclass
class Studio:
    comparer: Comparer
    sessions: Sessions
    base_name: str
    runs: tuple[Path, ...] = ()
    first_request: CompareRequest | None = None
    first_cells: tuple[Cell, ...] = ()

    def paint_first(self, prompt: str, num_inference_steps: int) -> None:
        """What every visitor sees before asking for anything: the first adapters at hand, on one prompt."""
        limits = self.comparer.limits
        adapters = tuple(self.sessions.adapters[: min(2, limits.adapters)])
        self.first_request = CompareRequest(
            prompts=(prompt,), seeds=FIRST_SEEDS, adapters=adapters, num_inference_steps=num_inference_steps
        )
        self.first_cells = tuple(self.comparer.compare(self.first_request))


def adapters_in(folders: tuple[Path, ...], shelf: AdapterShelf) -> list[Adapter]:
    """LoRA files of training runs that fit the loaded base, in the order of their paths."""
    files = sorted(file for folder in folders for file in folder.rglob("pytorch_lora_weights.safetensors"))
    found = []
    for file in files:
        try:
            card = shelf.card(file)
        except ValueError as problem:
            print(f"left out: {problem}")
            continue
        if card.fits:
            found.append(card.adapter)
        else:
            print(f"left out, for another base: {file}")
    return found
