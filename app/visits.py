"""A visit is stored as it is made, so that a reload or a restart of the server loses nothing.

    <root>/<digest of the key>/fields.json           what stands in the Compare tab's fields, as it was typed
                               base.json             label of the chosen base
                               current.json          the number of the comparison that is looked at
                               comparisons/<number>/settings.json    the comparison, as `saved.py` writes it
                                                    images/<file>    its images, each as it is generated
                                                    votes.json       its rounds: pairs, sides, votes
                                                    measures.json    its figures
                               adapters/<sha256>.safetensors, adapters.json    the files that were added
                               list.json             names and order of the adapters to choose from; those taken away
                               references/<number>.png    the visitor's own images to vote by

The key is random, lives in one tab of a browser (`sessionStorage`), and outlives reloads of it and the server. Who does
not know it finds nothing; its digest alone is written. Of more than MOST visits the oldest go, and of a visit's
comparisons those before the last MOST_COMPARISONS.
"""

import json
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from reslora_diffusion.utils.files import atomic_write, write_text

from .compare import Cell
from .foreign import is_text, parsed_json
from .measures import Measure
from .output import by_place, png
from .request import Adapter, CompareRequest
from .saved import IMAGES, SETTINGS, View, named, settings_json
from .votes import Ballot, Pair, Verdict

MOST = 64
COMPARISONS, REFERENCES = "comparisons", "references"
MOST_COMPARISONS = 12
FIELDS, BASE, CURRENT, ADAPTERS = "fields.json", "base.json", "current.json", "adapters.json"
VOTES, MEASURES, LIST = "votes.json", "measures.json", "list.json"
# As `forms.fields_of` gives them.
FIELD_TYPES = (str, str, str, list, str, bool, str, (int, float), (int, float), str, str, str, str, str, bool)


@dataclass(frozen=True)
class Entry:
    """One line of a visit's history."""

    number: int
    prompt: str
    count: int
    image: Path
    current: bool


