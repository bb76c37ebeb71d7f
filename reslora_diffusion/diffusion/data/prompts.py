"""Validation prompts, each with settings of its own: a file of them as kohya's scripts read it.

    a dog in a bucket --n blurry --w 768 --h 512 --d 42 --s 20 --l 6.5        one a line; a line with # is a remark

    --w --h  width and height in pixels      --d  seed      --s  denoising steps      --n  negative prompt
    --l      guidance of an image (classifier-free)         --g  guidance as an input of FLUX.1-dev

JSON files hold a list of such lines or of objects with kohya's long names; TOML files a table [prompt] whose
[[prompt.subset]] entries override it. No torch in here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...utils.json_lines import lines_of
from ...utils.option_parser import parse_file
from ...utils.problems import BadInput, printable

# Letter of a switch -> kohya's long name of it in JSON and TOML, and what it is.
SWITCHES: dict[str, tuple[str, type]] = {
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("sample_steps", int),
    "l": ("scale", float),
    "g": ("guidance_scale", float),
    "n": ("negative_prompt", str),
}
# Switches of kohya's that choose what the base's own scheduler decides here, or what this training has not.
NOT_USED = {"ss": "sample_sampler", "ctr": "cfg_trunc_ratio", "rcfg": "renorm_cfg", "fs": "flow_shift"}
NOT_USED |= {"cn": "controlnet_image"}
FIELDS = dict(SWITCHES.values())


@dataclass(frozen=True)
class ValidationPrompt:
    """The prompt and settings of an image; None is the run's own setting. `number` counts images of one prompt."""

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    sample_steps: int | None = None
    scale: float | None = None
    guidance_scale: float | None = None
    number: int = 0


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, and the switches in it that are not used."""

    prompts: list[ValidationPrompt]
    not_used: list[str]


def read_prompts(source: str | Path) -> PromptFile:
    """The prompts of a file, or of a text whose lines are such prompts.

    Raises:
        BadInput: every line that does not parse, with the line.
    """
    flag, entries, path = "--sample_prompts", list[tuple[str, Any]](), Path(source)
    source = str(source)
    written = len(lines_of(source)) > 1 or path.suffix.lower() not in (".txt", ".json", ".toml")
    if written or path.suffix.lower() == ".txt":
        try:
            lines = lines_of(source if written else path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput([f"{flag} {path}: {error}"]) from error
        where = flag if written else f"{flag} {path}"
        entries = [
            (f"{where}, line {number}", line.strip())
            for number, line in enumerate(lines, 1)
            if line.strip() and not line.startswith("#")
        ]
    else:
        entries = [(f"{flag} {path}, entry {n}", entry) for n, entry in enumerate(objects_of(flag, path), 1)]
    problems, not_used, found = list[str](), list[str](), list[ValidationPrompt]()
    for where, entry in entries:
        values = of_line(entry) if isinstance(entry, str) else entry
        faults = [*faults_of(values)]
        problems += [f"{where}: {fault} in {printable(entry)!r}" for fault in faults]
        not_used += [f"{where}: {name} is not used" for name in values if name in NOT_USED.values()]
        if not faults:
            known = {name: FIELDS[name](value) for name, value in values.items() if name in FIELDS}
            found.append(ValidationPrompt(str(values["prompt"]).strip(), **known))
    if not entries:
        problems.append(f"{flag} {printable(source, 80)} holds no prompt")
    if problems:
        raise BadInput(problems)
    return PromptFile(found, not_used)


def objects_of(flag: str, path: Path) -> list[Any]:
    """Entries of a JSON or TOML file."""
    content = parse_file(flag, path)
    if isinstance(content, dict) and isinstance(content.get("prompt"), dict):
        common = {name: value for name, value in content["prompt"].items() if name != "subset"}
        subsets = content["prompt"].get("subset", [{}])
        content = [common | subset if isinstance(subset, dict) else subset for subset in subsets]
    if not isinstance(content, list) or not all(isinstance(entry, (str, dict)) for entry in content):
        raise BadInput([f"{flag} {path}: wanted a list of prompts, or a table [prompt] with [[prompt.subset]]"])
    return content


def of_line(line: str) -> dict[str, Any]:
    """Long names and words of a line. A switch that is unknown stands under its own name, as `--q`."""
    prompt, *switches = re.split(r"(?:^|\s)--(?=\S)", line)
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for switch in switches:
        letter, _, word = switch.strip().partition(" ")
        known = SWITCHES[letter.lower()][0] if letter.lower() in SWITCHES else NOT_USED.get(letter.lower())
        values[known or f"--{letter}"] = word.strip()
    return values


def faults_of(values: Mapping[str, Any]) -> Iterator[str]:
    """Problems with the values of one prompt."""
    letters = {name: f"--{letter}" for letter, (name, _) in SWITCHES.items()}
    if not str(values.get("prompt", "")).strip():
        yield "no prompt"
    for name, value in values.items():
        if name.startswith("--"):
            yield f"unknown switch {name} (wanted {', '.join(letters.values())})"
        elif name in FIELDS:
            kind, wanted = FIELDS[name], {int: "a whole number", float: "a number", str: "some words"}
            try:
                number = kind(value)
            except (ValueError, TypeError):
                yield f"{letters[name]} {value!r}, wanted {wanted[kind]}"
                continue
            least = 1 if name in ("width", "height", "sample_steps") else 0
            if kind is not str and number < least:
                yield f"{letters[name]} {value!r}, wanted {least} or more"
        elif name != "prompt" and name not in NOT_USED.values():
            yield f"unknown field {name!r} (wanted prompt, {', '.join(FIELDS)})"
