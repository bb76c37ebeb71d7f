"""What a LoRA file is, from its header alone: dialect, modules, ranks, precision. No tensor is read, torch not loaded.

    source        a file, or a folder as diffusers, our exporter or PEFT write it
    read_headers  source -> one Header for each file that belongs to it, or one message with every problem found

Files come from strangers. Nothing is unpickled, the header is held against the size of the file before anything is
read, names in it never become paths, and what is not plain LoRA (DoRA, LoHa, LoKr, full differences) is refused by
name.
"""

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .keys import COMPONENTS, Dialect, listing
from .parsing import Key, parse_all, structure_problems

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FOLDER = "kohya"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_METADATA = "lora_adapter_metadata"
UNMERGED = "is an unmerged ResLoRA; merge it (merged_factors), or take its run's export"
LARGEST_CONFIG = 2**20  # bytes; real ones have a few thousand


@dataclass(frozen=True)
class Header:
    """A sound LoRA file before its tensors are read. `configs` holds PEFT configurations by component, where there
    are any; under "" the one that applies to all components."""

    path: Path
    dialect: Dialect
    metadata: dict[str, str]
    keys: dict[str, Key]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    configs: dict[str, dict]

    def modules(self) -> dict[tuple[str, str], dict[str, str]]:
        """(component, path) -> part -> name of its tensor; of two CLIP layouts, the first."""
        found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        for name, key in self.keys.items():
            found[key.component, key.path].setdefault(key.part, name)
        return dict(found)

    def scaling(self, component: str, path: str, rank: int, alpha: float | None) -> float:
        """Scaling of a module: its own alpha first, then a configuration; 1 without either, as every loader has it."""
        if alpha is not None:
            return alpha / rank
        config = self.configs.get(component) or self.configs.get("")
        return stated_scaling(config, path, rank) if config else 1.0


def unusable(path: Path | str, problems: list[str]) -> ValueError:
    """The one message about a file."""
    return ValueError("\n".join([f"{path} cannot be used:", *(f"  - {problem}" for problem in problems)]))


# ------------------------------------------------------------------------------------------------------- files


def open_safetensors(path: Path, framework: str = "pt"):
    """`safetensors.safe_open` on a file that has been looked at first.

    Raises:
        ValueError: not a whole safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)  # length of the header, then its first character
    whole = size > 8 and int.from_bytes(head[:8], "little") <= size - 8 and head[8:] == b"{"
    if not whole and (head[:2] == b"PK" or head[:1] == b"\x80"):
        raise ValueError(f"{path} is a pickle (.bin, .pt, .ckpt); only safetensors files are read, convert it first")
    if not whole:
        raise ValueError(f"{path} is not a safetensors file, or its header is cut off ({size} bytes)")
    try:
        return safe_open(path, framework=framework)
    except SafetensorError as error:
        raise ValueError(f"{path} is a damaged or truncated safetensors file ({size} bytes): {error}") from None


def locate(source: Path) -> Path:
    """The weights in `source`: the file itself, or the first of those that make up a folder."""
    return parts(source)[0][0]


def parts(source: Path) -> list[tuple[Path, str | None]]:
    """Every file of `source`, each with its component where the folder's name says it.

    Raises:
        ValueError: there is no LoRA, or no telling which.
    """
    if source.is_file():
        return [(source, None)]
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    for name in (DIFFUSERS_FILE, PEFT_FILE):
        if (source / name).is_file():
            return [(source / name, None)]
    if split := [(source / c / PEFT_FILE, c) for c in COMPONENTS if (source / c / PEFT_FILE).is_file()]:
        return split
    loose = sorted(source.glob("*.safetensors")) or sorted(source.glob(f"{KOHYA_FOLDER}/*.safetensors"))
    if len(loose) == 1:
        return [(loose[0], None)]
    raise ValueError(
        f"{source} holds {len(loose)} .safetensors files; wanted {DIFFUSERS_FILE}, {PEFT_FILE} or exactly one"
    )


# --------------------------------------------------------------------------------------------------- scaling


def stated_scaling(config: dict, path: str, rank: int) -> float:
    """Scaling of one module under a PEFT configuration: alpha / r, patterns first, or alpha / sqrt(r)."""

    def lookup(patterns: dict | None, default: float) -> float:
        names = (path, path.removeprefix("text_model."))
        hits = (v for p, v in (patterns or {}).items() if any(re.match(rf"(.*\.)?({p})$", name) for name in names))
        return next(hits, default)

    try:
        alpha = float(lookup(config.get("alpha_pattern"), config.get("lora_alpha", rank)))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"the configuration that comes with it states no alpha for {path}: {error}") from None
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def json_object(text: str, where: str) -> dict:
    """A JSON object, or a ValueError that says where it was expected."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a JSON {type(value).__name__}, wanted an object")
    return value


