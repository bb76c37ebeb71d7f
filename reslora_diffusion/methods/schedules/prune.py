"""LoRAPrune (arXiv 2305.18403): heads and channels that matter least are masked while LoRA trains, and cut out then.

    S_t = decay S_(t-1) + (1 - decay) I_t           score of each group: moving average of `pruning.scores`
    n_t = n (1 - (1 - u)^3)                         groups of a structure that are masked, of n in the end
    u   = (t - t_w) / (T - t_w - t_c), in [0, 1]    t_w, t_c: `warmup` and `cooldown` of the T steps

Every `every` steps the n_t groups of lowest score are masked, in each structure by itself, and those of before are
opened again unless they are among them. n is the whole number nearest to `ratio` times the groups there are (of two the
smaller), and is reached when u = 1, whatever `every` is; from there on the masks stay. A mask multiplies the input of
the layer that the groups end in by 0: that is the model without them, and `slim` cuts them out.

The authors' code masks by score / norm and by |G V|; here the paper's I is followed. It leaves the first tenth of the
layers and the last whole. A Llama's configuration has one width for all layers, so what spares some of them is loaded
by `load_pruned` alone: by default nothing is spared where a configuration can state the width, and the first and the
last block where none can (`spare`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.attach import AdaptedModel
from ...utils.problems import refuse
from ..pruning.scores import score
from ..pruning.slicing import Slimmed, refuse_quantised, slim
from ..pruning.structures import COLUMNS, Structure, chosen, find_structures, whole_base
from .absorbed import tied_layers
from .base import Change, Schedule
from .settings import PruneSettings


class Mask:
    """A forward pre-hook that multiplies the input [..., in] of a layer by `open` [in]."""

    def __init__(self, size: int) -> None:
        self.open = torch.ones(size)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        if self.open.device != x.device or self.open.dtype != x.dtype:
            self.open = self.open.to(x)
        return x * self.open, *args[1:]


class Prune(Schedule):
    """Masks more and more heads and channels; see the module.

    Args:
        ratio: share of the heads and channels that goes.
        parts: "heads", "channels" or "all".
        spare: how many of the first and of the last blocks are left whole; None decides by the configuration.
        decay: of the moving average of scores.
        every: steps between two choices of what is masked.
        warmup, cooldown: share of the steps before the first choice and after the last.
        gradient_scale: returns what gradients are multiplied by in `after_backward`, against underflow.

    Raises:
        BadInput: naming every setting that is out of bounds.
    """

    conflicts = PruneSettings.conflicts
    leaves_lora = False

    def __init__(
        self,
        ratio: float = 0.5,
        parts: str = "all",
        spare: int | None = None,
        decay: float = 0.9,
        every: int = 10,
        warmup: float = 0.1,
        cooldown: float = 0.1,
        gradient_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.settings = PruneSettings(ratio, decay, every, warmup, cooldown, parts, spare)
        self.gradient_scale = gradient_scale
        self.adapted: AdaptedModel
        self.all: list[Structure] = []  # of the model
        self.structures: list[Structure] = []  # that are pruned
        self.scores: dict[str, Tensor] = {}
        self.gone: dict[str, Tensor] = {}  # by structure, which of its groups are masked
        self.masks: dict[str, Mask] = {}  # by layer
        self.hooks: list[Any] = []
        self.total_steps = 0
        self.done = False  # whether the ratio is reached

    def start(
        self, adapters: Sequence[AdaptedModel], total_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        refuse(["prune: got adapters on several models; wanted one"] if len(adapters) != 1 else [])
        self.adapted, self.total_steps = adapters[0], total_steps
        adapter, base = self.adapter, whole_base(self.adapted.model)
        problems = [self.conflicts[s] for s in [str(adapter.shortcut)] if s in self.conflicts]
        self.all = find_structures(base)
        self.structures = chosen(self.all, self.settings.parts, self.settings.spare)
        problems += self.settings.structure_problems(self.all, self.structures, adapter.sites)
        if tied := tied_layers(adapter, base):
            problems.append(
                f"the adapter is merged at the end, and would change what shares its weight with {', '.join(tied)}; "
                "wanted other layers"
            )
        refuse(f"prune: {problem}" for problem in problems)
        refuse_quantised(base, [name for structure in self.structures for name in structure.layers])
        for structure in self.structures:
            self.scores.setdefault(structure.name, torch.zeros(structure.count))
            self.gone.setdefault(structure.name, torch.zeros(structure.count, dtype=torch.bool))
        self.hang()

    @property
    def adapter(self) -> Adapter:
        return self.adapted.adapter

    def after_backward(self, step: int) -> None:
        decay = self.settings.decay
        found = score(self.adapter, self.structures, self.gradient_scale())
        for structure, new in zip(self.structures, found, strict=True):
            old = self.scores[structure.name].to(new)
            mixed = decay * old + (1 - decay) * new
            self.scores[structure.name] = torch.where(new.isfinite().all(), mixed, old)

    def after_step(self, steps: int) -> Change:
        if not self.settings.is_due(steps, self.total_steps):
            return Change.NOTHING
        share = self.settings.share(steps, self.total_steps)
        for structure in self.structures:
            count = int(share * self.settings.cut(structure.count) + 1e-9)
            lowest = self.scores[structure.name].argsort(stable=True)[:count].cpu()
            self.gone[structure.name] = torch.zeros(structure.count, dtype=torch.bool).index_fill_(0, lowest, True)
        self.done = share == 1
        self.mask()
        return Change.NOTHING

    # -------------------------------------------------------------------------------------------------- masks

    def hang(self) -> None:
        """Put a mask before every layer that groups end in."""
        self.lift()
        base = whole_base(self.adapted.model)
        for structure in self.structures:
            for slice in structure.slices:
                layer = base.get_submodule(slice.layer)
                if slice.axis == COLUMNS and not isinstance(layer, nn.Embedding) and slice.layer not in self.masks:
                    mask = self.masks[slice.layer] = Mask(len(slice.group))
                    self.hooks.append(layer.register_forward_pre_hook(mask))
        self.mask()

    def mask(self) -> None:
        """Let the masks say what is gone."""
        closed: dict[str, Tensor] = {}
        for structure in self.structures:
            gone = self.gone[structure.name]
            for layer, axis, group in structure.slices:
                if axis == COLUMNS and layer in self.masks:
                    own = (group >= 0) & gone[group.clamp(min=0)]
                    closed[layer] = closed[layer] | own if layer in closed else own
        for layer, places in closed.items():
            open = self.masks[layer].open
            open.copy_((~places).to(open))

    def lift(self) -> None:
        """Take the masks off: the model computes with all its heads and channels again."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.masks = [], {}

    @contextmanager
    def unmasked(self) -> Iterator[None]:
        """Inside, the model computes with all its heads and channels."""
        for mask in self.masks.values():
            mask.open.fill_(1)
        try:
            yield
        finally:
            self.mask()

    def slim(self) -> tuple[nn.Module, Slimmed]:
        """Merge the adapter and cut out what is masked, in place; returns the smaller base model, and what was cut.

        Raises:
            ValueError: the ratio is not reached yet.
        """
        if not self.done:
            raise ValueError("prune: the run has not come to the ratio that was asked for, so nothing is cut out yet")
        self.lift()
        return slim(self.adapted.model, self.all, self.gone, self.adapted.adapter_name)

    # ------------------------------------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": str(self.settings), "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> Change:
        own = self.state_dict()
        if state | {"done": 0} != own | {"done": 0}:
            raise ValueError(f"the checkpoint was trained with {state}, got {own}; wanted the same")
        self.done = state["done"]
        return Change.NOTHING

    def tensors(self) -> dict[str, Tensor]:
        gone = {f"gone.{name}": value.to(torch.uint8) for name, value in self.gone.items()}
        return gone | {f"score.{name}": value for name, value in self.scores.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for structure in self.structures:
            self.scores[structure.name] = tensors[f"score.{structure.name}"].clone()
            self.gone[structure.name] = tensors[f"gone.{structure.name}"].bool().cpu()
        self.mask()
