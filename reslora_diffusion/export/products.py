"""The updates of LoHa and LoKr, computed, and cut to plain LoRA. `product_shapes` has the formulas."""

from collections.abc import Mapping

import torch
from torch import Tensor

from reslora_diffusion.core.functional import LoraFactors

from .factors import Components, Loss, from_matrix
from .flux import parts_of
from .limits import CheckFailed
from .product_shapes import LOHA, LOKR, Product
from .progress import progress


class ProductFactors(LoraFactors):
    """A LoHa or LoKr of one layer. It has no factors of low rank: `lora_A` and `lora_B` are without data, on the meta
    device, and say the layer's shape alone. `update` is what it adds to a weight."""

    def __new__(cls, product: Product, parts: Mapping[str, Tensor], scaling: float, rows: slice = slice(None)):  # type: ignore[no-untyped-def]
        out, *inside = product.shape
        out = len(range(out)[rows])
        trailing = (1,) * (len(inside) - 1)
        made = super().__new__(
            cls,
            torch.empty(1, *inside, device="meta"),
            torch.empty(out, 1, *trailing, device="meta"),
            scaling,
        )
        made.__dict__.update(product=product, parts=dict(parts), rows=rows)
        return made

    @property
    def kind(self) -> str:
        return self.__dict__["product"].kind

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file."""
        return self.__dict__["parts"]

    def of_rows(self, rows: slice) -> "ProductFactors":
        """The factors of some of the layer's outputs."""
        return ProductFactors(self.__dict__["product"], self.tensors, self.scaling, rows)

    def update(self) -> Tensor:
        """Float64 dW [out, in, ...]."""
        parts = {name: tensor.double() for name, tensor in self.tensors.items()}
        if self.kind == LOHA:
            dense = product(parts, "hada_w1", "hada_t1") * product(parts, "hada_w2", "hada_t2")
        else:
            one, two = product(parts, "lokr_w1", None), product(parts, "lokr_w2", "lokr_t2")
            dense = torch.kron(one.reshape(*one.shape, *(1,) * (two.ndim - 2)), two.contiguous())
        return self.scaling * dense[self.__dict__["rows"]]

    def singular_values(self) -> Tensor:
        """Singular values of dW, largest first: of a Kronecker product the products of both factors' values."""
        if self.kind == LOKR and self.__dict__["rows"] == slice(None):
            parts = {name: tensor.double() for name, tensor in self.tensors.items()}
            one, two = product(parts, "lokr_w1", None), product(parts, "lokr_w2", "lokr_t2")
            values = torch.outer(torch.linalg.svdvals(one), torch.linalg.svdvals(two.flatten(1))).flatten()
            return abs(self.scaling) * values.sort(descending=True).values
        D = self.update().flatten(1)
        gram = D @ D.T if len(D) <= D.shape[1] else D.T @ D
        return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()


def product(parts: Mapping[str, Tensor], name: str, middle: str | None) -> Tensor:
    """One of the two things that are multiplied: whole, of two factors, or of two factors around a middle tensor."""
    if name in parts:
        return parts[name]
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    if middle in parts:
        return torch.einsum("ij...,ip,jr->pr...", parts[str(middle)], a, b)
    return (a @ b.flatten(1)).reshape(len(a), *b.shape[1:])


def products_in(components: Components) -> list[tuple[str, str]]:
    """Component and path of the layers that are no plain LoRA."""
    return [
        (c, path) for c, modules in components.items() for path, f in modules.items() if isinstance(f, ProductFactors)
    ]


def split_products(modules: Mapping[str, LoraFactors]) -> tuple[dict[str, LoraFactors], dict[str, LoraFactors]]:
    """Modules of FLUX.1 in Black Forest Labs' names: those that are plain LoRA, as they are, and the others by the
    layers of diffusers, each with its rows."""
    plain: dict[str, LoraFactors] = {}
    found: dict[str, LoraFactors] = {}
    for path, factors in modules.items():
        if not isinstance(factors, ProductFactors):
            plain[path] = factors
            continue
        first = 0
        for part, rows in parts_of(path, len(factors.lora_B)).items():
            found[part] = factors.of_rows(slice(first, first + rows))
            first += rows
    return plain, found


def plain_products(components: Components, rank: int) -> tuple[Components, dict[tuple[str, str], Loss]]:
    """The nearest plain LoRA of a rank, and what it loses of each layer; plain layers stay as they are."""
    plain: Components = {component: dict(modules) for component, modules in components.items()}
    losses = {}
    for component, path in progress(products_in(components), f"cutting to rank {rank}"):
        factors = components[component][path]
        assert isinstance(factors, ProductFactors)
        dense = factors.update()
        if not dense.isfinite().all():
            raise CheckFailed(f"{component}.{path} holds NaN or infinity")
        plain[component][path], losses[component, path] = from_matrix(dense, min(rank, len(dense), dense[0].numel()))
    return plain, losses
