"""What is kept of a visit on the disk, as it is made, so that a reload or a restart of the server loses nothing.

    <root>/<digest of the key>/fields.json       what stands in the Compare tab's fields, as it was typed
                               settings.json     the comparison, as `saved.py` writes it
                               images/<file>     its images, each as it is generated
                               votes.json        the round: pairs, sides, votes
                               adapters/<sha256>.safetensors, adapters.json    the files that were added

The key is random, lives in one tab of a browser (`sessionStorage`), and outlives reloads of it and the server. Who does
not know it finds nothing; its digest alone is written. Of more than MOST visits the oldest go.
"""

import json
import re
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from reslora_diffusion.utils.files import atomic_write, write_text

from .compare import Cell
from .foreign import is_text, parsed_json
from .output import png
from .request import Adapter, CompareRequest
from .saved import IMAGES, SETTINGS, View, named, settings_json
from .votes import Ballot, Pair, Verdict

MOST = 64
FIELDS, VOTES, ADAPTERS = "fields.json", "votes.json", "adapters.json"
# As `forms.fields_of` gives them.
FIELD_TYPES = (str, str, str, list, str, bool, str, (int, float), (int, float), str, str, str, str, str, bool)


@dataclass(frozen=True)
class Visit:
    folder: Path

    def write(self, name: str, data: object) -> None:
        write_text(self.folder / name, json.dumps(data))

    def read(self, name: str) -> object:
        """None where there is nothing that can be read."""
        try:
            return parsed_json((self.folder / name).read_bytes())
        except (OSError, ValueError):
            return None

    # ------------------------------------------------------------------------------------------ comparison

    def show(self, request: CompareRequest, cells: list[Cell], base: str, view: View) -> None:
        """Another comparison takes the place of the last, and of the round on it."""
        shutil.rmtree(self.folder / IMAGES, ignore_errors=True)
        (self.folder / IMAGES).mkdir()
        (self.folder / VOTES).unlink(missing_ok=True)
        for name, cell in named(request, cells).items():
            self.write_image(name, cell)
        write_text(self.folder / SETTINGS, settings_json(request, cells, view, base))

    def add(self, request: CompareRequest, cells: list[Cell], base: str, view: View) -> None:
        """The newest of the cells, and the settings that name it."""
        for name, cell in named(request, cells[-1:]).items():
            self.write_image(name, cell)
        write_text(self.folder / SETTINGS, settings_json(request, cells, view, base))

    def write_image(self, name: str, cell: Cell) -> None:
        with atomic_write(self.folder / IMAGES / name) as fresh:
            fresh.write_bytes(png(cell.image))

    def comparison(self) -> list[Path]:
        """Files that `saved.open_saved` opens; none if there is no comparison."""
        settings = self.folder / SETTINGS
        return [settings, *sorted((self.folder / IMAGES).glob("*.png"))] if settings.is_file() else []

    # ---------------------------------------------------------------------------------------------- fields

    def write_fields(self, values: list) -> None:
        if sound_fields(values):
            self.write(FIELDS, values)

    def fields(self) -> list | None:
        values = self.read(FIELDS)
        return values if isinstance(values, list) and sound_fields(values) else None

    # ------------------------------------------------------------------------------------------------ votes

    def write_ballot(self, ballot: Ballot) -> None:
        rows, columns = ballot.request.rows, ballot.request.columns
        data = {
            "columns": [columns.index(ballot.first), columns.index(ballot.second)],
            "pairs": [[rows.index(pair.row), pair.first_is_left] for pair in ballot.pairs],
            "votes": ballot.votes,
            "seen": ballot.seen,
        }
        self.write(VOTES, data)

    def ballot(self, request: CompareRequest, cells: list[Cell]) -> Ballot | None:
        """The round, if its images are all there."""
        places = {(cell.row, cell.column): cell for cell in cells}
        data, rows = self.read(VOTES), request.rows
        try:
            first, second = (request.columns[number] for number in data["columns"])
            pairs = []
            for number, first_is_left in data["pairs"]:
                a, b = places[rows[number], first], places[rows[number], second]
                pairs.append(Pair(rows[number], *((a, b) if first_is_left else (b, a)), bool(first_is_left)))
            return Ballot(request, first, second, pairs, [Verdict(v) for v in data["votes"]], [*map(int, data["seen"])])
        except (TypeError, KeyError, ValueError, IndexError):
            return None

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

    def adapters(self) -> list[Adapter]:
        labels = self.read(ADAPTERS)
        if not isinstance(labels, dict):
            return []
        paths = {digest: self.folder / "adapters" / f"{digest}.safetensors" for digest in labels}
        return [Adapter(labels[d], str(p), d) for d, p in paths.items() if isinstance(labels[d], str) and p.is_file()]


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
