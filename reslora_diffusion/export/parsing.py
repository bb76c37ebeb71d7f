"""Reads the names of a LoRA file's tensors and finds faults in them, by pure functions of names and shapes.

parse_key             one name, of any dialect and age -> dialect, component, module path, part
beside_lora           of a PEFT file, what was trained beside the LoRA: a head, tokens, an embedding
parse_all             all of a file -> keys, and problems: other kinds of adapter, other models, unknown names
structure_problems    mixed dialects, missing partners, ranks that disagree
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from ..rules import UNMERGED_KEY
from ..utils.problems import listing
from .flux import parts_of
from .keys import COMPONENTS, PEFT_PREFIX, Dialect, classic_path, from_kohya
from .product_shapes import LOHA, LOKR, NAMES, PARTS, product_of

CUT = " (`reslora convert FILE --to kohya --rank N` makes one)"


class Key(NamedTuple):
    """The parts of a tensor's name."""

    dialect: Dialect
    component: str
    path: str
    part: str  # "A", "B", "alpha"; of a DoRA "magnitude" in PEFT's names, "dora_scale" in kohya's; of `PARTS`


SIDES = {"A": "A", "B": "B", "down": "A", "up": "B"}
NOT_PLAIN = {
    rf"(^|[._]){UNMERGED_KEY}$|\.lora_A_calibration$": "an unmerged ResLoRA (export_pipeline merges it)",
    r"\.hada_": LOHA,
    r"\.lokr_": LOKR,
    r"\.on_input$|\.ia3_l(\.|$)": "(IA)3",
    r"\.oft_(blocks|diag|R)": "OFT",
    r"\.lora_mid\.": "LoCon with a middle tensor (CP decomposition)",
    r"\.lora_embedding_[AB]": "an embedding LoRA",
    r"\.diff(_b)?$|\.[wb]_norm$": "full weight differences",
    r"\.modules_to_save\.|lora_B(\.\w+)?\.bias$": "trained biases or whole modules",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
}
FOREIGN = {
    r"^(clip_[lg]|t5(xxl)?|emb_params)$": "an embedding of new tokens (textual inversion)",
    r"double_blocks|single_blocks|single_transformer_blocks": "FLUX, in other names than kohya's and diffusers'",
    r"joint_blocks": "Stable Diffusion 3",
    r"lora_te3_": "T5",
    r"^lora_prior_|prior_unet": "Stable Cascade",
}
KOHYA_KEY = re.compile(
    rf"(lora_(?:unet|te[12]?)_\w+|lycoris_\w+)\.(?:lora_(down|up)\.weight|(alpha|dora_scale|{NAMES}))"
)
DOTTED_KEY = re.compile(
    r"(?P<path>.+?)(?:\.processor)?(?:"
    r"\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"  # PEFT, with or without the adapter's name
    r"|\.lora(?:_linear_layer)?\.(?P<linear>down|up)\.weight"  # diffusers before PEFT
    r"|\.to_(?P<proj>q|k|v|out)_lora\.(?P<processor>down|up)\.weight"  # attention processors of 2023
    rf"|\.(?P<product>{NAMES})(?:\.\w+)?"  # LyCORIS and PEFT
    r"|\.(?P<alpha>alpha)|\.(?P<scale>dora_scale)|\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?)"
)
MODULE_PATH = re.compile(r"[\w-]+(\.[\w-]+)*")
LONGEST_NAME = 500  # characters; real ones have up to 150
TRAINED = {  # of what is no LoRA in a PEFT file
    r"\.token_adapter\.|trainable_tokens_delta": "trained tokens (trainable_token_indices)",
    r"\.(embed_tokens|wte|word_embeddings|embed_in|lm_head|embed_out)\.": "a whole embedding or output layer",
    r"\.(score|classifier|classification_head|qa_outputs|pooler)\.": "a trained head",
    r"\.bias$": "trained biases",
    r"": "trained modules (modules_to_save)",
}
UNET_ROOTS = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
OF_COMFYUI = "diffusion_model"  # before a transformer's names in ComfyUI; ai-toolkit puts it before diffusers' names
TRANSFORMER_ROOTS = (
    "transformer_blocks.",
    "single_transformer_blocks.",
    "layers.",
    "noise_refiner.",
    "context_refiner.",
)
CLIP_ROOTS = ("text_model.encoder.layers.", "encoder.layers.")