@dataclass(frozen=True)
class Visit:
    folder: Path

    def write(self, name: str | Path, data: object) -> None:
        write_text(self.folder / name, json.dumps(data, ensure_ascii=False))

    def read(self, name: str | Path) -> object:
        """None where there is nothing that can be read."""
        try:
            return parsed_json((self.folder / name).read_bytes())
        except (OSError, ValueError):
            return None

    # ----------------------------------------------------------------------------------------- comparisons

    @property
    def numbers(self) -> list[int]:
        """Numbers of the comparisons, the oldest first."""
        folders = (self.folder / COMPARISONS).glob("*")
        return sorted(int(path.name) for path in folders if path.name.isdecimal())

    @property
    def current(self) -> Path | None:
        """Folder of the comparison that is looked at; None before there is one."""
        number, numbers = self.read(CURRENT), self.numbers
        if number not in numbers:
            number = numbers[-1] if numbers else None
        return None if number is None else self.place(number)

    def place(self, number: int) -> Path:
        return self.folder / COMPARISONS / f"{number:06}"

    def choose(self, number: int) -> None:
        """Look at an earlier comparison.

        Raises:
            ValueError: it is not stored any more.
        """
        if number not in self.numbers:
            raise ValueError("This comparison is not stored any more.")
        self.write(CURRENT, number)

    def show(self, request: CompareRequest, cells: list[Cell], base: str, view: View) -> None:
        """Begin another comparison. It takes the place of the last one only where that has no image."""
        if (last := self.current) and not any((last / IMAGES).glob("*.png")):
            shutil.rmtree(last, ignore_errors=True)
        numbers = self.numbers
        number = numbers[-1] + 1 if numbers else 1
        (self.place(number) / IMAGES).mkdir(parents=True)
        self.write(CURRENT, number)
        for old in numbers[: -(MOST_COMPARISONS - 1)]:
            shutil.rmtree(self.place(old), ignore_errors=True)
        for name, cell in named(request, cells).items():
            self.write_image(name, cell)
        write_text(self.current / SETTINGS, settings_json(request, cells, view, base))

    def add(self, request: CompareRequest, cells: list[Cell], base: str, view: View) -> None:
        """The newest of the cells, and the settings that name it."""
        for name, cell in named(request, cells[-1:]).items():
            self.write_image(name, cell)
        write_text(self.current / SETTINGS, settings_json(request, cells, view, base))

    def write_image(self, name: str, cell: Cell) -> None:
        with atomic_write(self.current / IMAGES / name) as fresh:
            fresh.write_bytes(png(cell.image))

    def write_view(self, view: View) -> None:
        if self.current and isinstance(data := self.read(self.current / SETTINGS), dict):
            self.write(self.current / SETTINGS, data | {"view": asdict(view)})

    def comparison(self) -> list[Path]:
        """Files that `saved.open_saved` opens; none if there is no comparison."""
        settings = self.current / SETTINGS if self.current else None
        return [settings, *images_of(self.current)] if settings and settings.is_file() else []

    def history(self) -> list["Entry"]:
        """The comparisons with images, the newest first."""
        found = []
        for number in reversed(self.numbers):
            data, images = self.read(self.place(number) / SETTINGS), images_of(self.place(number))
            if images and isinstance(data, dict) and isinstance(prompts := data.get("prompts"), list) and prompts:
                found.append(
                    Entry(number, str(prompts[0]), len(images), images[-1], self.place(number) == self.current)
                )
        return found

    def write_measures(self, measures: Sequence[Measure], request: CompareRequest) -> None:
        if self.current:
            self.write(self.current / MEASURES, [measure.to_dict(request) for measure in measures])

    def measures(self, request: CompareRequest) -> list[Measure]:
        """Figures of the comparison; none where there are none that can be read."""
        data = self.read(self.current / MEASURES) if self.current else None
        try:
            return [Measure.from_dict(said, request) for said in data or ()]
        except (TypeError, ValueError, KeyError, IndexError, AttributeError):
            return []

    # ---------------------------------------------------------------------------------------------- fields

    def write_fields(self, values: list) -> None:
        if sound_fields(values):
            self.write(FIELDS, values)

    def fields(self) -> list | None:
        values = self.read(FIELDS)
        return values if isinstance(values, list) and sound_fields(values) else None

    def write_base(self, label: str) -> None:
        self.write(BASE, label)

    def base(self) -> str | None:
        """Label of the chosen base."""
        label = self.read(BASE)
        return label if isinstance(label, str) else None

    # ------------------------------------------------------------------------------------------------ votes

    def write_rounds(self, rounds: Sequence[Ballot]) -> None:
        """All rounds of votes on the comparison, the newest last."""
        if self.current:
            self.write(self.current / VOTES, [round_data(ballot) for ballot in rounds])

    def rounds(self, request: CompareRequest, cells: list[Cell]) -> list[Ballot]:
        """The rounds of which all images are there."""
        said = self.read(self.current / VOTES) if self.current else None
        said = [said] if isinstance(said, dict) else said  # as it was written when there was one round
        found = (ballot_of(data, request, cells) for data in (said if isinstance(said, list) else ()))
        return [ballot for ballot in found if ballot]

    def write_references(self, images: Sequence[Image.Image]) -> list[Path]:
        """Images to vote by, in place of those before."""
        folder = self.folder / REFERENCES
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for number, image in enumerate(images):
            (folder / f"{number:02}.png").write_bytes(png(image))
        return self.references()

    def references(self) -> list[Path]:
        return sorted((self.folder / REFERENCES).glob("*.png"))

    # --------------------------------------------------------------------------------------------- adapters

    def keep(self, adapter: Adapter) -> Adapter:
        """A copy of an added file, which is gone with the server otherwise."""
        path = self.folder / "adapters" / f"{adapter.sha256}.safetensors"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            with atomic_write(path) as fresh:
                shutil.copyfile(adapter.path, fresh)
        kept = self.adapters()
        self.write(ADAPTERS, {a.sha256: a.label for a in (*kept, adapter)})
        return Adapter(adapter.label, str(path), adapter.sha256)

    def write_list(self, adapters: Sequence[Adapter], removed: Collection[str]) -> None:
        """The adapters to choose from, in their order, and digests of those taken away. Added files that are not among
        them are gone."""
        self.write(LIST, {"adapters": [[a.sha256, a.label] for a in adapters], "removed": sorted(removed)})
        stored = {adapter.sha256 for adapter in self.adapters()}
        self.write(ADAPTERS, {a.sha256: a.label for a in adapters if a.sha256 in stored})

    def listed(self) -> tuple[list[tuple[str, str]], set[str]]:
        """(digest and name of each adapter in the list, digests of those taken away); nothing where no list is."""
        data = self.read(LIST)
        try:
            pairs = [(digest, label) for digest, label in data["adapters"]]
            words = [word for pair in pairs for word in pair] + data["removed"]
        except (TypeError, KeyError, ValueError):
            return [], set()
        return (pairs, {*data["removed"]}) if all(isinstance(word, str) for word in words) else ([], set())

    def adapters(self) -> list[Adapter]:
        labels = self.read(ADAPTERS)
        if not isinstance(labels, dict):
            return []
        paths = {digest: self.folder / "adapters" / f"{digest}.safetensors" for digest in labels}
        return [Adapter(labels[d], str(p), d) for d, p in paths.items() if isinstance(labels[d], str) and p.is_file()]


