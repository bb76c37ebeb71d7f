"""Statistics of activations that merges need, gathered while batches run through the unmerged model.

For a layer that reads x [T, in] and to which its shortcut adds t [T, r] at the bottleneck (`input`: A_n x_{n-1};
`middle`: z_{n-1} + z_{n-2} + ...), over all calibration tokens:

    second moments    S = sum x x^T             [in, in]
    cross moments     P = sum t x^T             [r, in]
    alignment         a_k = <x_{n-k}, x> / <x, x>, for each predecessor k
    norms             f = mean over forwards of ||x||_F (`input`) or ||A x||_F (`middle`), for the paper's merge

S is summed once for the projections that read one tensor. Sums are in float32 or better on the device of x, and several
processes add theirs up.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...utils.files import atomic_write
from ..adapter import Adapter
from ..functional import version_of
from ..layer import AdaptedLayer
from ..sharding import is_distributed


def all_reduce(values: list[Tensor]) -> None:
    """Sum over processes, in place."""
    if is_distributed():
        for value in values:
            torch.distributed.all_reduce(value)


class Sums(ABC):
    """Base of all observers: `sums[kind][name]` over the tokens that count, which can be saved and loaded."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.sums: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        self.mask: Tensor | None = None

    def start_batch(self, mask: Tensor | None = None) -> None:
        """End the last batch and begin another, whose tokens `mask` [...] are real. Other shapes are not masked."""
        self.mask = None if mask is None else mask.bool()

    @abstractmethod
    def see(self, layer: AdaptedLayer, x: Tensor, values: list[tuple[str, Tensor]]) -> None:
        """Add what a layer has read: x [..., in], and the `values` of earlier layers by name."""

    def rows(self, x: Tensor) -> Tensor:
        """[..., d] -> [T, d], tokens that count, in float32 or better."""
        if self.mask is not None and self.mask.shape == x.shape[:-1]:
            x = x[self.mask.to(x.device)]
        return x.detach().flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))

    def add(self, kind: str, name: str, value: Tensor) -> None:
        sums = self.sums[kind]
        if name in sums:
            sums[name] += value
        else:
            sums[name] = value

    def all_reduce(self) -> None:
        all_reduce([value for sums in self.sums.values() for value in sums.values()])

    def save(self, path: Path, batches: int) -> None:
        """Write the sums over the first `batches` batches; an earlier file stays until this one is whole."""
        self.start_batch()  # the last batch is over
        tensors = {
            f"{kind}/{name}": value.detach().cpu().contiguous()
            for kind, sums in self.sums.items()
            for name, value in sums.items()
        }
        with atomic_write(path) as fresh:
            save_file(tensors, fresh, metadata={"batches": str(batches)})

    def load(self, path: Path, device: torch.device) -> int:
        """Inverse of `save`; returns the number of batches, 0 if there is no file.

        Raises:
            ValueError: the file is of an earlier version, whose sums are shared in another way.
        """
        if not path.is_file():
            return 0
        with safe_open(path, framework="pt", device=str(device)) as file:
            batches = (file.metadata() or {}).get("batches")
            if batches is None:
                raise ValueError(f"{path} was written by an earlier version; remove it and calibrate again")
            for key in file.keys():
                kind, _, name = key.partition("/")
                self.sums[kind][name] = file.get_tensor(key)
        return int(batches)


class Moments(Sums):
    """An observer that sums S (`second`), P (`cross`) and the products of a (`inner`) for `sites`.

    An S stands under the names of all layers that read one tensor in a batch, one on each line.
    """

    def __init__(self, adapter: Adapter, sites: set[str]) -> None:
        super().__init__(adapter)
        self.sites = sites
        self.second, self.cross, self.inner = (self.sums[kind] for kind in ("second", "cross", "inner"))
        self.readers: dict[int, tuple[Tensor, int | None, list[str]]] = {}  # of each tensor of a batch
        self.inputs: dict[str, Tensor] = {}  # of that batch, by layer

    def start_batch(self, mask: Tensor | None = None) -> None:
        for x, version, names in self.readers.values():
            if version_of(x) != version:
                raise RuntimeError(f"what {names[0]} read was changed in place after it; change a copy of it")
            rows = self.rows(x)
            self.add("second", "\n".join(names), rows.T @ rows)
        super().start_batch(mask)
        self.readers.clear()
        self.inputs.clear()

    def see(self, layer: AdaptedLayer, x: Tensor, values: list[tuple[str, Tensor]]) -> None:
        path = self.adapter.by_data
        others = path.sources(layer, x, values, self.inputs)
        if layer.name not in self.sites or not values:
            return
        self.readers.setdefault(id(x), (x, version_of(x), []))[-1].append(layer.name)
        rows = self.rows(x)
        lora_A = self.adapter.lora_A(layer.name).detach().to(rows.dtype)
        added = path.added(lora_A, [self.rows(value) for _, value in values])
        self.add("cross", layer.name, added.T @ rows)
        self.add("inner", f"{layer.name}/", rows.square().sum())
        for name, other in others.items():
            if other.shape == x.shape:
                product = rows.square().sum() if other is x else (self.rows(other).to(rows.device) * rows).sum()
                self.add("inner", f"{layer.name}/{name}", product)

    def second_of(self, name: str) -> Tensor:
        """S of a layer: nearly always one sum, as layers that read one tensor do so in every batch."""
        first, *more = (S for names, S in self.second.items() for reader in names.split("\n") if reader == name)
        return sum(more, start=first)

    def alignment(self, name: str, other: str) -> Tensor | float:
        """a of what a layer reads by the lora_A of `other`; 0 where it has not read it."""
        own, product = self.inner[f"{name}/"], self.inner.get(f"{name}/{other}")
        return product / own if product is not None and own > 0 else 0.0


class Norms(Sums):
    """An observer that averages f over forwards, for every layer."""

    def see(self, layer: AdaptedLayer, x: Tensor, values: list[tuple[str, Tensor]]) -> None:
        rows = self.rows(x)
        rows = self.adapter.by_data.normed(rows, self.adapter.lora_A(layer.name).detach().to(rows.dtype))
        self.add("norm", layer.name, rows.norm())
        self.add("forwards", layer.name, rows.new_ones(()))

    def mean(self, name: str) -> float:
        return (self.sums["norm"][name] / self.sums["forwards"][name]).item()


class OutputErrors(Sums):
    """An observer of what merging changes: sum ||s B (t - C x)||^2 over sum ||s B (A x + t)||^2, for every layer."""

    def __init__(self, adapter: Adapter, corrections: dict[str, Tensor]) -> None:
        super().__init__(adapter)
        self.corrections = corrections

    def see(self, layer: AdaptedLayer, x: Tensor, values: list[tuple[str, Tensor]]) -> None:
        rows = self.rows(x)
        lora_A, lora_B = (factor.detach().to(rows.dtype) for factor in self.adapter.factors(layer.name))
        own = rows @ lora_A.T
        read = [self.rows(value) for _, value in values]
        added = self.adapter.by_data.added(lora_A, read) if read else torch.zeros_like(own)
        gram = lora_B.T @ lora_B
        error, whole = added - rows @ self.corrections[layer.name].to(rows).T, own + added
        self.add("lost", layer.name, ((error @ gram) * error).sum())
        self.add("whole", layer.name, ((whole @ gram) * whole).sum())

    def relative(self) -> dict[str, float]:
        """The square root of that ratio, by layer."""
        return {
            name: float((self.sums["lost"][name] / whole).clamp_min(0).sqrt()) if whole > 0 else 0.0
            for name, whole in self.sums["whole"].items()
        }
