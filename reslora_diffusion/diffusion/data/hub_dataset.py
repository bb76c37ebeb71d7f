"""Images and captions of a dataset of the hub (`--dataset_name`), as a folder of images like any other.

    rows of the split "train"  ->  <cache>/reslora_images/<fingerprint>/00000.png, ..., and metadata.jsonl

The folder is made once for each state of the dataset and choice of columns. Names and meanings of the options are those
of diffusers' SDXL, SD3 and Flux scripts.
"""

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...utils.files import replace_folder
from ...utils.hub import unreachable
from ...utils.images import UNREADABLE, known_formats
from ...utils.problems import BadInput, first_line, listing, refuse
from ..options import DreamBoothOptions
from .scan import IMAGE_SUFFIXES, METADATA_FILE

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = "reslora_images"
SPLIT = "train"
TEXT = ("string", "large_string")


def dataset_options(options: DreamBoothOptions) -> Iterator[str]:
    """Options of a dataset that do not go together."""
    if options.dataset_name is None:
        for name in ("dataset_config_name", "image_column", "caption_column"):
            if getattr(options, name) is not None:
                yield f"--{name} is used only with --dataset_name"
        return
    if options.instance_data_dir or options.concepts:
        yield "--dataset_name and --instance_data_dir or --concepts both say what to train on; wanted one of them"
    if options.mask_data_dir:
        yield "--mask_data_dir goes by the names of images in a folder; got --dataset_name"


def images_of_dataset(options: DreamBoothOptions) -> Path:
    """The folder; raises `BadInput` if there is no such dataset or column."""
    if find_spec("datasets") is None:
        raise BadInput(["--dataset_name needs the package datasets: pip install datasets"])
    assert options.dataset_name is not None, "asked only of a run with one"
    name = options.dataset_name
    why = None if Path(name).exists() else unreachable()
    import datasets

    try:
        rows = datasets.load_dataset(name, options.dataset_config_name, split=SPLIT, cache_dir=options.cache_dir)
    except Exception as error:  # of the hub, the file system, the formats that a dataset may have
        reason = f"it is not on this machine, and {why}" if why else first_line(error)
        raise BadInput([f"--dataset_name {name} cannot be loaded: {reason}"]) from error
    image, caption = columns(rows, options)
    cache = Path(options.cache_dir or datasets.config.HF_DATASETS_CACHE) / FOLDER
    key = hashlib.sha256(json.dumps([rows._fingerprint, image, caption]).encode()).hexdigest()[:24]
    if not (cache / key).is_dir():
        from huggingface_hub.constants import HF_HUB_CACHE

        cache.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=cache, prefix=f".{key}-"))
        try:
            downloads = [
                Path(place, "downloads") for place in (options.cache_dir, datasets.config.HF_DATASETS_CACHE) if place
            ]
            own = [Path(name), Path(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}"), *downloads]
            write_images(rows, image, caption, fresh, own)
            if not (cache / key).is_dir():  # another process may have been as quick
                replace_folder(fresh, cache / key)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return cache / key


def columns(rows: "Dataset", options: DreamBoothOptions) -> tuple[str, str | None]:
    """The column of images (by default `image`, else the first that holds images) and that of captions, if any.

    Raises:
        BadInput: a column that is not there or holds something else.
    """
    import datasets

    kinds: dict[str, Any] = rows.features
    images = [column for column, kind in kinds.items() if isinstance(kind, datasets.Image)]
    problems = []
    for option in ("image_column", "caption_column"):
        column = getattr(options, option)
        if column is not None and column not in kinds:
            problems.append(f"--{option}: {options.dataset_name} has no column {column!r}; it has {listing(kinds)}")
    if options.image_column in kinds and options.image_column not in images:
        problems.append(f"--image_column: {options.image_column!r} holds no images; wanted {listing(images) or 'some'}")
    if options.caption_column in kinds and getattr(kinds[options.caption_column], "dtype", None) not in TEXT:
        problems.append(
            f"--caption_column: {options.caption_column!r} holds {kinds[options.caption_column]}; wanted text"
        )
    if not images and not problems:
        problems.append(f"--dataset_name: {options.dataset_name} has no column of images; it has {listing(kinds)}")
    refuse(problems)
    return options.image_column or ("image" if "image" in images else images[0]), options.caption_column


def write_images(rows: "Dataset", image: str, caption: str | None, folder: Path, own: Sequence[Path]) -> None:
    """The files as they are in the dataset, and `metadata.jsonl` if there are captions.

    Args:
        own: folders that rows may name files of: the dataset's, and the caches that it was downloaded to.

    Raises:
        BadInput: rows without an image, or that name a file elsewhere.
    """
    import datasets

    lines, empty, foreign = [], [], []
    places = [place.resolve() for place in own if place.is_dir()]
    rows = rows.select_columns([image] if caption is None else [image, caption])  # others are not even decoded
    for number, row in enumerate(rows.cast_column(image, datasets.Image(decode=False))):
        if row[image] is None:
            empty.append(number)
            continue
        data = row[image]["bytes"]
        if data is None:
            path = own_file(row[image]["path"] or "", places)
            if path is None:
                foreign.append(f"{row[image]['path']!r} in row {number}")
                continue
            data = path.read_bytes()
        name = f"{number:05d}{suffix_of(data)}"
        (folder / name).write_bytes(data)
        if caption is not None and (row[caption] or "").strip():
            lines.append(json.dumps({"file_name": name, "text": row[caption]}))
    problems = [f"--image_column: rows without an image in {image!r}: {listing(empty)}"] if empty else []
    if foreign:
        problems.append(
            "--dataset_name: a dataset may name files of its own folder alone, no others and no addresses; "
            f"got {listing(foreign)}"
        )
    refuse(problems)
    if lines:
        (folder / METADATA_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def own_file(name: str, places: Sequence[Path]) -> Path | None:
    """The file of that name, if there is one and it lies in one of the places."""
    try:
        path = Path(name).resolve()
        return path if path.is_file() and any(path.is_relative_to(place) for place in places) else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def suffix_of(data: bytes) -> str:
    """The file suffix of an image's format. Readers go by content; a phone's MPO is a JPEG with more in it."""
    try:
        with Image.open(io.BytesIO(data), formats=known_formats()) as image:
            suffix = f".{image.format}".lower()
    except UNREADABLE:  # will be named when the folder is looked at
        suffix = ".png"
    return suffix if suffix in IMAGE_SUFFIXES else ".jpg"