def round_data(ballot: Ballot) -> dict:
    rows, columns = ballot.request.rows, ballot.request.columns
    return {
        "columns": [columns.index(ballot.first), columns.index(ballot.second)],
        "pairs": [[rows.index(pair.row), pair.first_is_left] for pair in ballot.pairs],
        "votes": ballot.votes,
        "seen": ballot.seen,
        "question": ballot.question,
        "rater": ballot.rater,
    }


def ballot_of(data: Any, request: CompareRequest, cells: Sequence[Cell]) -> Ballot | None:
    """Inverse of `round_data`; None where that is not what it is, or an image is missing."""
    places, rows = by_place(cells), request.rows
    try:
        first, second = (request.columns[number] for number in data["columns"])
        pairs = []
        for number, first_is_left in data["pairs"]:
            a, b = places[rows[number], first], places[rows[number], second]
            pairs.append(Pair(rows[number], *((a, b) if first_is_left else (b, a)), bool(first_is_left)))
        words = {name: str(data[name]) for name in ("question", "rater") if name in data}
        votes, seen = [Verdict(v) for v in data["votes"]], [*map(int, data["seen"])]
        return Ballot(request, first, second, pairs, votes, seen, **words)
    except (TypeError, KeyError, ValueError, IndexError):
        return None


def images_of(folder: Path) -> list[Path]:
    return sorted((folder / IMAGES).glob("*.png"))


def sound_fields(values: list) -> bool:
    if len(values) != len(FIELD_TYPES):
        return False
    words = (word for value in values for word in (value if isinstance(value, list) else [value]))
    typed = all(isinstance(value, kind) for value, kind in zip(values, FIELD_TYPES, strict=True))
    return typed and all(is_text(word) for word in words if isinstance(word, str))


class Visits:
    """Visits below one folder; without one, none is kept."""

    def __init__(self, root: Path | None):
        self.root = root

    def of(self, key: object) -> Visit | None:
        """The visit with this key, which the browser made up: 32 hexadecimal digits."""
        if self.root is None or not isinstance(key, str) or not re.fullmatch(r"[0-9a-f]{32}", key):
            return None
        folder = self.root / sha256(key.encode()).hexdigest()[:32]
        if not folder.is_dir():
            folder.mkdir(parents=True, mode=0o700)
            by_age = sorted(self.root.iterdir(), key=lambda path: path.stat().st_mtime)
            for old in by_age[:-MOST]:
                shutil.rmtree(old, ignore_errors=True)
        folder.touch()  # the newest
        return Visit(folder)
