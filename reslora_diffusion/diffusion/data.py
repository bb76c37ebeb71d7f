"""What a folder of pictures holds, before a model is loaded.

`scan` sorts every entry of a folder into pictures, stray files (skipped, but named) and problems. A file is a picture
if its name says so and it decodes; one whose name says so and that does not decode is a problem, not a stray.

Captions, in order of precedence: `metadata.jsonl` ({"file_name": ..., "text": ...} per line), `<picture's stem>.txt`
beside the picture, the prompt given for the whole folder.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from .problems import listing

PICTURE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
METADATA_FILE = "metadata.jsonl"


@dataclass(frozen=True)
class Picture:
    """A picture that decodes, upright size `(width, height)`, with its caption if it has one of its own."""

    path: Path
    size: tuple[int, int]
    digest: str
    caption: str | None = None


@dataclass
class Scan:
    """Everything found in one folder. `problems` is empty if it can be trained on."""

    folder: Path
    pictures: list[Picture] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def duplicates(self) -> list[list[str]]:
        """Names of pictures with equal bytes."""
        groups: dict[str, list[str]] = {}
        for picture in self.pictures:
            groups.setdefault(picture.digest, []).append(picture.path.name)
        return [names for names in groups.values() if len(names) > 1]

    def smaller_than(self, resolution: int) -> list[str]:
        """Pictures that have to be enlarged."""
        return [picture.path.name for picture in self.pictures if min(picture.size) < resolution]

    @property
    def uncaptioned(self) -> list[str]:
        return [picture.path.name for picture in self.pictures if picture.caption is None]


def scan(folder: Path, *, may_be_empty: bool = False) -> Scan:
    """Look at every entry of `folder` in the order of names.

    Args:
        may_be_empty: for class pictures, which are made when they are missing.
    """
    found = Scan(folder)
    if not folder.is_dir():
        if not may_be_empty or folder.exists():
            found.problems.append(f"{folder} is {'not a folder' if folder.exists() else 'missing'}; wanted pictures")
        return found
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        found.problems.append(f"{folder} cannot be read: {error.strerror}")
        return found
    unreadable = {}
    for path in entries:
        if path.name.startswith("."):
            found.skipped[path.name] = "hidden"
        elif path.is_dir():
            found.skipped[path.name] = "a folder"
        elif path.suffix.lower() in PICTURE_SUFFIXES:
            try:
                found.pictures.append(look_at(path))
            except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
                unreadable[path.name] = str(error)
        elif path.name != METADATA_FILE and path.suffix.lower() != ".txt":
            found.skipped[path.name] = "not a picture"
    if unreadable:
        reasons = [f"{name} ({reason})" for name, reason in unreadable.items()]
        found.problems.append(f"{folder} holds {len(unreadable)} unreadable pictures: {listing(reasons)}")
    add_captions(found, entries)
    if not found.pictures and not unreadable and not may_be_empty:
        seen = f"only {listing(found.skipped)}" if found.skipped else "nothing"
        found.problems.append(f"{folder} holds {seen}; wanted pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return found


def look_at(path: Path) -> Picture:
    """Decode a picture for its upright size; raises what PIL raises if it does not decode."""
    with Image.open(path) as image:
        image.load()
        size = ImageOps.exif_transpose(image).size
    return Picture(path, size, hashlib.sha256(path.read_bytes()).hexdigest())


def add_captions(found: Scan, entries: list[Path]) -> None:
    """Give pictures their captions; captions of pictures that are not there are problems."""
    names = {picture.path.name for picture in found.pictures}
    stems = {picture.path.stem for picture in found.pictures}
    texts = {path.stem: path for path in entries if path.suffix.lower() == ".txt" and not path.name.startswith(".")}
    orphans = [texts[stem].name for stem in texts if stem not in stems]
    if len(orphans) == len(texts):
        found.skipped |= dict.fromkeys(orphans, "not a picture, and no picture has this name")
    elif orphans:
        found.problems.append(f"{found.folder} has captions without a picture: {listing(orphans)}")
    captions = {stem: texts[stem].read_text(encoding="utf-8").strip() for stem in texts.keys() & stems}
    rows: dict[str, str] = {}
    metadata = found.folder / METADATA_FILE
    if metadata.is_file():
        for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else None
                rows |= {row["file_name"]: row["text"].strip()} if row else {}
            except (ValueError, KeyError, TypeError, AttributeError):
                found.problems.append(
                    f'{metadata}, line {number}: got {line[:60]!r}, wanted {{"file_name": ..., "text": ...}}'
                )
        if absent := rows.keys() - names:
            found.problems.append(f"{metadata} names pictures that are not there: {listing(sorted(absent))}")
    found.pictures = [
        Picture(p.path, p.size, p.digest, rows.get(p.path.name) or captions.get(p.path.stem) or None)
        for p in found.pictures
    ]


def open_upright(path: Path) -> Image.Image:
    """RGB, turned as its EXIF orientation says; what is transparent becomes white."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def resized(image: Image.Image, resolution: int, mode: Image.Resampling) -> Image.Image:
    """The shorter side becomes `resolution`."""
    width, height = image.size
    ratio = resolution / min(width, height)
    return image.resize((max(resolution, round(width * ratio)), max(resolution, round(height * ratio))), mode)


def crop_boxes(size: tuple[int, int], resolution: int, offsets: list[tuple[float, float]]) -> list[tuple[int, ...]]:
    """A square for each offset `(x, y)` in 0..1 of the room there is; equal squares once."""
    room = [side - resolution for side in size]
    corners = dict.fromkeys(tuple(round(o * r) for o, r in zip(offset, room, strict=True)) for offset in offsets)
    return [(x, y, x + resolution, y + resolution) for x, y in corners]
