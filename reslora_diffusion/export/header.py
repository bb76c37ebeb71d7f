"""Description of a LoRA file, from its header alone: dialect, modules, ranks, precision. No tensor is read.

    source        a file, or a folder as diffusers, our exporter or PEFT write it
    read_headers  source -> one Header for each file that belongs to it, or one message with every problem found

Files are untrusted. Nothing is unpickled, the header is held against the size of the file before anything is
read, names in it never become paths, and what is not plain LoRA (LoHa, LoKr, full differences) is refused by name; so
is DoRA, unless the caller knows what to do with it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from safetensors import SafetensorError, safe_open

from ..plain_lora import not_plain
from ..utils.documents import parse_json
from ..utils.problems import BAD_DATA, Unusable, listing, printable, printable_lines
from .keys import COMPONENTS, Dialect
from .model_names import described
from .parsing import CUT, MAGNITUDES, Key, axis_of, beside_lora, parse_all, structure_problems
from .product_shapes import PARTS, PEFT_TYPES, Product, as_lora, foreign_settings, product_of
from .scaling import Patterns, StatedScaling, number

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FOLDER = "kohya"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_METADATA = "lora_adapter_metadata"
LARGEST_CONFIG = 2**20  # bytes; real ones have a few thousand
READABLE = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
WHOLE = ("I64", "I32", "I16", "I8", "U8")  # as some write alpha


@dataclass(frozen=True)
class Header:
    """A sound LoRA file before its tensors are read.

    `configs` holds PEFT configurations by component, where there are any; under "" the one that applies to all
    components. `beside` holds tensors that are no LoRA, by name, and what they are: a trained head, new tokens.
    """

    path: Path
    dialect: Dialect
    metadata: dict[str, str]
    keys: dict[str, Key]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    configs: dict[str, dict]
    scalings: dict[str, StatedScaling] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)

    def modules(self) -> dict[tuple[str, str], dict[str, str]]:
        """(component, path) -> part -> name of its tensor; of two CLIP layouts, the first."""
        found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        for name, key in self.keys.items():
            found[key.component, key.path].setdefault(key.part, name)
        return dict(found)

    def twins(self) -> Iterator[tuple[Key, str, str]]:
        """Yield each key that a file has in both CLIP layouts, and the names of the two tensors."""
        modules = self.modules()
        for name, key in self.keys.items():
            if (first := modules[key.component, key.path][key.part]) != name:
                yield key, first, name

    @property
    def magnitudes(self) -> list[str]:
        """Names of the tensors that make a DoRA of it."""
        return [name for name, key in self.keys.items() if key.part in MAGNITUDES]

    def axis(self, names: Mapping[str, str]) -> tuple[str, int] | None:
        """Find the magnitude of a module with these tensors by part: its name, and whether it is of rows (0) or columns
        (1); None where it has none."""
        for part in MAGNITUDES:
            if part in names:
                out, width = self.shapes[names["B"]][0], self.shapes[names["A"]][1]
                axis = axis_of(part, self.shapes[names[part]], out, width)
                assert axis is not None, "`structure_problems` has refused it"
                return names[part], axis
        return None

    def product(self, names: Mapping[str, str]) -> Product | None:
        """Return the product that a module's tensors, given by part, make; None if it is no LoHa or LoKr."""
        own = {part: self.shapes[name] for part, name in names.items() if part in PARTS}
        return product_of(own) if own else None

    def layer_shape(self, names: Mapping[str, str]) -> list[int]:
        """[out, in, ...] of the layer that a module with these tensors by part is for."""
        if found := self.product(names):
            return [*found.shape]
        return [self.shapes[names["B"]][0], *self.shapes[names["A"]][1:]]

    def product_scaling(self, component: str, path: str, rank: int | None, alpha: float | None) -> float:
        """The scaling of a module of a LoHa or LoKr: as `scaling`; without a rank that which PEFT states, or 1."""
        config = self.configs.get(component) or self.configs.get("")
        if rank is None and config:
            pattern = Patterns(config.get("rank_pattern") or {}).find([path])
            rank = int(pattern or number(config["r"], "r"))
        return 1.0 if rank is None else self.scaling(component, path, rank, alpha)

    def scaling(self, component: str, path: str, rank: int, alpha: float | None) -> float:
        """Scaling of a module: its own alpha first, then a configuration; 1 without either, as every loader has it."""
        if alpha is not None:
            return alpha / rank
        stated = self.scalings.get(component) or self.scalings.get("")
        return stated.of(path, rank) if stated else 1.0


