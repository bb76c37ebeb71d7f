"""LoHa and LoKr by the names and shapes of their tensors, as LyCORIS and PEFT write them. No tensor is read.

    LoHa    dW = s (w1_a w1_b) * (w2_a w2_b)      hada_w1_a [out, r], hada_w1_b [r, in], ...      * is elementwise
    LoKr    dW = s w1 (x) w2                      lokr_w1 [a, c], lokr_w2 [b, d, kh, kw]          (x) is Kronecker's
            w1 may be w1_a w1_b, w2 may be w2_a w2_b
    t       a middle tensor [r, r, kh, kw] of a convolution (Tucker): w_a [r, out], w_b [r, in]

s is alpha / r. Without any r, where both w1 and w2 of a LoKr are whole, LyCORIS has s = 1; PEFT's configuration always
states r. A convolution's kernel may be flattened, dW [out, in kh kw]; only the base tells.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..utils.problems import printable, shortened

Shape = tuple[int, ...]
LOHA, LOKR = "LoHa", "LoKr"
PARTS = {
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), LOHA),
    **dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), LOKR),
}
NAMES = "hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)"  # a regular expression for them
PEFT_TYPES = {"LOHA": LOHA, "LOKR": LOKR}
LARGEST = 2**27  # numbers of one update; the largest layers in use have a quarter
FIELDS = {  # of PEFT's configurations; those of training and of the modules' names change nothing
    *("peft_type", "r", "alpha", "rank_pattern", "alpha_pattern", "task_type", "auto_mapping", "peft_version"),
    *("base_model_name_or_path", "revision", "inference_mode", "target_modules", "exclude_modules", "init_weights"),
    *("layers_to_transform", "layers_pattern", "rank_dropout", "module_dropout", "use_effective_conv2d"),
    *("modules_to_save", "decompose_both", "decompose_factor", "rank_dropout_scale", "runtime_config"),
}
DEFAULT = 8  # of PEFT's r and alpha


class Product(NamedTuple):
    """The product of one layer's tensors: the shape of dW, and the rank that alpha is divided by, if there is one."""

    kind: str
    shape: Shape
    rank: int | None


def matrix_product(a: Shape | None, b: Shape | None, middle: Shape | None, what: str) -> tuple[Shape, int]:
    """Shape and rank of a b, or of a and b around a middle tensor; raises `ValueError`."""
    if a is None or b is None:
        raise ValueError(f"{what}_{'a' if a is None else 'b'} is missing")
    if middle is None:
        if len(a) != 2 or len(b) < 2 or a[1] != b[0]:
            raise ValueError(f"{what}_a {list(a)} and {what}_b {list(b)} have no product")
        return (a[0], *b[1:]), b[0]
    if not (len(a) == len(b) == 2 and len(middle) == 4 and a[0] == middle[0] and b[0] == middle[1]):
        raise ValueError(f"{what}_a {list(a)} and {what}_b {list(b)} do not go with a middle tensor {list(middle)}")
    return (a[1], b[1], *middle[2:]), b[0]


def product_of(parts: Mapping[str, Shape]) -> Product:
    """Return the product that tensors with these shapes make; keys are the parts.

    Raises:
        ValueError: they make nothing.
    """
    get = parts.get
    kinds = {PARTS[name] for name in parts if name in PARTS}
    if len(kinds) > 1:
        raise ValueError("it is both LoHa and LoKr")
    kind = kinds.pop()
    if "dora_scale" in parts or "magnitude" in parts:
        raise ValueError(f"it is a {kind} with the length of weights trained too (dora_scale), which is not read")
    if kind == LOHA:
        one, rank = matrix_product(get("hada_w1_a"), get("hada_w1_b"), get("hada_t1"), "hada_w1")
        two, _ = matrix_product(get("hada_w2_a"), get("hada_w2_b"), get("hada_t2"), "hada_w2")
        if one != two:
            raise ValueError(f"its two products have shapes {list(one)} and {list(two)}")
        shape, of = one, rank
    else:
        sides, of = [], None
        for side, middle in (("lokr_w1", None), ("lokr_w2", get("lokr_t2"))):
            whole = get(side)
            if whole is not None and (f"{side}_a" in parts or f"{side}_b" in parts or middle is not None):
                raise ValueError(f"{side} is there whole and in parts")
            if whole is None:
                whole, of = matrix_product(get(f"{side}_a"), get(f"{side}_b"), middle, side)
            sides.append(whole)
        one, two = sides
        if len(one) != 2 or len(two) not in (2, 4):
            raise ValueError(f"lokr_w1 {list(one)} and lokr_w2 {list(two)} have no Kronecker product of layers")
        shape = (one[0] * two[0], one[1] * two[1], *two[2:])
    if not 0 < math.prod(shape) <= LARGEST:
        raise ValueError(f"its update {list(shape)} has {math.prod(shape)} numbers, wanted 1 to {LARGEST}")
    return Product(kind, shape, of)


def foreign_settings(config: Mapping[str, Any], where: str) -> Iterator[str]:
    """Fields of a PEFT configuration of a LoHa or LoKr that may make it mean something else."""
    for name, value in config.items():
        if name not in FIELDS and value not in (None, False, "", [], {}):
            yield f"{where}: {printable(name, 80)} is {shortened(value)}, no field of LoHa and LoKr that is known here"


def as_lora(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say the scaling, under the names that a LoRA's configuration has for them."""
    alpha, rank = config.get("alpha", DEFAULT), config.get("r", DEFAULT)
    return {"r": rank, "lora_alpha": alpha} | {
        name: config[name] for name in ("alpha_pattern", "rank_pattern") if config.get(name)
    }
