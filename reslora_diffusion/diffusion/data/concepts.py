"""What a run teaches: one concept, or several.

    instance images, each with its caption or the instance prompt, seen `repeats` times a pass
    class images, each with its caption or the class prompt; none without prior preservation

They come from the command line (`--instance_data_dir` or `--dataset_name`, ...), from a list of such options
(`--concepts`), or from folders named as kohya's scripts want them: a data folder that holds `10_sks dog` and
`4_sks cat` is two concepts, 10 and 4 repeats, with the prompts "sks dog" and "sks cat".
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...utils.option_parser import parse_file
from ...utils.problems import BadInput, listing
from ..options import DreamBoothOptions
from .hub_dataset import images_of_dataset
from .scan import Scan, ScannedImage, extension_problems, scan

KINDS = {
    "instance_data_dir": str,
    "instance_prompt": str,
    "mask_data_dir": str,
    "class_data_dir": str,
    "class_prompt": str,
    "num_class_images": int,
    "repeats": int,
    "caption_extension": str,
}
KOHYA_FOLDER = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class Concept:
    """A subject and what it is a kind of."""

    instance: Scan
    instance_prompt: str | None = None
    repeats: int = 1
    classes: Scan | None = None
    class_prompt: str | None = None
    num_class_images: int = 0
    held_out: frozenset[str] = frozenset()  # digests
    validation: Scan | None = None  # of a folder of its own

    @property
    def trained(self) -> list[ScannedImage]:
        return [image for image in self.instance.images if image.digest not in self.held_out]

    @property
    def validated(self) -> list[ScannedImage]:
        """Images that are kept from training, to measure on."""
        own = [image for image in self.instance.images if image.digest in self.held_out]
        return [*own, *(self.validation.images if self.validation else ())]

    @property
    def instances(self) -> int:
        """How many images one pass shows."""
        return len(self.trained) * self.repeats

    @property
    def problems(self) -> list[str]:
        problems = self.instance.problems + (self.classes.problems if self.classes else [])
        uncaptioned = self.instance.uncaptioned + (self.validation.uncaptioned if self.validation else [])
        if not self.instance_prompt and uncaptioned:
            without = listing(uncaptioned)
            problems = [*problems, f"--instance_prompt is required: {without} have no caption of their own"]
        if self.validation:
            known = {image.digest for image in self.instance.images}
            both = [image.path.name for image in self.validation.images if image.digest in known]
            twice = f"--validation_data_dir: {listing(both)} are trained on as well; wanted others"
            problems = [*problems, *self.validation.problems, *([twice] if both else [])]
        if self.held_out and not self.trained:
            few = f"wanted two different images or more in {self.instance.folder}, or a smaller share"
            problems = [*problems, f"--validation_split leaves nothing to train on; {few}"]
        if self.classes and not self.class_prompt:
            bare, missing = self.classes.uncaptioned, self.num_class_images > len(self.classes.images)
            if bare or missing:
                reason = f"{listing(bare)} have no caption of their own" if bare else "there are images to be made"
                problems = [*problems, f"--with_prior_preservation needs --class_prompt: {reason}"]
        return problems


def read_concepts(path: Path) -> list[dict[str, Any]]:
    """Entries of a `--concepts` file: a list, or a mapping with the one key `concepts` (TOML knows no bare list).

    Raises:
        BadInput: every key that is unknown and every value of a wrong kind.
    """
    entries = parse_file("--concepts", path)
    if isinstance(entries, dict) and entries.keys() == {"concepts"}:
        entries = entries["concepts"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise BadInput([f"--concepts {path}: wanted a list of concepts, each with some of {', '.join(KINDS)}"])
    problems = []
    for number, entry in enumerate(entries, 1):
        where = f"--concepts {path}, concept {number}"
        problems += [f"{where}: unknown key {key!r}; wanted {', '.join(KINDS)}" for key in entry if key not in KINDS]
        problems += [
            f"{where}: {key} is {entry[key]!r}, wanted {kind.__name__}"
            for key, kind in KINDS.items()
            if key in entry and (type(entry[key]) is not kind or (kind is int and entry[key] < 1))
        ]
        if isinstance(extension := entry.get("caption_extension"), str):
            problems += extension_problems(f"{where}, caption_extension", extension)
        if "instance_data_dir" not in entry:
            problems.append(f"{where}: instance_data_dir is missing")
    if problems:
        raise BadInput(problems)
    return entries


def concepts_of(options: DreamBoothOptions) -> list[Concept]:
    """Every concept of a run, its folders looked at. Problems of folders and prompts are in the concepts."""
    entries: list[dict[str, Any]] = [{}] if options.instance_data_dir else []
    if options.concepts:
        entries = read_concepts(Path(options.concepts))
    elif options.dataset_name and not options.instance_data_dir:
        entries = [{"instance_data_dir": str(images_of_dataset(options))}]
    complete = [{key: entry.get(key, getattr(options, key)) for key in KINDS} for entry in entries]
    concepts = [concept for entry in complete for concept in expand(entry, options.with_prior_preservation)]
    folder, extension = options.validation_data_dir, options.caption_extension.lower()
    apart = scan(Path(folder), extension) if folder else None
    return [
        replace(concept, held_out=chosen(concept.instance, options.validation_split), validation=apart)
        for concept in concepts
    ]


def chosen(found: Scan, share: float) -> frozenset[str]:
    """Digests of a share of the images: the same ones whatever the seed, and equal images together."""
    digests = sorted({image.digest for image in found.images})
    return frozenset(digests[: max(1, round(share * len(digests)))] if share > 0 else ())


def expand(entry: dict[str, Any], with_prior_preservation: bool) -> list[Concept]:
    """The concept of an entry; several if its folder holds no images but folders that are named as kohya wants."""
    folder, captions = Path(entry["instance_data_dir"]), entry["caption_extension"].lower()
    masks = Path(entry["mask_data_dir"]) if entry["mask_data_dir"] else None
    classes, wanted = None, 0
    if with_prior_preservation and entry["class_data_dir"]:
        classes, may_grow = class_images(Path(entry["class_data_dir"]), captions)
        wanted = entry["num_class_images"] if may_grow else len(classes.images)
    whole = Concept(
        scan(folder, captions, masks=masks),
        entry["instance_prompt"],
        entry["repeats"],
        classes,
        entry["class_prompt"],
        wanted,
    )
    named = [] if whole.instance.images else kohya_folders(folder)
    return [
        replace(whole, instance=scan(inner, captions, masks=masks), instance_prompt=prompt, repeats=repeats)
        for inner, repeats, prompt in named
    ] or [whole]


def class_images(folder: Path, captions: str) -> tuple[Scan, bool]:
    """Images of the class, and whether missing ones may be made there: not between kohya's folders."""
    found, named = scan(folder, captions, may_be_empty=True), kohya_folders(folder)
    if found.images or not named:
        return found, True
    whole = Scan(folder)
    for inner, _, prompt in named:
        part = scan(inner, captions)
        whole.images += [replace(image, caption=image.caption or prompt) for image in part.images]
        whole.skipped |= {f"{inner.name}/{name}": reason for name, reason in part.skipped.items()}
        whole.problems += part.problems
    return whole, False


def kohya_folders(folder: Path) -> list[tuple[Path, int, str]]:
    """`(folder, repeats, prompt)` of the folders in `folder` that are named so."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    named = [(path, KOHYA_FOLDER.fullmatch(path.name)) for path in inner]
    return [(path, int(match[1]), match[2].strip()) for path, match in named if match and int(match[1])]