def parse_key(key: str, folder_component: str | None = None) -> Key:
    """Parse a key of any dialect; `folder_component` is the component that PEFT's keys are for.

    Raises:
        ValueError: it names nothing we know.
    """
    if match := KOHYA_KEY.fullmatch(key):
        component, path = from_kohya(re.sub("^lycoris_", "lora_unet_", match[1]))
        return Key(Dialect.KOHYA, component, path, SIDES[match[2]] if match[2] else match[3])
    match = DOTTED_KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{key} is not a LoRA key of diffusers, kohya or PEFT")
    dialect, path = Dialect.DIFFUSERS, match["path"]
    if path.startswith(PEFT_PREFIX):
        dialect, path = Dialect.PEFT, path.removeprefix(PEFT_PREFIX)
    component, dot, rest = path.partition(".")
    if component == OF_COMFYUI and rest.startswith(TRANSFORMER_ROOTS) and not rest.endswith(".qkv"):
        component = "transformer"
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
    if not MODULE_PATH.fullmatch(path):
        raise ValueError(f"{key} names no module")
    path = classic_path(component, path)
    if proj := match["proj"]:
        clip = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
        unet = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
        path = f"{path}.{(unet if component in ('unet', 'transformer') else clip)[proj]}"
    side = match["peft"] or match["linear"] or match["processor"]
    other = match["product"] or match["alpha"] or match["scale"] or "magnitude"
    return Key(dialect, component, path, SIDES[side] if side else other)


def beside_lora(names: Iterable[str]) -> dict[str, str]:
    """Tensors of a PEFT file that are no part of its LoRA, and what they are."""
    return {
        name: next(kind for pattern, kind in TRAINED.items() if re.search(pattern, name))
        for name in names
        if len(name) <= LONGEST_NAME
        and name.startswith(PEFT_PREFIX)
        and ".lora_" not in name
        and not any(re.search(pattern, name) for pattern in NOT_PLAIN)
    }


def parse_all(
    names: list[str], folder_component: str | None = None, products: bool = False
) -> tuple[dict[str, Key], list[str]]:
    """Every key parsed, and what cannot be: `(keys, problems)`.

    Args:
        products: whether it may be a LoHa or LoKr.
    """
    parsed, strange, problems = {}, [], []
    kinds = defaultdict(list)
    if long := [name for name in names if len(name) > LONGEST_NAME]:
        problems.append(f"{len(long)} names have more than {LONGEST_NAME} characters: {listing(long, 2)}")
    for name in names:
        if len(name) > LONGEST_NAME:
            continue
        kind = next((kind for pattern, kind in NOT_PLAIN.items() if re.search(pattern, name)), None)
        if kind and not (products and kind in (LOHA, LOKR)):
            kinds[kind].append(name)
            continue
        try:
            parsed[name] = parse_key(name, folder_component)
        except ValueError:
            strange.append(name)
    problems += [
        f"holds {kind}, not plain LoRA{CUT if kind in (LOHA, LOKR) else ''}: {listing(keys)}"
        for kind, keys in kinds.items()
    ]
    if strange:
        is_for = next((kind for pattern, kind in FOREIGN.items() if any(re.search(pattern, k) for k in strange)), None)
        meant = f"; they are those of {is_for}" if is_for else ""
        known = "PEFT" if any(name.startswith(PEFT_PREFIX) for name in strange) else "Stable Diffusion"
        problems.append(f"{len(strange)} of {len(names)} keys are no LoRA of {known}{meant}: {listing(strange)}")
    if not names:
        problems.append("holds no tensors of a LoRA")
    return parsed, problems


MAGNITUDES = ("magnitude", "dora_scale")  # parts of a DoRA: PEFT's, kohya's


