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
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from .keys import COMPONENTS, PEFT_PREFIX, Dialect, classic_path, from_kohya, listing

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FOLDER = "kohya"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_METADATA = "lora_adapter_metadata"
UNMERGED = "is an unmerged ResLoRA; merge it (merged_factors), or take its run's export"
LARGEST_CONFIG = 2**20  # bytes; real ones have a few thousand


class Key(NamedTuple):
    """What a tensor's name says."""

    dialect: Dialect
    component: str
    path: str
    part: str  # "A", "B", "alpha"


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


# ------------------------------------------------------------------------------------------------------ keys

SIDES = {"A": "A", "B": "B", "down": "A", "up": "B"}
NOT_PLAIN = {
    r"dora_scale$|lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.lora_mid\.": "LoCon with a middle tensor (CP decomposition)",
    r"\.lora_embedding_[AB]": "an embedding LoRA",
    r"\.diff(_b)?$|\.[wb]_norm$": "full weight differences",
    r"\.modules_to_save\.|lora_B(\.\w+)?\.bias$": "trained biases or whole modules",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
}
FOREIGN = {
    r"double_blocks|single_blocks|single_transformer_blocks": "FLUX",
    r"joint_blocks|lora_te3_": "Stable Diffusion 3",
    r"^lora_prior_|prior_unet": "Stable Cascade",
    r"^(model\.diffusion_model|cond_stage_model|first_stage_model|conditioner)\.": "a whole checkpoint, no LoRA",
}
KOHYA_KEY = re.compile(r"(lora_(?:unet|te[12]?)_\w+)\.(?:lora_(down|up)\.weight|(alpha))")
DOTTED_KEY = re.compile(
    r"(?P<path>.+?)(?:\.processor)?(?:"
    r"\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"  # PEFT, with or without the adapter's name
    r"|\.lora(?:_linear_layer)?\.(?P<linear>down|up)\.weight"  # diffusers before PEFT
    r"|\.to_(?P<proj>q|k|v|out)_lora\.(?P<processor>down|up)\.weight"  # attention processors of 2023
    r"|\.(?P<alpha>alpha))"
)
UNET_ROOTS = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
CLIP_ROOTS = ("text_model.encoder.layers.", "encoder.layers.")


def parse_key(key: str, folder_component: str | None = None) -> Key:
    """What a key says, whatever its dialect; `folder_component` settles what PEFT keys are for.

    Raises:
        ValueError: it names nothing we know.
    """
    if match := KOHYA_KEY.fullmatch(key):
        component, path = from_kohya(match[1])
        return Key(Dialect.KOHYA, component, path, SIDES[match[2]] if match[2] else "alpha")
    match = DOTTED_KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{key} is not a LoRA key of diffusers, kohya or PEFT")
    dialect, path = Dialect.DIFFUSERS, match["path"]
    if path.startswith(PEFT_PREFIX):
        dialect, path = Dialect.PEFT, path.removeprefix(PEFT_PREFIX)
    component, dot, rest = path.partition(".")
    if dialect is Dialect.DIFFUSERS and dot and component in COMPONENTS:
        path = rest
    elif dialect is Dialect.PEFT and folder_component:
        component = folder_component
    elif path.startswith(UNET_ROOTS):
        component = "unet"
    elif dialect is Dialect.PEFT:
        component = "text_encoder" if path.startswith(CLIP_ROOTS) else "model"
    else:
        raise ValueError(f"{key} starts with none of {', '.join(COMPONENTS)}")
    path = classic_path(component, path)
    if proj := match["proj"]:
        clip = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
        unet = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
        path = f"{path}.{(unet if component in ('unet', 'transformer') else clip)[proj]}"
    side = match["peft"] or match["linear"] or match["processor"]
    return Key(dialect, component, path, SIDES[side] if side else "alpha")


def parse_all(names: list[str], folder_component: str | None = None) -> tuple[dict[str, Key], list[str]]:
    """Every key parsed, and what cannot be: `(keys, problems)`."""
    parsed, strange, problems = {}, [], []
    kinds = defaultdict(list)
    for name in names:
        kind = next((kind for pattern, kind in NOT_PLAIN.items() if re.search(pattern, name)), None)
        if kind:
            kinds[kind].append(name)
            continue
        try:
            parsed[name] = parse_key(name, folder_component)
        except ValueError:
            strange.append(name)
    problems += [f"holds {kind}, not plain LoRA: {listing(keys)}" for kind, keys in kinds.items()]
    if strange:
        is_for = next((kind for pattern, kind in FOREIGN.items() if any(re.search(pattern, k) for k in strange)), None)
        meant = f"; they are those of {is_for}" if is_for else ""
        problems.append(
            f"{len(strange)} of {len(names)} keys are no LoRA of Stable Diffusion{meant}: {listing(strange)}"
        )
    if not names:
        problems.append("holds no tensors")
    return parsed, problems


def structure_problems(keys: dict[str, Key], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Mixed dialects, missing partners, ranks that disagree; found from names and shapes alone."""
    problems = []
    dialects = {d: [name for name, key in keys.items() if key.dialect is d] for d in Dialect}
    present = {d: names for d, names in dialects.items() if names}
    if len(present) > 1:
        styles = "; ".join(f"{d}: {listing(names, 2)}" for d, names in present.items())
        problems.append(f"mixes key styles ({styles}); loaders would read only one of them")
    sides = defaultdict(dict)
    for name, key in keys.items():
        sides[key.component, key.path].setdefault(key.part, shapes[name])
    for want, other in (("A", "B"), ("B", "A")):
        lonely = [f"{c}.{path}" for (c, path), side in sides.items() if other in side and want not in side]
        if lonely:
            problems.append(f"lora_{want} is missing for {len(lonely)} modules: {listing(lonely)}")
    orphans = [f"{c}.{path}" for (c, path), side in sides.items() if side.keys() == {"alpha"}]
    if orphans:
        problems.append(f"alpha without lora_A and lora_B: {listing(orphans)}")
    unlike, vectors = [], []
    for (component, path), side in sides.items():
        A, B = side.get("A"), side.get("B")
        if A is not None and B is not None:
            alike = len(A) == len(B) and len(A) in (2, 4) and A[0] == B[1] and set(B[2:]) <= {1}
            if not alike or 0 in (*A, *B):
                unlike.append(f"{component}.{path}: lora_A {list(A)}, lora_B {list(B)}")
        if math.prod(side.get("alpha", ())) != 1:
            vectors.append(f"{component}.{path}")
    if unlike:
        problems.append(f"ranks disagree in {len(unlike)} modules: {listing(unlike)}")
    if vectors:
        problems.append(f"alpha is not a single number in {len(vectors)} modules: {listing(vectors)}")
    return problems


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
    if whole := [name for name in keys if not dtypes[name].startswith(("F", "BF"))]:
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
