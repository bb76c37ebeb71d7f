"""What the merges need to know of the activations, gathered while batches run through the unmerged model.

For a layer that reads x [T, in] and to which its shortcut adds t [T, r] at the bottleneck (`input`: A_n x_{n-1};
`middle`: z_{n-1} + z_{n-2} + ...), over all calibration tokens:

    second moments    S = sum x x^T             [in, in]
    cross moments     P = sum t x^T             [r, in]
    alignment         a_k = <x_{n-k}, x> / <x, x>, for each predecessor k
    norms             f = mean over forwards of ||x||_F (`input`) or ||A x||_F (`middle`), for the paper's merge

S is kept once for the projections that read the same x, sums are in float32 or better on the device of x, and several
processes add theirs up.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...utils.files import atomic_write
from ..adapter import Adapter
from ..layer import AdaptedLayer
from ..sharding import is_distributed


def flat(x: Tensor) -> Tensor:
    """[..., d] -> [T, d] in float32 or better."""
    return x.detach().flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))


def all_reduce(values: list[Tensor]) -> None:
    """Sum over processes, in place."""
    if is_distributed():
        for value in values:
            torch.distributed.all_reduce(value)


@dataclass
class Tokens:
    """What all observers share: which tokens count."""

    adapter: Adapter
    mask: Tensor | None = field(default=None, kw_only=True)

    def start_batch(self, mask: Tensor | None = None) -> None:
        """Args: mask [...]: which tokens of the batch are real; sequences of another shape are not touched by it."""
        self.mask = None if mask is None else mask.bool()

    def rows(self, x: Tensor) -> Tensor:
        """[..., d] -> [T, d], tokens that count, in float32 or better."""
        if self.mask is not None and self.mask.shape == x.shape[:-1]:
            x = x[self.mask.to(x.device)]
        return flat(x)


class Statistics(Protocol):
    """An observer whose sums can be put down and taken up again."""

    def tensors(self) -> dict[str, Tensor]: ...
    def facts(self) -> dict[str, Any]: ...
    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None: ...


def save_statistics(path: Path, statistics: Statistics, batches: int) -> None:
    """Write the sums over the first `batches` batches; an earlier file stays until this one is whole."""
    facts = {"batches": batches, **statistics.facts()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in statistics.tensors().items()}
    with atomic_write(path) as fresh:
        save_file(tensors, fresh, metadata={"facts": json.dumps(facts)})


def load_statistics(path: Path, statistics: Statistics, device: torch.device) -> int:
    """Inverse of `save_statistics`; returns the number of batches, 0 if there is no file."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt", device=str(device)) as file:
        facts = json.loads(file.metadata()["facts"])
        statistics.restore({name: file.get_tensor(name) for name in file.keys()}, facts)
    return int(facts["batches"])


@dataclass
class Moments(Tokens):
    """An observer that sums S, P and a for `sites`."""

    sites: set[str]
    second: dict[str, Tensor] = field(default_factory=dict)
    cross: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    leader: dict[str, str] = field(default_factory=dict)
    seen: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def start_batch(self, mask: Tensor | None = None) -> None:
        super().start_batch(mask)
        self.seen.clear()
        self.inputs.clear()

    def see(self, layer: AdaptedLayer, x: Tensor, values: list[tuple[str, Tensor]]) -> None:
        others = self.adapter.path.sources(layer, x, values, self.inputs)
        if layer.name not in self.sites or not values:
            return
        rows = self.rows(x)
        self.add_second(layer.name, x, rows)
        lora_A = self.adapter.lora_A(layer.name).detach().to(rows.dtype)
        added = self.adapter.path.added(lora_A, [self.rows(value) for _, value in values])
        add(self.cross, layer.name, added.T @ rows)
        inner = self.inner[layer.name]
        add(inner, "", rows.square().sum())
        for name, other in others.items():
            if other.shape == x.shape:
                add(inner, name, rows.square().sum() if other is x else (self.rows(other) * rows).sum())

    def add_second(self, name: str, x: Tensor, rows: Tensor) -> None:
        """Add x x^T to the sum of the first layer that read this very tensor; split sums whose layers part ways."""
        leader, _ = self.seen.setdefault(id(x), (name, x))
        known = self.leader.setdefault(name, leader)
        if known != leader:
            self.second[name] = self.second[known].clone() if known != name else self.second[name]
            self.leader[name] = leader = name
        if leader == name:
            add(self.second, name, rows.T @ rows)

    def second_of(self, name: str) -> Tensor:
        return self.second[self.leader[name]]

    def tensors(self) -> dict[str, Tensor]:
        inner = {f"inner/{name}/{k}": v for name, found in self.inner.items() for k, v in found.items()}
        second = {f"second/{name}": v for name, v in self.second.items()}
        return second | {f"cross/{name}": v for name, v in self.cross.items()} | inner

    def facts(self) -> dict[str, Any]:
        return {"leader": self.leader}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.leader = facts["leader"]
        for key, value in tensors.items():
            kind, name, *rest = key.split("/")
            if kind == "inner":
                self.inner[name][rest[0]] = value
            else:
                (self.second if kind == "second" else self.cross)[name] = value

    def all_reduce(self) -> None:
        all_reduce([*self.second.values(), *self.cross.values(), *(v for d in self.inner.values() for v in d.values())])


@dataclass
class Norms(Tokens):
    """An observer that averages f over forwards, for every layer."""

    total: dict[str, Tensor] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def see(self, layer: AdaptedLayer, x: Tensor, values: list[tuple[str, Tensor]]) -> None:
        rows = self.rows(x)
        rows = self.adapter.path.normed(rows, self.adapter.lora_A(layer.name).detach().to(rows.dtype))
        add(self.total, layer.name, rows.norm())
        self.count[layer.name] = self.count.get(layer.name, 0) + 1

    def mean(self, name: str) -> float:
        return (self.total[name] / self.count[name]).item()

    def tensors(self) -> dict[str, Tensor]:
        return self.total

    def facts(self) -> dict[str, Any]:
        return {"count": self.count}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.total, self.count = dict(tensors), facts["count"]

    def all_reduce(self) -> None:
        """A ratio of sums over processes is the ratio of their means: every process saw as many forwards."""
        all_reduce(list(self.total.values()))


@dataclass
class OutputErrors(Tokens):
    """An observer of what merging changes: sum ||s B (t - C x)||^2 over sum ||s B (A x + t)||^2, for every layer."""

    corrections: dict[str, Tensor]
    lost: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)

    def see(self, layer: AdaptedLayer, x: Tensor, values: list[tuple[str, Tensor]]) -> None:
        rows = self.rows(x)
        lora_A, lora_B = (factor.detach().to(rows.dtype) for factor in self.adapter.factors(layer.name))
        own = rows @ lora_A.T
        read = [self.rows(value) for _, value in values]
        added = self.adapter.path.added(lora_A, read) if read else torch.zeros_like(own)
        gram = lora_B.T @ lora_B
        error, kept = added - rows @ self.corrections[layer.name].to(rows).T, own + added
        add(self.lost, layer.name, ((error @ gram) * error).sum())
        add(self.whole, layer.name, ((kept @ gram) * kept).sum())

    def all_reduce(self) -> None:
        all_reduce([*self.lost.values(), *self.whole.values()])

    def relative(self) -> dict[str, float]:
        return {
            name: float((self.lost[name] / self.whole[name]).clamp_min(0).sqrt()) if self.whole[name] > 0 else 0.0
            for name in self.whole
        }


def add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value
