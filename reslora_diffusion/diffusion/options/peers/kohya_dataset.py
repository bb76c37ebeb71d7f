"""Datasets of kohya's scripts: [general], [[datasets]] and [[datasets.subsets]], as concepts and options here.

A value is that of the subset, else of its dataset, else of [general], else of the program's own options.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....utils.problems import BadInput
from ..answers import NOT_HERE
from ..data import READ_AS_TAGS
from .translation import is_off

STEP = 8  # of sides in pixels, for every model
ROUND = 16  # of the square that has as many pixels, which every family takes
# Of a dataset's buckets in kohya's scripts.
BUCKET_DEFAULTS = {"min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64}
KEPT = ("keep_tokens", "keep_tokens_separator")
# Name of an option of a subset -> name here, for those that a concept may have for itself.
OWN = {
    "image_dir": "instance_data_dir",
    "class_tokens": "instance_prompt",
    "num_repeats": "repeats",
    "caption_extension": "caption_extension",
    "conditioning_data_dir": "mask_data_dir",
    "shuffle_caption": "shuffle_caption",
    "flip_aug": "random_flip",
    **{
        name: name
        for name in (
            *(*KEPT, "caption_separator", "secondary_separator", "caption_tag_dropout_rate", "enable_wildcard"),
            *("token_warmup_step", "token_warmup_min"),
        )
    },
    "caption_prefix": "caption_prefix",
    "caption_suffix": "caption_suffix",
}
# The same for those that all concepts of a run share.
SHARED = {
    "batch_size": "train_batch_size",
    "caption_dropout_rate": "caption_dropout_rate",
    "caption_dropout_every_n_epochs": "caption_dropout_every_n_epochs",
    "validation_split": "validation_split",
    "resize_interpolation": "image_interpolation_mode",
    "alpha_mask": "alpha_mask",
}
SIZES = ("resolution", "enable_bucket", "bucket_no_upscale", *BUCKET_DEFAULTS)
OTHERS = ("subsets", "is_reg", "random_crop", "cache_info", "validation_seed")
ANSWERED = {*OWN, *SHARED, *SIZES, *OTHERS}
# Keys that have no counterpart, beside those that `answers` has.
WITHOUT = {
    "metadata_file": "captions stand in metadata.jsonl or beside the images",
    "custom_attributes": "images have no options of their own",
    "network_multiplier": "the adapter has its full strength for all images",
    **{name: NOT_HERE[name] for name in ("color_aug", "face_crop_aug_range")},
}
SAME_HERE = (("network_multiplier", 1),)
UNKNOWN = "no such key is known of kohya's datasets"


@dataclass(frozen=True)
class Datasets:
    """Concepts as `--concepts` holds them, options that all of them share, and what was not used."""

    concepts: list[dict[str, Any]]
    options: dict[str, Any]
    not_used: dict[str, str]


def is_datasets(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("datasets"), list)


def area_of(resolution: Any) -> tuple[int, int]:
    """Width and height of kohya's `resolution`: 512, "512", "512,768" or [512, 768]; raises `ValueError`."""
    parts = resolution.split(",") if isinstance(resolution, str) else resolution
    parts = parts if isinstance(parts, (list, tuple)) else [parts]
    numbers = [re.fullmatch(r"\s*(\d+)(\.0*)?\s*", str(part)) for part in parts]
    sides = [int(number[1]) for number in numbers if number]
    if len(sides) != len(parts) or len(sides) not in (1, 2) or min(sides) < STEP:
        raise ValueError(f'got {resolution!r}, wanted a number of pixels, or two such as "768,512" (width, height)')
    return sides[0], sides[-1]


