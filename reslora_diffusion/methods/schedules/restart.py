"""A chain of low-rank links, each trained on what those before it have left over: PeriodicLoRA (arXiv 2402.16141) and
Chain of LoRA (arXiv 2401.04151) are one method, with other settings.

    h = W x + s B A x + s sum_k B_k A_k x          k: links that are finished, and frozen

T steps are `stages` equal parts. At the end of each but the last, a knot is tied, which leaves h as it is:

    B_k <- (1 - m) B    A_k <- A     the finished link, beside the adapter under the same scaling (`Adapter.add_frozen`)
    B   <- m B                       m = momentum; for m = 0 the next link starts as any LoRA does, from a fresh A
    moments <- 0                     and the learning rate begins its schedule again, with a warm-up

Chain of LoRA is m = 0 with a few stages, perhaps of falling `ranks`; PeriodicLoRA has many, and m > 0. W is not
touched, so a quantised base does as well, and what is exported is exact: one LoRA of the sum of the ranks (`reslora
resize` makes it smaller, and says what is lost). With `block`, the links of a block are borrowed like its factors.

As in both papers, `merge` adds finished links to W instead (`absorbed`), for a base in float32: later steps cost what
one link costs. The export is the same, and W is put back when training ends.

Neither paper's code was published. That momentum keeps the function, the summaries of PeriodicLoRA do not say; without
it, every knot would be a jump.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.attach import AdaptedModel
from ...core.functional import LoraFactors
from ...utils.problems import refuse
from ..optimizers.pairs import PairOptimizer
from .absorbed import Absorbed, Link
from .base import Change, Factor, Schedule
from .settings import RestartSettings

Replaced = dict[nn.Parameter, nn.Parameter]


class Restart(Schedule):
    """Ties knots at equal distances; see the module.

    Args:
        stages: links of the chain.
        momentum: m, the share of a finished link that the next one keeps and trains on.
        warmup: steps in which the learning rate rises again after each knot.
        ranks: of each link, the first being the adapter's; scaling stays what it was.
        seed: of the A that later links start from, a function of (seed, link, layer).
        merge: whether finished links are added to the base's weights.

    Raises:
        BadInput: naming everything that is wrong with the settings.
    """

    conflicts = RestartSettings.conflicts

    def __init__(
        self,
        stages: int | None = None,
        momentum: float = 0.0,
        warmup: int = 10,
        ranks: Sequence[int] = (),
        seed: int = 0,
        merge: bool = False,
    ) -> None:
        self.settings = RestartSettings(stages, momentum, warmup, list(ranks), merge)
        self.merge, self.saved_with_adapter = merge, not merge
        self.absorbed: list[Absorbed] = []  # by adapter, where links are merged
        self.stages, self.momentum, self.warmup, self.ranks = self.settings.links, momentum, warmup, list(ranks)
        self.seed, self.stage, self.total_steps = seed, 0, 0
        self.adapters: list[Adapter] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def start(
        self, adapters: Sequence[AdaptedModel], total_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.adapters, self.total_steps = [adapted.adapter for adapted in adapters], total_steps
        self.optimizer = optimizer
        problems = []
        if self.merge and not self.absorbed:
            self.absorbed = [Absorbed(adapter) for adapter in self.adapters]
            problems += [problem for absorbed in self.absorbed for problem in absorbed.problems()]
        for adapter in self.adapters:
            if reason := self.conflicts.get(str(adapter.shortcut)):
                problems.append(reason)
            if adapter.unjoined:
                problems.append(self.conflicts["convolutions"])
            ranks = sorted({site.rank for site in adapter.sites.values()})
            if self.ranks and not self.stage and ranks != self.ranks[:1]:
                problems.append(f"ranks begin with {self.ranks[0]}, and the adapter has {ranks}; wanted the same")
        problems += self.settings.length_problems(total_steps)
        refuse(f"restart: {problem}" for problem in dict.fromkeys(problems))

    # ------------------------------------------------------------------------------------------------- stages

    def knots(self) -> list[int]:
        """Numbers of steps after which a link ends and another begins."""
        return [round(link * self.total_steps / self.stages) for link in range(1, self.stages)]

    def after_step(self, steps: int) -> Change:
        if self.stage >= sum(knot <= steps for knot in self.knots()):
            return Change.NOTHING
        self.tie()
        return Change.PARAMETERS | Change.OPTIMIZER_STATE | Change.LEARNING_RATE

    @torch.no_grad()
    def tie(self) -> None:
        """Freeze the link that is trained, and begin the next."""
        self.stage += 1
        trained = [factor for adapter in self.adapters for name in adapter.sites for factor in weights(adapter, name)]
        for number, adapter in enumerate(self.adapters):
            kept = {name: self.momentum * weights(adapter, name)[1] for name in adapter.sites}
            self.freeze(number, {n: (A.clone(), B - kept[n]) for n in kept for A, B in [weights(adapter, n)]})
            for name, share in kept.items():
                weights(adapter, name)[1].copy_(share)
        if self.optimizer is not None:
            for parameter in (*trained, *(m for adapter in self.adapters for m in magnitudes(adapter))):
                self.optimizer.state.pop(parameter, None)
        self.take_rank()
        if not self.momentum:
            self.draw()

    def freeze(self, number: int, link: Link) -> None:
        """Put a finished link of an adapter where it stays."""
        if self.merge:
            self.absorbed[number].add(link)
        else:
            self.adapters[number].add_frozen(link)

    def exported(self, factors: dict[str, LoraFactors], adapter: int = 0) -> dict[str, LoraFactors]:
        return self.absorbed[adapter].extend(factors) if self.absorbed else factors

    def finish(self) -> None:
        """Put the base back as it was, and the links beside the adapter."""
        absorbed, self.absorbed = self.absorbed, []
        for adapter, own in zip(self.adapters, absorbed, strict=False):
            for link in own.restore():
                like = {name: weights(adapter, name)[0] for name in link}
                adapter.add_frozen({n: (A.to(like[n]), B.to(like[n])) for n, (A, B) in link.items()})

    def draw(self) -> None:
        """A of the next link, kaiming-uniform as PEFT has it."""
        for number, adapter in enumerate(self.adapters):
            for place, name in enumerate(adapter.sites):
                A, _ = weights(adapter, name)
                mixed = np.random.SeedSequence([self.seed, self.stage, number, place]).generate_state(1, np.uint64)
                generator = torch.Generator().manual_seed(int(mixed[0] >> 1))
                A.copy_(nn.init.kaiming_uniform_(torch.empty(A.shape), a=math.sqrt(5), generator=generator))

    def take_rank(self) -> bool:
        """Give the adapters the rank of the current link; returns whether that is another than before."""
        if not self.ranks:
            return False
        replaced: Replaced = {}
        for adapter in self.adapters:
            replaced |= resize(adapter, self.ranks[self.stage])
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
            if isinstance(self.optimizer, PairOptimizer):
                self.optimizer.pairs = [
                    pair._replace(A=replaced.get(pair.A, pair.A), B=replaced.get(pair.B, pair.B))
                    for pair in self.optimizer.pairs
                ]
        return bool(replaced)

    def learning_rate(self, factor: Factor) -> Factor:
        """Every link goes through the whole schedule of the run, in its own share of the steps."""

        def restarted(steps: int) -> float:
            ends = [0, *self.knots(), self.total_steps]
            link = min(sum(knot <= steps for knot in ends[1:]), self.stages - 1)
            begun, length = ends[link], ends[link + 1] - ends[link]
            risen = min(1.0, (steps - begun + 1) / (self.warmup + 1)) if link else 1.0
            return risen * factor(int((steps - begun) * self.total_steps / length))

        return restarted

    # ------------------------------------------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": str(self.settings), "seed": self.seed, "stage": self.stage}

    def load_state_dict(self, state: dict[str, Any]) -> Change:
        own = self.state_dict()
        if state | {"stage": 0} != own | {"stage": 0}:
            raise ValueError(f"the checkpoint was trained with {state}, got {own}; wanted the same")
        self.stage = state["stage"]
        return Change.PARAMETERS if self.take_rank() else Change.NOTHING

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{number}.{name}.{place}.{side}": factor
            for number in range(len(self.adapters))
            for place, link in enumerate(self.chain(number))
            for name, pair in link.items()
            for side, factor in zip("AB", pair, strict=True)
        }

    def chain(self, number: int) -> list[Link]:
        """The finished links of an adapter."""
        if self.absorbed:
            return [*self.absorbed[number].links]
        frozen = self.adapters[number].frozen
        return [{name: links[place] for name, links in frozen.items()} for place in range(self.stage if frozen else 0)]

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for number, adapter in enumerate(self.adapters):
            adapter.frozen = {}
            if self.absorbed:
                self.absorbed[number].restore()
            for link in range(self.stage):
                found = {}
                for name in adapter.sites:
                    own = weights(adapter, name)
                    A, B = (tensors[f"{number}.{name}.{link}.{side}"].to(own[0]) for side in "AB")
                    found[name] = A, B
                self.freeze(number, found)


def weights(adapter: Adapter, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """`(lora_A, lora_B)` of a layer, as they are trained."""
    layer: Any = adapter.layers[name]
    return layer.lora_A[adapter.adapter_name].weight, layer.lora_B[adapter.adapter_name].weight


def magnitudes(adapter: Adapter) -> list[nn.Parameter]:
    """The magnitudes of a DoRA, which goes on through all links; none of another adapter."""
    sides: list[Any] = [layer.lora_magnitude_vector for layer in adapter.layers.values()]
    return [side[adapter.adapter_name].weight for side in sides if adapter.adapter_name in side]


def resize(adapter: Adapter, rank: int) -> Replaced:
    """Give every layer factors of another rank, with unset values; scaling stays. Returns what replaces what."""
    key, replaced = adapter.adapter_name, {}
    config = adapter.own_config()
    for name, site in adapter.sites.items():
        layer: Any = adapter.layers[name]
        if site.rank == rank:
            continue
        for module, shape in (
            (layer.lora_A[key], (rank, site.in_features)),
            (layer.lora_B[key], (site.out_features, rank)),
        ):
            old = module.weight
            module.weight = replaced[old] = nn.Parameter(old.new_zeros(shape), requires_grad=old.requires_grad)
            module.out_features, module.in_features = shape
        layer.r[key], adapter.sites[name] = rank, replace(site, rank=rank)
        layer.lora_alpha[key] = layer.scaling[key] * (rank**0.5 if config.use_rslora else rank)
        config.rank_pattern = {**(config.rank_pattern or {}), f"^{name}": rank}
        config.alpha_pattern = {**(config.alpha_pattern or {}), f"^{name}": layer.lora_alpha[key]}
    if replaced:
        adapter.link()
    return replaced
