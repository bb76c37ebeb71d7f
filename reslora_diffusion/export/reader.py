"""Reading a LoRA of any dialect into one form, {component: {module path: LoraFactors}}.

Accepted: kohya files (SD 1.x, 2.x, SDXL; diffusers or Stability block names; FLUX.1), diffusers files of every age,
PEFT folders. `header` has looked at the file before its tensors are read.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from reslora_diffusion.core.functional import LoraFactors, Magnitude, with_magnitude

from ..utils.problems import Unusable
from .dora import DORA_NORM
from .factors import Components, computable
from .flux import split
from .header import (
    DIFFUSERS_FILE,
    PEFT_CONFIG,
    PEFT_FILE,
    Header,
    given_twice,
    locate,
    open_safetensors,
    read_headers,
    reading,
)
from .keys import Dialect
from .products import ProductFactors, split_products

__all__ = ["DIFFUSERS_FILE", "PEFT_CONFIG", "PEFT_FILE", "LoraFile", "locate", "read_lora"]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA, read. `alphas` holds what the file states, per module; scaling is in the factors already."""

    path: Path
    dialect: Dialect
    components: Components
    metadata: dict[str, str]
    dtypes: Counter[str]
    alphas: dict[tuple[str, str], float] = field(default_factory=dict)
    configs: dict[str, dict] = field(default_factory=dict)  # PEFT's, as in the header
    beside: dict[str, str] = field(default_factory=dict)  # what else the file holds, as in the header


def read_lora(source: str | Path, *, beside: bool = False, dora: bool = False, products: bool = False) -> LoraFile:
    """Read any LoRA file or folder.

    Args:
        source: a file or folder.
        beside: whether modules that were trained beside the LoRA may be there; only the LoRA is read.
        dora: whether it may be a DoRA, whose factors have a magnitude each and say nothing without the base.
        products: whether it may be a LoHa or LoKr, whose modules are `ProductFactors`.

    >>> lora = read_lora("my_lora.safetensors")
    >>> lora.dialect, lora.components["unet"]["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].lora_A.shape

    Raises:
        ValueError: one message with everything that is wrong with the file.
    """
    files = [read_tensors(header) for header in read_headers(source, beside=beside, dora=dora, products=products)]
    first, *rest = files
    for other in rest:
        for component, modules in other.components.items():
            first.components.setdefault(component, {}).update(modules)
        first.dtypes.update(other.dtypes)
        first.alphas.update(other.alphas)
    return first


def read_tensors(header: Header) -> LoraFile:
    """The tensors of a file whose structure is sound."""
    components: Components = defaultdict(dict)
    alphas: dict[tuple[str, str], float] = {}
    dtypes: Counter[str] = Counter()
    with reading(header.path), open_safetensors(header.path) as file:
        check_twins(header, file)
        for (component, path), names in header.modules().items():
            if (product := header.product(names)) is not None:
                tensors = {part: file.get_tensor(name) for part, name in names.items()}
                given = float(tensors.pop("alpha").item()) if "alpha" in tensors else None
                dtypes.update(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
                tensors = {part: computable(tensor) for part, tensor in tensors.items()}
                scaling = header.product_scaling(component, path, product.rank, given)
                components[component][path] = ProductFactors(product, tensors, scaling)
                continue
            A, B = file.get_tensor(names["A"]), file.get_tensor(names["B"])
            dtypes.update(str(tensor.dtype).removeprefix("torch.") for tensor in (A, B))
            A, B = computable(A), computable(B)
            alpha = file.get_tensor(names["alpha"]).item() if "alpha" in names else None
            scaling = header.scaling(component, path, A.shape[0], alpha)
            if alpha is not None or header.configs:
                alphas[component, path] = scaling * A.shape[0]
            components[component][path] = LoraFactors(A, B, scaling)
            if stretched := header.axis(names):
                values = computable(file.get_tensor(stretched[0])).float()
                of_base = header.metadata.get(f"reslora.{DORA_NORM}") == "base" and stretched[1] == 0
                shape = (1, -1) if stretched[1] else (-1, 1)
                magnitude = Magnitude(values.reshape(shape), of_base)
                components[component][path] = with_magnitude(components[component][path], magnitude)
    if header.dialect is Dialect.KOHYA and "transformer" in components:
        plain, products = split_products(components["transformer"])
        components["transformer"] = split(plain) | products
    return LoraFile(
        header.path, header.dialect, dict(components), header.metadata, dtypes, alphas, header.configs, header.beside
    )


def check_twins(header: Header, file: safe_open) -> None:
    """Refuse a file that gives one tensor under two names with different contents."""
    twins = [(key, file.get_tensor(first), file.get_tensor(second)) for key, first, second in header.twins()]
    if unlike := [f"{key.component}.{key.path}" for key, *pair in twins if not same_bits(*pair)]:
        raise Unusable(header.path, [given_twice(unlike)])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are stored alike; NaN is like NaN."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
    )
