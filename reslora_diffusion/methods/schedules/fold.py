"""Folding the shortcut into plain LoRA after a share of the steps, and training on (`core.merging.fold`).

What is trained from there on is what will be exported, so the merge costs nothing in the end. docs/LOG.md has what that
is worth beside a merge after training.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...core.attach import AdaptedModel, get_adapter
from ...core.merging.fold import handover
from ...rules import MergeMethod, Shortcut
from ..optimizers.pairs import PairOptimizer, factor_pairs
from .base import Change, Schedule
from .settings import FoldSettings


class Fold(Schedule):
    """Folds once, at the first step from `at` of the steps on: resumed with another length, a run may have passed it.

    Args:
        at: share of the steps, between 0 and 1; None never folds, and only takes up what is folded.
        calibrate: finds what the merge of `input` and `middle` needs, at that moment; `block` and `none` need nothing.
        optimizer: gets the parameters of a folded `block` in the place of the old ones.

    Raises:
        ValueError: `at` is no share.
    """

    conflicts = FoldSettings.conflicts

    def __init__(
        self,
        at: float | None = 0.85,
        calibrate: Callable[[], object] = lambda: None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if at is not None and not 0 < at < 1:
            raise ValueError(f"fold: got at={at}, wanted a share of the steps between 0 and 1")
        self.at, self.calibrate, self.optimizer = at, calibrate, optimizer
        self.adapters: Sequence[AdaptedModel] = ()
        self.fold_at: int | None = None  # number of steps
        self.folded = False

    def start(
        self, adapters: Sequence[AdaptedModel], total_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.adapters, self.optimizer = adapters, optimizer or self.optimizer
        self.fold_at = None if self.at is None else max(1, round(self.at * total_steps))

    def after_step(self, steps: int) -> Change:
        if self.folded or self.fold_at is None or steps < self.fold_at:
            return Change.NOTHING
        self.calibrate()
        return self.fold()

    def fold(self) -> Change:
        """Fold now; calibrated adapters only."""
        wider = any(adapted.adapter.shortcut is Shortcut.BLOCK for adapted in self.adapters)
        for adapted in self.adapters:
            handover(adapted.model, adapted.adapter_name, self.optimizer)
        if wider and isinstance(self.optimizer, PairOptimizer):  # whose state is not that of factors side by side
            self.optimizer.pairs = [p for one in self.adapters for p in factor_pairs(one.model, one.adapter_name)]
            for pair in self.optimizer.pairs:
                self.optimizer.state.pop(pair.A, None)
                self.optimizer.state.pop(pair.B, None)
        self.folded = True
        return Change.PARAMETERS | Change.OPTIMIZER_STATE

    def state_dict(self) -> dict[str, Any]:
        return {"folded": self.folded}

    def load_state_dict(self, state: dict[str, Any]) -> Change:
        """Give the adapters the form that folding leaves; no calibration is needed, as values are loaded afterwards."""
        if "folded" not in state:
            raise ValueError(f"the checkpoint was trained with {state}, got the schedule fold; wanted the same")
        if not state["folded"] or self.folded:
            return Change.NOTHING
        adapters = [get_adapter(adapted.model, adapted.adapter_name) for adapted in self.adapters]
        methods = [adapter.config.merge_method for adapter in adapters]
        for adapter in adapters:
            adapter.own_config().merge_method = MergeMethod.DROP
        change = self.fold()
        for adapter, method in zip(adapters, methods, strict=True):
            adapter.config.merge_method = method
        return change