def given_twice(unlike: Iterable[str]) -> str:
    """Problems where tensors in the two CLIP layouts differ."""
    unlike = sorted(set(unlike))
    return f"{len(unlike)} modules are given twice, with different values: {listing(unlike)}"


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Inside, whatever a damaged or hostile file makes libraries raise becomes the one message about it.

    Raises:
        Unusable: a BadInput and ValueError too.
    """
    try:
        yield
    except Unusable:
        raise
    except (*BAD_DATA, SafetensorError) as error:
        if str(error).startswith(str(path)):  # one of ours
            raise Unusable.saying(path, printable_lines(error)) from error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise Unusable(path, [f"{kind}{printable(error, 500)}"]) from error


# ------------------------------------------------------------------------------------------------------- files


# For embeddings of A1111, which have more than tensors, and for everything that is a dictionary of tensors.
UNPICKLE = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "d = {'emb_params': d['string_to_param']['*']} if 'string_to_param' in d else d; "
    'save_file({k: v.detach().contiguous() for k, v in d.items()}, sys.argv[2])"'
)


def open_safetensors(path: Path, framework: str = "pt") -> safe_open:
    """`safetensors.safe_open` on a file that has been looked at first.

    Raises:
        ValueError: not a whole safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)  # length of the header, then its first character
    whole = size > 8 and int.from_bytes(head[:8], "little") <= size - 8 and head[8:] == b"{"
    if not whole and (head[:2] == b"PK" or head[:1] == b"\x80"):
        raise ValueError(
            f"{path} is a pickle (.bin, .pt, .ckpt); only safetensors files are read. This reads nothing but "
            f"tensors of it and writes one: {UNPICKLE} {quote(str(path))} {quote(f'{path}.safetensors')}"
        )
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
    split = [c for c in COMPONENTS if (source / c / PEFT_FILE).is_file()]
    if split:
        return [(source / c / PEFT_FILE, c) for c in split]
    loose = sorted(source.glob("*.safetensors")) or sorted(source.glob(f"{KOHYA_FOLDER}/*.safetensors"))
    if len(loose) == 1:
        return [(loose[0], None)]
    raise ValueError(
        f"{source} holds {len(loose)} .safetensors files; wanted {DIFFUSERS_FILE}, {PEFT_FILE} or exactly one"
    )


# --------------------------------------------------------------------------------------------- configurations


def json_object(text: str, where: str) -> dict:
    """A JSON object, or a ValueError that says where it was expected."""
    try:
        value = parse_json(text)
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
    if "peft_type" not in config:
        raise ValueError(f"{PEFT_CONFIG} beside it states no peft_type; wanted LORA")
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
    return dict(configs)


def is_product(config: Mapping) -> bool:
    """Return whether a PEFT configuration is of a LoHa or LoKr."""
    return str(config.get("peft_type")) in PEFT_TYPES


# ---------------------------------------------------------------------------------------------------- header


def read_headers(
    source: str | Path, *, beside: bool = False, dora: bool = False, products: bool = False
) -> list[Header]:
    """The headers of a LoRA, one for each file that belongs to it.

    Args:
        source: a file or folder.
        beside: whether modules that were trained beside the LoRA may be there; else they are refused by name.
        dora: whether it may be a DoRA.
        products: whether it may be a LoHa or LoKr.

    Raises:
        ValueError: one message with everything that is wrong.
    """
    with reading(source):
        return [read_header(path, component, beside, dora, products) for path, component in parts(Path(source))]


def read_header(
    path: Path, folder_component: str | None = None, beside: bool = False, dora: bool = False, products: bool = False
) -> Header:
    """The header of one file."""
    with reading(path), open_safetensors(path, framework="np") as file:
        metadata = dict(file.metadata() or {})
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
    more = beside_lora(shapes)
    keys, problems = parse_all([name for name in shapes if name not in more], folder_component, products)
    if not keys and (what := described(shapes)):
        raise Unusable(path, [f"is {what}; wanted a LoRA"])
    problems += structure_problems(keys, shapes)
    magnitudes = [name for name, key in keys.items() if key.part in MAGNITUDES]
    if magnitudes and not dora:
        problems.append(f"holds DoRA, not plain LoRA: {listing(magnitudes)}")
    if strange := [n for n, key in keys.items() if dtypes[n] not in READABLE + WHOLE * (key.part == "alpha")]:
        kinds = ", ".join(sorted({dtypes[name] for name in strange}))
        wanted = f"not floating-point as {', '.join(READABLE)} are"
        problems.append(f"{len(strange)} tensors are {kinds}, {wanted}: {listing(strange)}")
    if more and not beside:
        problems.append(
            f"holds {listing(dict.fromkeys(more.values()))} beside the LoRA, which would be lost: {listing(more)}. "
            "PEFT's own merge_and_unload uses them"
        )
    configs, scalings = {}, {}
    try:
        configs, where = embedded_configs(metadata), DIFFUSERS_METADATA
        if any(key.dialect is Dialect.PEFT for key in keys.values()):
            configs, where = {"": peft_config_beside(path)}, PEFT_CONFIG
        if products:
            for component, config in configs.items():
                if is_product(config):
                    problems += foreign_settings(config, where)
                    configs[component] = as_lora(config)
        elif kind := next((PEFT_TYPES[c["peft_type"]] for c in configs.values() if is_product(c)), None):
            problems.append(f"is {kind} by its {where}; wanted plain LoRA{CUT}")
            configs = {}
        problems += dict.fromkeys(
            problem for config in configs.values() for problem in not_plain(config, where, bool(dora and magnitudes))
        )
        scalings = {component: StatedScaling(config) for component, config in configs.items()}
    except ValueError as error:
        problems.append(str(error))
    if problems:
        if architecture := metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version"):
            problems.append(f"its header says it is for {printable(architecture, 80)}")
        raise Unusable(path, problems)
    return Header(path, next(iter(keys.values())).dialect, metadata, keys, shapes, dtypes, configs, scalings, more)
