"""Ranks or whole adapters that matter least go, by the scores of LoRAPrune: the export stays a plain LoRA, and gets
smaller.

    s B A = s sum_k b_k a_k           b_k: column k of B, a_k: row k of A
    I_k   = |g_b * b|^2 + |g_a * a|^2                      importance of rank k, g its gradients (elementwise products)
    S_t   = decay S_(t-1) + (1 - decay) I_t

Exported files have one rank, that of their largest module (`export.writer` says why). So every layer loses the same
share of its ranks, those of lowest score. With `whole`, some layers lose all of theirs, those of the lowest sum, and
are left out of the file. How many are gone after a step is the cubic schedule of `prune`; the ratio is reached exactly.
A rank that is gone is zero on both sides, has no gradient, and never comes back.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.adapter import Adapter
from ...core.attach import AdaptedModel
from ...core.functional import LoraFactors
from ...core.merging.fold import points_of
from ...utils.problems import refuse
from .base import Change, Schedule
from .restart import weights
from .settings import RanksSettings


class Ranks(Schedule):
    """Takes away ranks of every layer, or those of some layers; see the module.

    Args:
        ratio: share of the ranks, or of the layers, that goes.
        decay: of the moving average of scores.
        every: steps between two choices.
        warmup, cooldown: share of the steps before the first choice and after the last.
        whole: take whole adapters rather than ranks of each.
        gradient_scale: returns what gradients are multiplied by in `after_backward`, against underflow.

    Raises:
        BadInput: naming every setting that is out of bounds.
    """

    conflicts = RanksSettings.conflicts

    def __init__(
        self,
        ratio: float = 0.5,
        decay: float = 0.9,
        every: int = 10,
        warmup: float = 0.1,
        cooldown: float = 0.1,
        whole: bool = False,
        gradient_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.settings = RanksSettings(ratio, decay, every, warmup, cooldown, whole)
        self.gradient_scale = gradient_scale
        self.layers: dict[str, tuple[Adapter, str]] = {}  # adapter and layer, by number of the adapter and layer
        self.scores: dict[str, Tensor] = {}
        self.gone: dict[str, Tensor] = {}
        self.total_steps = 0
        self.optimizer: torch.optim.Optimizer | None = None

    def start(
        self, adapters: Sequence[AdaptedModel], total_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        own = [adapted.adapter for adapted in adapters]
        problems = [self.conflicts[s] for s in {str(adapter.shortcut) for adapter in own} & {*self.conflicts}]
        problems += [self.conflicts["convolutions"] for adapter in own if adapter.unjoined]
        sites = [site for adapter in own for site in adapter.sites.values()]
        problems += self.settings.size_problems([site.rank for site in sites], len(sites))
        refuse(f"ranks: {problem}" for problem in dict.fromkeys(problems))
        self.total_steps, self.optimizer = total_steps, optimizer
        self.layers = {f"{n}.{name}": (adapter, name) for n, adapter in enumerate(own) for name in adapter.sites}
        for key, (adapter, name) in self.layers.items():
            rank = len(adapter.lora_A(name))
            self.scores.setdefault(key, torch.zeros(rank))
            self.gone.setdefault(key, torch.zeros(rank, dtype=torch.bool))

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        decay, scale = self.settings.decay, self.gradient_scale()
        for key, (adapter, name) in self.layers.items():
            A, B = adapter.factors(name)
            if A.grad is None or B.grad is None:
                continue
            new = (B * B.grad / scale).square().sum(0) + (A * A.grad / scale).square().sum(1)
            old = self.scores[key].to(new)
            self.scores[key] = torch.where(new.isfinite().all(), decay * old + (1 - decay) * new, old)

    def after_step(self, steps: int) -> Change:
        if self.settings.is_due(steps, self.total_steps):
            self.choose(self.settings.share(steps, self.total_steps))
        self.clear()
        return Change.NOTHING

    def choose(self, share: float) -> None:
        """Let those of lowest score go, up to a share of all that are to go."""
        if self.settings.whole:
            totals = torch.stack([scores.cpu().double().sum() for scores in self.scores.values()])
            gone = self.lowest(totals, torch.stack([own.all() for own in self.gone.values()]), share)
            self.gone = {
                key: torch.full_like(own, bool(all_of_it))
                for (key, own), all_of_it in zip(self.gone.items(), gone, strict=True)
            }
            return
        self.gone = {key: self.lowest(self.scores[key].cpu(), own, share) for key, own in self.gone.items()}

    def lowest(self, scores: Tensor, gone: Tensor, share: float) -> Tensor:
        """Booleans [n], true for what has gone before and, of the others, for the lowest of `scores` [n]."""
        count = int(share * self.settings.cut(len(scores)) + 1e-9)
        places = scores.masked_fill(gone, -1).argsort(stable=True)[: max(count, int(gone.sum()))]
        return torch.zeros_like(gone).index_fill_(0, places, True)

    @torch.no_grad()
    def clear(self) -> None:
        """Set what is gone to zero, as moments may have moved it, in the points too that an optimizer keeps."""
        for key, (adapter, name) in self.layers.items():
            if (gone := self.gone[key]).any():
                places = gone.nonzero().flatten()
                for side, factor in enumerate(weights(adapter, name)):
                    for value in (factor, *points_of(self.optimizer, factor)):
                        value.index_fill_(side, places.to(value.device), 0)

    def exported(self, factors: dict[str, LoraFactors], adapter: int = 0) -> dict[str, LoraFactors]:
        return without_zeros(factors)

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": str(self.settings)}

    def load_state_dict(self, state: dict[str, Any]) -> Change:
        if state != self.state_dict():
            raise ValueError(f"the checkpoint was trained with {state}, got {self.state_dict()}; wanted the same")
        return Change.NOTHING

    def tensors(self) -> dict[str, Tensor]:
        gone = {f"gone.{key}": value.to(torch.uint8) for key, value in self.gone.items()}
        return gone | {f"score.{key}": value for key, value in self.scores.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for key in self.layers:
            self.scores[key] = tensors[f"score.{key}"].clone()
            self.gone[key] = tensors[f"gone.{key}"].bool().cpu()


def without_zeros(factors: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Factors without ranks that add nothing, and without layers that have no other; one layer is left at least."""
    found = {}
    for name, (A, B, scaling) in factors.items():
        stays = A.flatten(1).any(1) & B.flatten(2).any(2).any(0) if B.ndim > 2 else A.any(1) & B.any(0)
        if stays.any():
            found[name] = LoraFactors(A[stays], B[:, stays], scaling)
    return found or dict(factors)
