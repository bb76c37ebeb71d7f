"""Reading a LoRA file of any dialect into one form, {component: {module path: LoraFactors}}.

Accepted: kohya files (SD 1.x, 2.x, SDXL; diffusers or Stability block names), diffusers files of every age, PEFT
folders. Files come from strangers: nothing is unpickled, the header is checked against the size of the file before a
tensor is read, and every problem found is named in one message. Kinds of adapter that are not plain LoRA (DoRA, LoHa,
LoKr, full differences) are refused by name.
"""

import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reslora_diffusion.core.functional import LoraFactors

from .factors import Components
from .keys import PEFT_PREFIX, Dialect, classic_path, from_kohya, listing

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, read. `alphas` holds what the file states, per module; scaling is in the factors already."""

    path: Path
    dialect: Dialect
    components: Components
    metadata: dict[str, str]
    dtypes: Counter[str]
    alphas: dict[tuple[str, str], float] = field(default_factory=dict)


class Key(NamedTuple):
    dialect: Dialect
    component: str
    path: str
    part: str  # "A", "B", "alpha"


# ----------------------------------------------------------------------------------------------- safetensors


def open_safetensors(path: Path):
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
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is a damaged or truncated safetensors file ({size} bytes): {error}") from None


def locate(source: Path) -> Path:
    """The weights in `source`, a file or a folder as diffusers, our exporter or PEFT write it."""
    if source.is_file():
        return source
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    found = [source / name for name in (DIFFUSERS_FILE, PEFT_FILE) if (source / name).is_file()]
    if found:
        return found[0]
    loose = sorted(source.glob("*.safetensors"))
    if len(loose) == 1:
        return loose[0]
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
KOHYA_KEY = re.compile(r"(lora_(?:unet|te[12]?)_\w+)\.(?:lora_(down|up)\.weight|(alpha))")
DOTTED_KEY = re.compile(
    r"(?P<path>.+?)(?:\.processor)?(?:"
    r"\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"  # PEFT, with or without the adapter's name
    r"|\.lora(?:_linear_layer)?\.(?P<linear>down|up)\.weight"  # diffusers before PEFT
    r"|\.to_(?P<proj>q|k|v|out)_lora\.(?P<processor>down|up)\.weight"  # attention processors of 2023
    r"|\.(?P<alpha>alpha))"
)
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "transformer")
UNET_ROOTS = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")


def parse_key(key: str) -> Key:
    """What a key says, whatever its dialect.

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
    elif path.startswith(UNET_ROOTS):
        component = "unet"
    elif dialect is Dialect.PEFT:
        component = "text_encoder" if path.startswith(("text_model.encoder.", "encoder.layers.")) else "model"
    else:
        raise ValueError(f"{key} starts with none of {', '.join(COMPONENTS)}")
    path = classic_path(component, path)
    if proj := match["proj"]:
        clip = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
        unet = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
        path = f"{path}.{(unet if component in ('unet', 'transformer') else clip)[proj]}"
    side = match["peft"] or match["linear"] or match["processor"]
    return Key(dialect, component, path, SIDES[side] if side else "alpha")


# --------------------------------------------------------------------------------------------------- scaling


def stated_scaling(config: dict, path: str, rank: int) -> float:
    """Scaling of one module under a PEFT configuration: alpha / r, patterns first, or alpha / sqrt(r)."""

    def lookup(patterns: dict | None, default: float) -> float:
        names = (path, path.removeprefix("text_model."))
        hits = (v for p, v in (patterns or {}).items() if any(re.match(rf"(.*\.)?({p})$", name) for name in names))
        return next(hits, default)

    alpha = lookup(config.get("alpha_pattern"), config.get("lora_alpha", rank))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def peft_config_beside(path: Path) -> dict:
    """`adapter_config.json` beside PEFT weights: it holds alpha, without which they mean nothing."""
    file = path.with_name(PEFT_CONFIG)
    if not file.is_file():
        raise ValueError(f"{path} has PEFT keys, whose alpha stands in {PEFT_CONFIG}; there is none beside it")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    kind = config.get("peft_type")
    if kind == "RESLORA":
        raise ValueError(f"{file} is an unmerged ResLoRA; merge and export it from its training run (reslora export)")
    if kind != "LORA" or config.get("use_dora"):
        raise ValueError(f"{file} is {'DoRA' if config.get('use_dora') else kind}; wanted plain LORA")
    return config


def embedded_configs(metadata: dict[str, str]) -> dict[str, dict]:
    """Per-component PEFT configurations in the header of a diffusers file, `{"unet": {"r": ..., ...}}`."""
    configs: dict[str, dict] = defaultdict(dict)
    for name, value in json.loads(metadata.get(DIFFUSERS_METADATA, "{}")).items():
        component, _, entry = name.partition(".")
        configs[component][entry] = value
    return configs


# ---------------------------------------------------------------------------------------------------- reader


