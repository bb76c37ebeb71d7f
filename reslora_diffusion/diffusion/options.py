"""The command line of DreamBooth training, made of `flags`.

Nothing here imports torch, so `--help` and a bad command line answer at once. Order of authority: command line,
`--config` file, the defaults of the flags.
"""

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn

from ..problems import BadInput
from .concepts import parse_file
from .flags import add_diffusers_flags, add_our_flags, add_sibling_flags


class Parser(argparse.ArgumentParser):
    """Reports its own findings as `BadInput`, so that they leave by the same door as the others."""

    def error(self, message: str) -> NoReturn:
        raise BadInput([message])


class Formatter(argparse.HelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, False, argparse.SUPPRESS, [])
        return action.help if silent else f"{action.help or ''} (default: %(default)s)"


def build_parser() -> Parser:
    parser = Parser(
        prog="train_dreambooth_reslora.py",
        description="Teach a Stable Diffusion pipeline a subject by LoRA or ResLoRA, and export a standard LoRA.",
        allow_abbrev=False,
        formatter_class=Formatter,
    )
    add_diffusers_flags(parser)
    add_sibling_flags(parser)
    add_our_flags(parser)
    return parser


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a configuration file."""
    config = parse_file("--config", path)
    if not isinstance(config, dict):
        raise BadInput([f"--config {path}: got {type(config).__name__}, wanted options by name"])
    if isinstance(config.get("options"), dict) and "command" in config:  # the `run.json` of an earlier run
        return config["options"]
    return config


def as_words(config: dict[str, Any]) -> list[str]:
    """The command line that says the same, so that a file goes through the same checks."""
    words = []
    for name, value in config.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):
            words += [f"--{name}", *(f"{key}={inner}" for key, inner in value.items())] if value else []
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options; `args.unknown` holds the words that are no option."""
    parser = build_parser()
    file = parser.parse_known_args(argv)[0].config
    args, unknown_in_file = parser.parse_known_args(as_words(read_config(file)) if file else [])
    args, unknown = parser.parse_known_args(argv, namespace=args)
    args.unknown = unknown_in_file + unknown
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    return args


def known_flags() -> list[str]:
    return [flag for action in build_parser()._actions for flag in action.option_strings]
