"""The contents of a folder of images, before a model is loaded.

`scan` sorts every entry of a folder into images, stray files (skipped, but named) and problems. A file is an image
if its name says so and it decodes; one whose name says so and that does not decode is a problem, not a stray.

Captions, in order of precedence: `metadata.jsonl` ({"file_name": ..., "text": ...} per line), `<image's stem>.txt`
beside the image, the prompt given for the whole folder. Masks: a folder of images with the same stems.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from ...utils.images import UnreadableImage, colour_of, read_image, upright_rgb
from ...utils.json_lines import lines_of, parse
from ...utils.problems import listing

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
METADATA_FILE = "metadata.jsonl"
CAPTION_EXTENSIONS = frozenset({".txt", ".caption"})  # by default in diffusers' world, and in kohya's scripts
# By the names that diffusers' scripts take; nearest_exact is torchvision's word for what Pillow calls nearest.
INTERPOLATIONS = {mode.name.lower(): mode for mode in Image.Resampling} | {"nearest_exact": Image.Resampling.NEAREST}


def extension_problems(where: str, extension: str) -> Iterator[str]:
    """Problems with a `caption_extension`."""
    if not re.fullmatch(r"\.\w+", extension) or extension.lower() in IMAGE_SUFFIXES:
        yield f"{where}: got {extension!r}, wanted that of text files, such as .txt"


@dataclass(frozen=True)
class ScannedImage:
    """An image that decodes, upright size `(width, height)`, with its caption and mask if it has one of its own.

    `profile` is the colour profile that it is converted to sRGB from, `colour_fault` says why one is not followed.
    """

    path: Path
    size: tuple[int, int]
    digest: str
    caption: str | None = None
    mask: Path | None = None
    profile: str | None = None
    colour_fault: str | None = None


@dataclass
class Scan:
    """Everything found in one folder. `problems` is empty if it can be trained on."""

    folder: Path
    caption_extension: str = ".txt"
    images: list[ScannedImage] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def duplicates(self) -> list[list[str]]:
        """Names of images with equal bytes."""
        groups: dict[str, list[str]] = {}
        for image in self.images:
            groups.setdefault(image.digest, []).append(image.path.name)
        return [names for names in groups.values() if len(names) > 1]

    @property
    def uncaptioned(self) -> list[str]:
        return [image.path.name for image in self.images if image.caption is None]


def scan(
    folder: Path, caption_extension: str = ".txt", *, may_be_empty: bool = False, masks: Path | None = None
) -> Scan:
    """Look at every entry of `folder` in the order of names.

    Args:
        caption_extension: of the text files that hold captions, with its dot.
        may_be_empty: for class images, which are made when they are missing.
        masks: folder of masks.
    """
    found = Scan(folder, caption_extension)
    if not folder.is_dir():
        if not may_be_empty or folder.exists():
            found.problems.append(f"{folder} is {'not a folder' if folder.exists() else 'missing'}; wanted images")
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
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            try:
                found.images.append(read_image_file(path))
            except (OSError, UnreadableImage) as error:
                unreadable[path.name] = str(error)
        elif path.name != METADATA_FILE and path.suffix.lower() != caption_extension:
            found.skipped[path.name] = "not an image"
    if unreadable:
        reasons = [f"{name} ({reason})" for name, reason in unreadable.items()]
        found.problems.append(f"{folder} holds {len(unreadable)} unreadable images: {listing(reasons)}")
    add_captions(found, entries)
    if masks:
        add_masks(found, masks)
    if not found.images and not unreadable and not may_be_empty:
        seen = f"only {listing(found.skipped)}" if found.skipped else "nothing"
        found.problems.append(f"{folder} holds {seen}; wanted images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def read_image_file(path: Path) -> ScannedImage:
    """Decode an image for its upright size; raises `UnreadableImage` or OSError."""
    upright = read_image(path)
    colour = colour_of(upright)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ScannedImage(path, upright.size, digest, profile=colour.profile, colour_fault=colour.fault)


def add_captions(found: Scan, entries: list[Path]) -> None:
    """Give images their captions; captions of images that are not there are problems."""
    stems = {image.path.stem for image in found.images}
    named = [path for path in entries if path.suffix.lower() == found.caption_extension]
    texts = {path.stem: path for path in named if not path.name.startswith(".")}
    orphans = [texts[stem].name for stem in texts if stem not in stems]
    if len(orphans) == len(texts):
        found.skipped |= dict.fromkeys(orphans, "not an image, and no image has this name")
    elif orphans:
        found.problems.append(f"{found.folder} has captions without an image: {listing(orphans)}")
    captions = {stem: read_text(texts[stem], found) for stem in texts.keys() & stems}
    rows = metadata_rows(found)
    bare = {image.path.stem for image in found.images if image.path.name not in rows} - captions.keys()
    for other in CAPTION_EXTENSIONS - {found.caption_extension}:
        if unread := [path.name for path in entries if path.suffix.lower() == other and path.stem in bare]:
            found.problems.append(
                f"{found.folder} has captions that are not read: {listing(unread)}; wanted --caption_extension "
                f"{other}, or these files elsewhere"
            )
    if absent := rows.keys() - {image.path.name for image in found.images}:
        found.problems.append(
            f"{found.folder / METADATA_FILE} names images that are not there: {listing(sorted(absent))}"
        )
    found.images = [
        replace(image, caption=rows.get(image.path.name) or captions.get(image.path.stem) or None)
        for image in found.images
    ]


def read_text(path: Path, found: Scan) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()  # Windows puts a mark in front
    except (OSError, UnicodeDecodeError) as error:
        found.problems.append(f"{path} is not text in UTF-8: {error}")
        return ""


def metadata_rows(found: Scan) -> dict[str, str]:
    """Captions by file name."""
    path = found.folder / METADATA_FILE
    rows: dict[str, str] = {}
    if not path.is_file():
        return rows
    for number, line in enumerate(lines_of(read_text(path, found)), 1):
        try:
            row = parse(line) if line.strip() else None
            if row and not all(isinstance(row[name], str) for name in ("file_name", "text")):
                raise TypeError
            rows |= {row["file_name"]: row["text"].strip()} if row else {}
        except (ValueError, KeyError, TypeError, AttributeError):
            found.problems.append(f'{path}, line {number}: got {line[:60]!r}, wanted {{"file_name": ..., "text": ...}}')
    return rows


def add_masks(found: Scan, folder: Path) -> None:
    """Give images their masks; a mask of another size than its image is a problem."""
    masks = scan(folder)
    found.problems += masks.problems
    by_stem = {mask.path.stem: mask for mask in masks.images}
    wrong = [
        f"{by_stem[p.path.stem].path.name} is {by_stem[p.path.stem].size}, {p.path.name} is {p.size}"
        for p in found.images
        if p.path.stem in by_stem and by_stem[p.path.stem].size != p.size
    ]
    if wrong:
        found.problems.append(f"{folder} has masks of another size than their images: {listing(wrong)}")
    if absent := by_stem.keys() - {image.path.stem for image in found.images}:
        found.problems.append(f"{folder} has masks of images that are not there: {listing(sorted(absent))}")
    found.images = [replace(p, mask=by_stem[p.path.stem].path) if p.path.stem in by_stem else p for p in found.images]


def open_upright(path: Path) -> Image.Image:
    """RGB in sRGB, turned as its EXIF orientation says; what is transparent becomes white."""
    return upright_rgb(read_image(path))


def open_mask(image: ScannedImage, alpha: bool) -> Image.Image | None:
    """The part of an image that counts, in grey: its mask, or with `alpha` its opacity; None if all of it."""
    upright = read_image(image.mask or image.path)
    if image.mask:
        return upright.convert("L")
    return upright.convert("RGBA").getchannel("A") if alpha and upright.has_transparency_data else None
