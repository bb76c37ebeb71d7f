"""Command line and `--config` file to `DreamBoothOptions`, and options as earlier versions recorded them."""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...utils.option_parser import Given, Reader, parse_file
from ...utils.problems import BadInput
from .answers import NOT_SUPPORTED, answer
from .dreambooth import DreamBoothOptions
from .model import FAMILY_TITLES
from .peers import translate
from .peers.kohya_dataset import is_datasets, read_datasets

PROGRAM = "train_dreambooth_reslora.py"
EARLIER_NAMES = {"clip_skip": "skip_clip_layers", "frugal_layers": "low_memory_layers"}  # in recorded options


@cache
def reader() -> Reader:
    return Reader(DreamBoothOptions, PROGRAM, answer, FAMILY_TITLES)


def known_flags() -> list[str]:
    return sorted(reader().flags)


def read_config(path: Path, options: DreamBoothOptions) -> Given:
    """Options in a configuration file, ours or another trainer's; raises `BadInput` if it is none."""
    config = parse_file("--config", path)
    if not isinstance(config, dict):
        raise BadInput([f"--config {path}: got {type(config).__name__}, wanted options by name"])
    if (found := translate(config, path)) is not None:
        options.notes += found.lines()
        given = reader().mapping(found.values)
        options.translated |= given.values.keys()
        options.of_families = found.of_families
        given.problems = [f"--config {path}: {problem}" for problem in (*found.problems, *given.problems)]
        return given
    if isinstance(config.get("options"), dict) and "command" in config:  # the `run.json` of an earlier run
        config = renamed_since(config["options"])
    return reader().mapping(config, ignored=NOT_SUPPORTED)


def renamed_since(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded options under the names that they have now."""
    options = dict(recorded)
    if "validation_guidance_scale" not in options:  # `guidance_scale` meant that of images, for every model
        options["validation_guidance_scale"] = options.pop("guidance_scale", None)
    if options.get("method") == "reslora" and options.get("shortcut") is None:  # before `block` was the default
        options["shortcut"] = "input"
    return {EARLIER_NAMES.get(name, name): value for name, value in options.items()}


def stored_options(recorded: Mapping[str, Any]) -> DreamBoothOptions:
    """Options that a checkpoint holds; those that it is older than have their defaults."""
    options = DreamBoothOptions()
    options.update(reader().mapping(renamed_since(recorded), ignored=NOT_SUPPORTED).values)
    return options


def parse(argv: Sequence[str] | None = None) -> DreamBoothOptions:
    """Options from a command line (by default that of the program) and from its `--config` file.

    Raises:
        BadInput: the file cannot be read; said together with what is wrong with the command line.
    """
    given, options = reader().command_line(argv), DreamBoothOptions()
    if path := given.values.get("config"):
        try:
            file = read_config(path, options)
        except BadInput as error:
            raise BadInput([*error.problems, *given.problems]) from error
        options.update(file.values)
        options.problems += file.problems
    options.update(given.values)
    options.translated -= given.values.keys()
    options.problems += given.problems
    take_datasets(options)
    options.local_rank = int(os.environ.get("LOCAL_RANK", options.local_rank))
    if options.upcast_before_saving and "save_precision" not in options.given:
        options.save_precision = "fp32"
    if options.use_aspect_ratio_buckets and not options.aspect_ratio_buckets:
        options.update({"aspect_ratio_buckets": "auto"})
    return options


def take_datasets(options: DreamBoothOptions) -> None:
    """Take the settings of a kohya dataset file, given as `--concepts`, that all concepts share and no option sets."""
    if not options.concepts or options.translated & {"concepts"}:
        return
    try:
        content = parse_file("--concepts", options.concepts)
        if not is_datasets(content):
            return
        found = read_datasets(content, f"--concepts {options.concepts}")
    except BadInput:
        return  # `concepts_of` raises it
    own = reader().mapping({name: value for name, value in found.options.items() if name not in options.given})
    options.update(own.values)
    options.translated |= own.values.keys()
    options.problems += own.problems
    options.notes += [f"  NOT USED: {name}: {reason}" for name, reason in found.not_used.items()]


def override(options: DreamBoothOptions, words: Sequence[str]) -> Given:
    """Change options by words of a command line; returns what the words say, and what is wrong with them."""
    given = reader().command_line(words)
    options.update(given.values)
    return given
