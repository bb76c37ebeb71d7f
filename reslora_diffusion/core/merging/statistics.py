"""Statistics of activations that merges need, gathered while batches run through the unmerged model.

For a layer that reads x [T, in] and to which its shortcut adds t [T, r] at the bottleneck (`input`: A_n x_{n-1};
`middle`: z_{n-1} + z_{n-2} + ...), over all calibration tokens:

    second moments    S = sum x x^T             [in, in]
    cross moments     P = sum t x^T             [r, in]
    alignment         a_k = <x_{n-k}, x> / <x, x>, for each predecessor k
    norms             f = mean over forwards of ||x||_F (`input`) or ||A x||_F (`middle`), for the paper's merge

S is summed once for the projections that read the same x. Sums are in float32 or better on the device of x, and several
processes add theirs up.
"""

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...utils.files import atomic_write
from ..adapter import Adapter
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
        """Args: mask [...]: which tokens of the batch are real; sequences of another shape are not touched by it."""
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

    def facts(self) -> dict[str, Any]:
        """Attributes that are saved beside the sums, as JSON."""
        return {}

    def save(self, path: Path, batches: int) -> None:
        """Write the sums over the first `batches` batches; an earlier file stays until this one is whole."""
        self.start_batch()  # the last batch is over
        tensors = {
            f"{kind}/{name}": value.detach().cpu().contiguous()
            for kind, sums in self.sums.items()
            for name, value in sums.items()
        }
        with atomic_write(path) as fresh:
            save_file(tensors, fresh, metadata={"facts": json.dumps({"batches": batches, **self.facts()})})

    def load(self, path: Path, device: torch.device) -> int:
        """Inverse of `save`; returns the number of batches, 0 if there is no file.

        Raises:
            ValueError: the file is of an earlier version, whose sums have other names.
        """
        if not path.is_file():
            return 0
        with safe_open(path, framework="pt", device=str(device)) as file:
            facts = json.loads(file.metadata()["facts"])
            for key in file.keys():
                kind, slash, name = key.partition("/")
                if not slash:
                    raise ValueError(f"{path} was written by an earlier version; remove it and calibrate again")
                self.sums[kind][name] = file.get_tensor(key)
        for name in self.facts():
            setattr(self, name, facts[name])
        return int(facts["batches"])


class Moments(Sums):
    """An observer that sums S (`second`), P (`cross`) and the products of a (`inner`) for `sites`."""

    def __init__(self, adapter: Adapter, sites: set[str]) -> None:
        super().__init__(adapter)
        self.sites = sites
        self.second, self.cross, self.inner = (self.sums[kind] for kind in ("second", "cross", "inner"))
        self.leader: dict[str, str] = {}  # of the layers that read one tensor, the one under whose name S is
        # Of one batch: the first layer that read each tensor, all that read, and the tensors in each sum.
        self.first: dict[int, tuple[str, Tensor]] = {}
        self.read: set[str] = set()
        self.added: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.started: set[str] = set()  # sums that began in this batch
        self.inputs: dict[str, Tensor] = {}

    def start_batch(self, mask: Tensor | None = None) -> None:
        for name, leader in self.leader.items():
            if leader in self.added and name not in self.read:
                self.part(name)
        super().start_batch(mask)
        for of_a_batch in (self.first, self.read, self.added, self.started, self.inputs):
            of_a_batch.clear()

    def see(self, layer: AdaptedLayer, x: Tensor, values: list[tuple[str, Tensor]]) -> None:
        path = self.adapter.by_data
        others = path.sources(layer, x, values, self.inputs)
        if layer.name not in self.sites or not values:
            return
        rows = self.rows(x)
        self.add_second(layer.name, x, rows)
        lora_A = self.adapter.lora_A(layer.name).detach().to(rows.dtype)
        added = path.added(lora_A, [self.rows(value) for _, value in values])
        self.add("cross", layer.name, added.T @ rows)
        self.add("inner", f"{layer.name}/", rows.square().sum())
        for name, other in others.items():
            if other.shape == x.shape:
                product = rows.square().sum() if other is x else (self.rows(other).to(rows.device) * rows).sum()
                self.add("inner", f"{layer.name}/{name}", product)

    def add_second(self, name: str, x: Tensor, rows: Tensor) -> None:
        """Add x x^T to the sum of the first layer that read this very tensor.

        Layers share a sum as long as they read the same tensors in all batches.
        """
        self.read.add(name)
        leader, _ = self.first.setdefault(id(x), (name, x))
        known = self.leader.setdefault(name, leader if leader in self.started else name)
        if known not in (leader, name):
            self.part(name)
        if self.leader[name] == name:
            if name not in self.second:
                self.started.add(name)
            self.add("second", name, rows.T @ rows)
            self.added[name].append(x)

    def part(self, name: str) -> None:
        """Give a layer a sum of its own: the one that it has shared, without this batch."""
        leader = self.leader[name]
        second = self.second[leader].clone()
        for x in self.added[leader]:
            rows = self.rows(x)
            second -= rows.T @ rows
        self.second[name], self.leader[name] = second, name

    def second_of(self, name: str) -> Tensor:
        return self.second[self.leader[name]]

    def alignment(self, name: str, other: str) -> Tensor | float:
        """a of what a layer reads by the lora_A of `other`; 0 where it has not read it."""
        own, product = self.inner[f"{name}/"], self.inner.get(f"{name}/{other}")
        return product / own if product is not None and own > 0 else 0.0

    def facts(self) -> dict[str, Any]:
        return {"leader": self.leader}


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
