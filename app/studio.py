"""Everything the tabs share: the pipeline, the visitors, the trainer, the folders that may be read."""

from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from reslora_diffusion.export.inspection import sha256

from .adapters import AdapterShelf
from .bases import Bases
from .compare import Cell, Comparer
from .foreign import is_number, printable
from .forms import unwritable
from .images import images_in
from .request import Adapter, CompareRequest, Limits, problems
from .runs import find_adapters, find_runs, is_checkpoint, read_object, siblings
from .sessions import Session, Sessions
from .trainer import Trainer
from .verdict import Findings, findings
from .visits import Visits

HEAVY = {"concurrency_limit": 1, "concurrency_id": "pipeline"}  # events that generate, in one queue for all visitors
LIGHT = {"concurrency_limit": 16, "show_progress": "hidden"}
PRIVATE = {"api_visibility": "private"}
FIRST_SEEDS = (0, 1)
PROMPT = "a sticker of sks animal on a blue background"  # of the embedded pipeline
FIRST_ADAPTERS = 8  # of runs, offered without being asked for


@dataclass
class Studio:
    bases: Bases
    sessions: Sessions
    trainer: Trainer
    runs: tuple[Path, ...] = ()
    subjects: dict[str, Path] = field(default_factory=dict)  # folders of images that come with the pipeline
    first_subject: str | None = None  # the one that the first adapters were taught
    first_request: CompareRequest | None = None
    first_cells: tuple[Cell, ...] = ()
    visits: Visits = field(default_factory=lambda: Visits(None))

    @property
    def comparer(self) -> Comparer:
        """The one of the base that the page was started with."""
        return self.bases.get()

    def comparer_of(self, session: Session) -> Comparer:
        """The one of the base that a visitor chose.

        Raises:
            ValueError: it cannot be loaded any more.
        """
        return self.bases.get(session.base)

    def base_of(self, session: Session) -> str:
        """Label of the base that a visitor chose."""
        return session.base or self.bases.first

    def generate_first(self, prompt: str, num_inference_steps: int, guidance_scale: float) -> None:
        """Generate what every visitor sees before asking for anything: the first adapters at hand, on one prompt."""
        limits = self.comparer.limits
        adapters = tuple(self.sessions.adapters[: min(2, limits.adapters)])
        self.first_request = CompareRequest(
            prompts=(prompt,),
            seeds=FIRST_SEEDS,
            adapters=adapters,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        self.first_cells = tuple(self.comparer.compare(self.first_request))

    @property
    def first_prompt(self) -> str:
        return self.first_request.prompts[0] if self.first_request else PROMPT

    def findings(self, session: Session) -> Findings | None:
        """Find what votes and measures say of a visitor's comparison now."""
        if session.request is None:
            return None
        gaps = {}
        for column in session.request.columns:
            with suppress(ValueError):
                if column.adapter and (gap := self.merge_gap(column.adapter)) is not None:
                    gaps[column] = gap
        return findings(session.request, session.measured, session.ballot, gaps)

    def merge_gap(self, adapter: Adapter) -> float | None:
        """The merge gap in the header of an adapter's file; None where the file is gone or has none.

        Raises:
            ValueError: the header has something else in its place.
        """
        if not adapter.path or not Path(adapter.path).is_file():
            return None
        said = self.comparer.shelf.card(Path(adapter.path)).inspection.facts.get("merge gap")
        return None if said is None else float(said)

    def run_folders(self) -> dict[str, Path]:
        return find_runs(self.runs)

    def first_race(self) -> list[str]:
        return siblings(self.run_folders())

    def adapter_files(self) -> dict[str, Path]:
        return find_adapters(self.runs)

    def adapters_by_content(self, digests: set[str]) -> list[Adapter]:
        """Adapters of runs whose sha256 is asked for."""
        found = {digest_of(path, path.stat().st_mtime_ns): (name, path) for name, path in self.adapter_files().items()}
        return [Adapter(found[d][0], str(found[d][1]), d) for d in digests & found.keys()]


@lru_cache(maxsize=4096)
def digest_of(path: Path, written: int) -> str:
    return sha256(path)


def first_adapters(folders: tuple[Path, ...], shelf: AdapterShelf) -> list[Adapter]:
    """Adapters of whole runs that fit the loaded base, in the order of the folders."""
    found: list[Adapter] = []
    for label, file in find_adapters(folders).items():
        if is_checkpoint(file) or len(found) == FIRST_ADAPTERS:
            break
        try:
            card = shelf.card(file, label)
        except ValueError as problem:
            print(printable(f"left out: {problem}"))
            continue
        if card.fits:
            found.append(card.adapter)
        else:
            print(printable(f"left out, for another base: {file}"))
    return found


def subjects_in(folder: Path) -> dict[str, Path]:
    found = sorted(path for path in folder.iterdir() if path.is_dir() and images_in(path)) if folder.is_dir() else []
    return {path.name.replace("_", " "): path for path in found}


def first_options(runs: tuple[Path, ...]) -> dict[str, Any]:
    """The options of the first run that says some, whose adapters the page shows first."""
    for folder in find_runs(runs).values():
        try:
            options = read_object(folder / "run.json").get("options")
        except (ValueError, OSError) as problem:
            print(printable(f"left out: {problem}"))
            continue
        if isinstance(options, dict):
            return options
    return {}


def first_prompt(options: dict[str, Any]) -> str:
    """One that the first adapters were taught, on a background of its own where it is the demo's; if it can stand in
    a request."""
    taught = options.get("instance_prompt")
    if not isinstance(taught, str) or not (taught := taught.strip()) or PROMPT.startswith(taught):
        return PROMPT
    request = CompareRequest(prompts=(taught,), seeds=FIRST_SEEDS)
    return PROMPT if problems(request, Limits()) or unwritable(request) else taught


def first_guidance(options: dict[str, Any]) -> float:
    """The guidance of the first run's own images, so that those of the page are the same."""
    said = options.get("validation_guidance_scale")
    return float(said) if is_number(said) and 0 <= said <= Limits().guidance else CompareRequest.guidance_scale


def first_subject(options: dict[str, Any], subjects: dict[str, Path]) -> str | None:
    """The subject that was taught, as far as it came with the pipeline; if nothing was taught, the first there is."""
    taught = options.get("instance_data_dir")
    if isinstance(taught, str):
        return next((name for name, path in subjects.items() if path == Path(taught).resolve()), None)
    return next(iter(subjects), None)