def read_lora(source: str | Path) -> LoraFile:
    """Read any LoRA file or folder.

    >>> lora = read_lora("my_lora.safetensors")
    >>> lora.dialect, lora.components["unet"]["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].lora_A.shape

    Raises:
        ValueError: one message with everything that is wrong with the file.
    """
    path = locate(Path(source))
    with open_safetensors(path) as file:
        metadata = dict(file.metadata() or {})
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        parsed, problems = parse_all(shapes)
        problems += structure_problems(parsed, shapes)
        if problems:
            raise ValueError("\n".join([f"{path} cannot be used:", *(f"  - {p}" for p in problems)]))
        dialect = next(iter(parsed.values())).dialect
        configs = embedded_configs(metadata)
        peft_config = peft_config_beside(path) if dialect is Dialect.PEFT else None
        tensors = {key: file.get_tensor(key) for key in shapes}
    return assemble(path, dialect, parsed, tensors, metadata, configs, peft_config)


def parse_all(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Key], list[str]]:
    """Every key parsed, and what cannot be: `(keys, problems)`."""
    parsed, strange, problems = {}, [], []
    kinds = defaultdict(list)
    for key in shapes:
        kind = next((name for pattern, name in NOT_PLAIN.items() if re.search(pattern, key)), None)
        if kind:
            kinds[kind].append(key)
            continue
        try:
            parsed[key] = parse_key(key)
        except ValueError:
            strange.append(key)
    problems += [f"holds {kind}, not plain LoRA: {listing(keys)}" for kind, keys in kinds.items()]
    if strange:
        problems.append(f"{len(strange)} of {len(shapes)} keys are of no known LoRA layout: {listing(strange)}")
    if not shapes:
        problems.append("holds no tensors")
    return parsed, problems


def structure_problems(parsed: dict[str, Key], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Mixed dialects, missing partners, ranks that disagree; found from the header alone."""
    problems = []
    dialects = {d: [key for key, k in parsed.items() if k.dialect is d] for d in Dialect}
    present = {d: keys for d, keys in dialects.items() if keys}
    if len(present) > 1:
        styles = "; ".join(f"{d}: {listing(keys, 2)}" for d, keys in present.items())
        problems.append(f"mixes key styles ({styles}); loaders would read only one of them")
    sides = defaultdict(dict)
    for key, k in parsed.items():
        sides[k.component, k.path].setdefault(k.part, shapes[key])
    for want, other in (("A", "B"), ("B", "A")):
        lonely = [f"{c}.{path}" for (c, path), parts in sides.items() if other in parts and want not in parts]
        if lonely:
            problems.append(f"lora_{want} is missing for {len(lonely)} modules: {listing(lonely)}")
    orphans = [f"{c}.{path}" for (c, path), parts in sides.items() if parts.keys() == {"alpha"}]
    if orphans:
        problems.append(f"alpha without lora_A and lora_B: {listing(orphans)}")
    for (component, path), parts in sides.items():
        if "A" in parts and "B" in parts:
            A, B = parts["A"], parts["B"]
            if not (len(A) == len(B) and len(A) in (2, 4) and A[0] == B[1] and A[0] > 0 and set(B[2:]) <= {1}):
                problems.append(f"ranks disagree in {component}.{path}: lora_A {list(A)}, lora_B {list(B)}")
        if math.prod(parts.get("alpha", ())) != 1:
            problems.append(f"alpha of {component}.{path} is not a single number")
    return problems


def assemble(
    path: Path,
    dialect: Dialect,
    parsed: dict[str, Key],
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    configs: dict[str, dict],
    peft_config: dict | None,
) -> LoraFile:
    """Pair the tensors of a file whose structure is sound."""
    sides: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    problems = []
    for key, k in parsed.items():
        parts = sides[k.component, k.path]
        if k.part in parts and not torch.equal(parts[k.part], tensors[key]):  # both CLIP layouts, but not alike
            problems.append(f"{k.component}.{k.path} is given twice, with different values")
        parts[k.part] = tensors[key]
    components: Components = defaultdict(dict)
    alphas = {}
    for (component, name), parts in sides.items():
        A, B = parts["A"], parts["B"]
        if not (A.is_floating_point() and B.is_floating_point()):
            problems.append(f"{component}.{name} holds {A.dtype} and {B.dtype}, not floating-point numbers")
        rank = A.shape[0]
        config = peft_config or configs.get(component)
        if "alpha" in parts:
            alphas[component, name] = parts["alpha"].item()
            scaling = alphas[component, name] / rank
        elif config:
            scaling = stated_scaling(config, name, rank)
            alphas[component, name] = scaling * rank
        else:
            scaling = 1.0  # every loader's reading of a file without alpha
        components[component][name] = LoraFactors(A, B, scaling)
    if problems:
        raise ValueError("\n".join([f"{path} cannot be used:", *(f"  - {p}" for p in problems)]))
    dtypes = Counter(str(parts[s].dtype).removeprefix("torch.") for parts in sides.values() for s in "AB")
    return LoraFile(path, dialect, dict(components), metadata, dtypes, alphas)
