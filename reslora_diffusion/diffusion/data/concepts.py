"""The concepts that a run teaches: one, or several.

    instance images, each with its caption or the instance prompt, trained on `repeats` times a pass
    class images, each with its caption or the class prompt; none without prior preservation

They come from the command line (`--instance_data_dir` or `--dataset_name`, ...), from a list of such options
(`--concepts`), or from folders named as kohya's scripts want them: a data folder that holds `10_sks dog` and
`4_sks cat` is two concepts, 10 and 4 repeats, with the prompts "sks dog" and "sks cat".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...utils.option_parser import parse_file
from ...utils.options import bounds, facts_of, in_bounds
from ...utils.problems import BadInput, listing, refuse
from ..options import DreamBoothOptions
from ..options.peers import ai_toolkit, onetrainer
from ..options.peers.kohya_dataset import is_datasets, read_datasets
from .buckets import Buckets
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
# Options that a concept may have for itself; what it does not say is the run's.
OWN = {
    "resolution": int,
    "aspect_ratio_buckets": str,
    "min_bucket_reso": int,
    "max_bucket_reso": int,
    "bucket_reso_steps": int,
    "bucket_no_upscale": bool,
    "center_crop": bool,
    "random_flip": bool,
    "shuffle_caption": bool,
    "keep_tokens": int,
    "keep_tokens_separator": str,
    "caption_separator": str,
    "secondary_separator": str,
    "caption_tag_dropout_rate": float,
    "token_warmup_step": float,
    "token_warmup_min": int,
    "enable_wildcard": bool,
    "caption_prefix": str,
    "caption_suffix": str,
}
FACTS = facts_of(DreamBoothOptions)
REPEATED_FOLDER = re.compile(r"(\d+)_(.+)")


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
    own: Mapping[str, Any] = field(default_factory=dict)  # options of its own, by name
    buckets: Buckets | None = None  # the sizes that it is trained at, once the model is known
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
        """The number of images that one pass shows."""
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
    if is_datasets(entries):
        entries = read_datasets(entries, f"--concepts {path}").concepts
    elif ai_toolkit.process_of(entries):
        entries = ai_toolkit.entries(entries)
    elif onetrainer.is_concepts(entries):
        entries = onetrainer.entries(entries)
    if isinstance(entries, dict) and entries.keys() == {"concepts"}:
        entries = entries["concepts"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise BadInput([f"--concepts {path}: wanted a list of concepts, each with some of {', '.join(KINDS)}"])
    refuse(entry_problems(f"--concepts {path}", entries))
    return entries


def entry_problems(source: str, entries: list[dict[str, Any]]) -> list[str]:
    """Problems with the keys and values of entries that `source` names."""
    problems, kinds = [], KINDS | OWN
    for number, entry in enumerate(entries, 1):
        where = f"{source}, concept {number}"
        problems += [f"{where}: unknown key {key!r}; wanted {', '.join(kinds)}" for key in entry if key not in kinds]
        problems += [
            f"{where}: {key} is {entry[key]!r}, wanted {kind.__name__}"
            for key, kind in kinds.items()
            if key in entry and type(entry[key]) not in ((int, float) if kind is float else (kind,))
        ]
        problems += [
            f"{where}: {key} is {entry[key]!r}, wanted {bounds(FACTS[key])}"
            for key in kinds
            if type(entry.get(key)) in (int, float) and not in_bounds(entry[key], FACTS[key])
        ]
        if isinstance(extension := entry.get("caption_extension"), str):
            problems += extension_problems(f"{where}, caption_extension", extension)
        if "instance_data_dir" not in entry:
            problems.append(f"{where}: instance_data_dir is missing")
    return problems


def concepts_of(options: DreamBoothOptions) -> list[Concept]:
    """Every concept of a run, its folders looked at. Problems of folders and prompts are in the concepts."""
    entries: list[dict[str, Any]] = [{}] if options.instance_data_dir else []
    if options.concepts:
        entries = read_concepts(Path(options.concepts))
    elif options.dataset_name and not options.instance_data_dir:
        entries = [{"instance_data_dir": str(images_of_dataset(options))}]
    concepts: list[Concept] = []
    folder, extension = options.validation_data_dir, options.caption_extension.lower()
    apart = scan(Path(folder), extension) if folder else None
    for entry in entries:
        complete = {key: entry.get(key, getattr(options, key)) for key in KINDS}
        own = {key: entry[key] for key in OWN if key in entry}
        settings = options_of(own, options)
        concepts += [
            in_words(replace(concept, own=own, validation=apart), settings.caption_prefix, settings.caption_suffix)
            for concept in expand(complete, options.with_prior_preservation)
        ]
    return [replace(concept, held_out=chosen(concept.instance, options.validation_split)) for concept in concepts]


def options_of(own: Mapping[str, Any], options: DreamBoothOptions) -> DreamBoothOptions:
    """The options of a run as a concept has them."""
    return options.changed(**own) if own else options


def in_words(concept: Concept, prefix: str | None, suffix: str | None) -> Concept:
    """A concept with words before and after every caption and prompt, as in kohya's scripts."""
    if not prefix and not suffix:
        return concept

    def whole(text: str | None) -> str | None:
        return " ".join(filter(None, (prefix, text, suffix))) if text else text

    def found(part: Scan | None) -> Scan | None:
        return part and replace(part, images=[replace(p, caption=whole(p.caption)) for p in part.images])

    instance = found(concept.instance)
    assert instance is not None, "a concept has images"
    prompts = whole(concept.instance_prompt), whole(concept.class_prompt)
    return replace(
        concept,
        instance=instance,
        classes=found(concept.classes),
        validation=found(concept.validation),
        instance_prompt=prompts[0],
        class_prompt=prompts[1],
    )


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
    named = [(path, REPEATED_FOLDER.fullmatch(path.name)) for path in inner]
    return [(path, int(match[1]), match[2].strip()) for path, match in named if match and int(match[1])]