def peft_config_beside(path: Path) -> dict:
    """`adapter_config.json` beside PEFT weights: it holds alpha, without which they mean nothing."""
    file = path.with_name(PEFT_CONFIG)
    if not file.is_file():
        raise ValueError(f"has PEFT keys, whose alpha stands in {PEFT_CONFIG}; there is none beside it")
    if (size := file.stat().st_size) > LARGEST_CONFIG:
        raise ValueError(f"{PEFT_CONFIG} beside it has {size} bytes, more than any configuration")
    config = json_object(file.read_text(encoding="utf-8", errors="replace"), PEFT_CONFIG)
    kind = config.get("peft_type")
    if kind == "RESLORA" and config.get("shortcut") != "none":
        raise ValueError(UNMERGED)
    if kind not in ("LORA", "RESLORA") or config.get("use_dora"):
        raise ValueError(f"is {'DoRA' if config.get('use_dora') else kind} by its {PEFT_CONFIG}; wanted plain LORA")
    return config


def embedded_configs(metadata: dict[str, str]) -> dict[str, dict]:
    """Per-component PEFT configurations in the header of a diffusers file, `{"unet": {"r": ..., ...}}`."""
    configs: dict[str, dict] = defaultdict(dict)
    for name, value in json_object(metadata.get(DIFFUSERS_METADATA, "{}"), DIFFUSERS_METADATA).items():
        component, _, entry = name.partition(".")
        if component in COMPONENTS:
            configs[component][entry] = value
        else:  # as `unet.save_lora_adapter` writes it
            configs[""][name] = value
    if any(config.get("shortcut", "none") != "none" for config in configs.values()):
        raise ValueError(UNMERGED)
    return dict(configs)


# ---------------------------------------------------------------------------------------------------- header


def read_headers(source: str | Path) -> list[Header]:
    """The headers of a LoRA, one for each file that belongs to it.

    Raises:
        ValueError: one message with everything that is wrong.
    """
    return [read_header(path, component) for path, component in parts(Path(source))]


def read_header(path: Path, folder_component: str | None = None) -> Header:
    """The header of one file."""
    with open_safetensors(path, framework="np") as file:
        metadata = dict(file.metadata() or {})
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
    keys, problems = parse_all(list(shapes), folder_component)
    problems += structure_problems(keys, shapes)
    if whole := [n for n, key in keys.items() if key.part != "alpha" and not dtypes[n].startswith(("F", "BF"))]:
        problems.append(f"{len(whole)} tensors are {dtypes[whole[0]]}, not floating-point: {listing(whole)}")
    configs = {}
    try:
        configs = embedded_configs(metadata)
        if any(key.dialect is Dialect.PEFT for key in keys.values()):
            configs = {"": peft_config_beside(path)}
    except ValueError as error:
        problems.append(str(error))
    if problems:
        if architecture := metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version"):
            problems.append(f"its header says it is for {architecture[:80]}")
        raise unusable(path, problems)
    return Header(path, next(iter(keys.values())).dialect, metadata, keys, shapes, dtypes, configs)