def axis_of(part: str, shape: tuple[int, ...], out: int, width: int) -> int | None:
    """The axis of a DoRA's magnitude: 0 if it is the length of rows, 1 if of columns, None if of neither.

    Rows are [out] and [1, out, 1, 1] in PEFT, [out, 1, ..] in kohya files; columns are [1, in, ..], there alone.
    """
    if shape == (out,) or (
        part == "magnitude" and len(shape) > 2 and shape[0] == 1 and math.prod(shape) == shape[1] == out
    ):
        return 0
    if part == "dora_scale" and len(shape) > 1 and math.prod(shape[2:]) == 1:
        return 0 if shape[:2] == (out, 1) else 1 if shape[:2] == (1, width) else None
    return None


def structure_problems(keys: dict[str, Key], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Mixed dialects, missing partners, ranks that disagree; found from names and shapes alone."""
    problems = []
    dialects = {d: [name for name, key in keys.items() if key.dialect is d] for d in Dialect}
    present = {d: names for d, names in dialects.items() if names}
    if len(present) > 1:
        styles = "; ".join(f"{d}: {listing(names, 2)}" for d, names in present.items())
        problems.append(f"mixes key styles ({styles}); loaders would read only one of them")
    sides: dict[tuple[str, str], dict[str, tuple[int, ...]]] = defaultdict(dict)
    impossible: dict[str, list[str]] = {}
    for name, key in keys.items():
        sides[key.component, key.path].setdefault(key.part, shapes[name])
    made = {place: side for place, side in sides.items() if side.keys() & PARTS.keys()}
    for (component, path), side in made.items():
        try:
            if side.keys() & {"A", "B"}:
                raise ValueError("it is a plain LoRA too")
            product = product_of(side)
            if sum(parts_of(path, product.shape[0]).values()) != product.shape[0]:
                raise ValueError(f"{product.shape[0]} outputs are not those of FLUX.1's q, k and v")
        except ValueError as error:
            impossible.setdefault(str(error), []).append(f"{component}.{path}")
    problems += [f"{reason}: {listing(names)}" for reason, names in impossible.items()]
    for want, other in (("A", "B"), ("B", "A")):
        lonely = [f"{c}.{path}" for (c, path), side in sides.items() if other in side and want not in side]
        if lonely:
            problems.append(f"lora_{want} is missing for {len(lonely)} modules: {listing(lonely)}")
    orphans = {
        f"{c}.{path}": " and ".join(side) for (c, path), side in sides.items() if not side.keys() & {"A", "B", *PARTS}
    }
    for what in dict.fromkeys(orphans.values()):
        alone = [name for name, parts in orphans.items() if parts == what]
        problems.append(f"{what} without lora_A and lora_B: {listing(alone)}")
    unlike, uneven, vectors, shapeless = [], [], [], []
    for (component, path), side in sides.items():
        A, B = side.get("A"), side.get("B")
        if A is not None and B is not None:
            alike = len(A) == len(B) and len(A) in (2, 4) and A[0] == B[1] and set(B[2:]) <= {1}
            if not alike or 0 in (*A, *B):
                unlike.append(f"{component}.{path}: lora_A {list(A)}, lora_B {list(B)}")
            elif sum(parts_of(path, B[0]).values()) != B[0]:
                uneven.append(f"{path}: lora_B {list(B)}")
            shapeless += [
                f"{component}.{path}: {list(side[part])}, the layer is [{B[0]}, {A[1]}]"
                for part in MAGNITUDES
                if alike and part in side and axis_of(part, side[part], B[0], A[1]) is None
            ]
        if math.prod(side.get("alpha", ())) != 1:
            vectors.append(f"{component}.{path}")
    if unlike:
        problems.append(f"ranks disagree in {len(unlike)} modules: {listing(unlike)}")
    if uneven:
        problems.append(
            f"outputs of FLUX.1's q, k and v are not equally many in {len(uneven)} modules: {listing(uneven)}"
        )
    if shapeless:
        problems.append(f"magnitudes of neither rows nor columns in {len(shapeless)} modules: {listing(shapeless)}")
    if vectors:
        problems.append(f"alpha is not a single number in {len(vectors)} modules: {listing(vectors)}")
    return problems