def sizes(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options here for the sizes of images, and remarks; raises `ValueError`."""
    width, height = area_of(given.get("resolution", 512))
    side = width if width == height else math.isqrt(width * height) // ROUND * ROUND
    options: dict[str, Any] = {"resolution": max(STEP, side // STEP * STEP)}
    if given.get("enable_bucket"):
        limits = {name: given.get(name) or default for name, default in BUCKET_DEFAULTS.items()}
        options |= {"aspect_ratio_buckets": "auto", **{name: int(value) for name, value in limits.items()}}
        options["max_bucket_reso"] = max(options["max_bucket_reso"], width, height)
        options |= {"bucket_no_upscale": True} if given.get("bucket_no_upscale") else {}
    elif width != height:
        fitting = [side // STEP * STEP for side in (height, width)]
        options["aspect_ratio_buckets"] = f"{fitting[0]},{fitting[1]}"
    cut = [side for side in (width, height) if side % STEP]
    return options, [f"{width}x{height} is cut to multiples of {STEP}"] if cut else []


def read_datasets(content: Mapping[str, Any], where: str, program: Mapping[str, Any] | None = None) -> Datasets:
    """Concepts and options of a file of datasets.

    Args:
        program: options of the program, under kohya's names.

    Raises:
        BadInput: every subset that cannot be read.
    """
    concepts, shared, not_used, problems = list[dict[str, Any]](), dict[str, list[Any]](), dict[str, str](), list[str]()
    general = content.get("general") or {}
    for number, dataset in enumerate(content["datasets"], 1):
        subsets = dataset.get("subsets") if isinstance(dataset, dict) else None
        if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
            problems.append(f"{where}, dataset {number}: wanted [[datasets.subsets]], each with an image_dir")
            continue
        every = [{**(program or {}), **general, **dataset, **subset} for subset in subsets]
        levels = [level for level in every if not is_for_validation(level)]
        if len(levels) < len(every):
            not_used["validation_split"] = "subsets of validation images alone are left out, and not trained on"
        try:
            of_dataset = [*concepts_of_dataset(levels, f"{where}, dataset {number}", problems)]
        except ValueError as error:
            problems.append(f"{where}, dataset {number}, resolution: {error}")
            continue
        concepts += of_dataset
        for level in levels:
            for name, ours in SHARED.items():
                shared.setdefault(ours, []).append(level.get(name))
        for name, value in {k: v for part in (general, dataset, *subsets) for k, v in part.items()}.items():
            if name not in ANSWERED and not is_off(value) and (name, value) not in SAME_HERE:
                not_used[name] = WITHOUT.get(name, UNKNOWN)
    options = {}
    for ours, values in shared.items():
        said = [value for value in values if value is not None]
        if said:
            options[ours] = max(said, key=said.count)
        if len({repr(value) for value in said}) > 1:
            not_used[ours] = f"subsets differ in it ({', '.join(map(repr, said))}); {options[ours]!r} is used for all"
    if options.get("alpha_mask") or any("mask_data_dir" in concept for concept in concepts):
        options["masked_mean"] = "image"
    if any("class_data_dir" in concept for concept in concepts):
        options["with_prior_preservation"] = True
    if problems or not concepts:
        raise BadInput(problems or [f"{where}: wanted a subset with images to train on"])
    return Datasets(concepts, options, not_used)


def is_for_validation(level: Mapping[str, Any]) -> bool:
    """Return whether all images of a subset are held out."""
    share = level.get("validation_split")
    return isinstance(share, int | float) and share >= 1


def concepts_of_dataset(
    levels: Sequence[Mapping[str, Any]], where: str, problems: list[str]
) -> Iterator[dict[str, Any]]:
    """A concept for each subset; subsets of regularisation images are the class images of all others."""
    plain = [level for level in levels if not level.get("is_reg")]
    classes = [level for level in levels if level.get("is_reg")]
    if len(classes) > 1:
        problems.append(f"{where}: got {len(classes)} subsets with is_reg, wanted at most one: join their folders")
    for number, level in enumerate(plain, 1):
        for missing in [name for name in ("image_dir",) if not level.get(name)]:
            reason = "captions of a metadata_file are not read; wanted them beside the images, and "
            problems.append(f"{where}, subset {number}: {reason if level.get('metadata_file') else ''}{missing}")
        own = {ours: level[name] for name, ours in OWN.items() if not is_off(level.get(name))}
        own |= {
            "caption_extension": level.get("caption_extension", ".caption"),
            "center_crop": not level.get("random_crop"),
        }
        if not any(own.get(name) for name in READ_AS_TAGS):
            own = {name: value for name, value in own.items() if name not in KEPT}
        if classes:
            own["class_data_dir"] = classes[0].get("image_dir")
            own |= {"class_prompt": tokens} if (tokens := classes[0].get("class_tokens")) else {}
        yield own | sizes(level)[0]
