"""Where and how adapted layers compute in the fused form of `core.fused`, instead of layer by layer.

`Fusion` knows, for one adapter, which layers form a group that reads one x, their packed factors, and their results.
Fused is faster by itself, one layer at a time; groups, which `core` is told of by whoever knows that layers read the
same x (`diffusion.attn_processor`), save more. A layer computes plainly, to the same numbers, where something else must
see what happens inside it: under torch.compile (which fuses the plain form better than this), autocast, functorch and
forward-mode differentiation; with dropout, hooks, several adapters, merged or quantised weights; while calibrating.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import Shortcut
from .functional import down
from .fused import fused_linears
from .groups import Group, why_plain
from .packing import Layout, concatenate, pack, weight_of

if TYPE_CHECKING:
    from .chains import Site
    from .controller import Controller

log = logging.getLogger(__name__)


def carried_key(name: str) -> str:
    """Under which a layer publishes what the layer after it would make of its input, at rank r."""
    return f"{name} A"


class Fusion:
    """Groups of one adapter's layers, and what is at hand for them during one forward."""

    def __init__(self) -> None:
        self.together: dict[str, tuple[str, ...]] = {}  # by layer, as `prepare` was called; others are alone
        self.groups: dict[tuple[str, ...], Group] = {}
        self.ready: dict[str, tuple[Tensor, Tensor]] = {}  # (x, output) of layers that were computed ahead
        self.packed: dict[tuple[str, ...], tuple[Tensor, tuple[Tensor, ...]]] = {}
        self.packed_with_grad = False
        self.sharded = False
        self.said: set[str] = set()

    def __deepcopy__(self, memo: dict) -> "Fusion":
        other = Fusion()
        other.together = dict(self.together)
        return other

    def forget(self) -> None:
        """The chains are others now, or layers are no longer prepared together."""
        self.groups.clear()

    def group(self, controller: "Controller", names: tuple[str, ...]) -> Group:
        found = self.groups.get(names)
        if found is None:
            found = self.groups[names] = Group.of(controller, names, self.sharded)
        return found

    # --------------------------------------------------------------------------------------- one forward of the root

    def open(self, controller: "Controller") -> None:
        """Pack the factors of a forward that begins."""
        if torch.compiler.is_compiling():
            return
        alone = [self.group(controller, (name,)) for name in controller.sites]
        modules = [module for group in alone for module in (group.down_modules[0], group.up_modules[0][0])]
        factors: list[Any] = [module._parameters["weight"] for module in modules]
        if not self.sharded and any(map(is_sharded, factors)):
            self.sharded = True
            self.forget()
            alone = [self.group(controller, (name,)) for name in controller.sites]
        base = alone[0].bases[0]
        plain = "its adapter is off" if controller.is_idle() else why_plain(controller, alone[0], base.weight)
        self.say(f"layer by layer: {plain}" if plain else f"fused, on {factors[0].device.type}")
        if plain or self.sharded:
            return
        self.packed_with_grad = torch.is_grad_enabled()
        index = {name: place for place, name in enumerate(controller.sites)}
        # Elsewhere than on a CPU an operation costs more to launch than such small matrices take to copy.
        by_dtype: dict[torch.dtype, list[Group]] = {}
        for names in dict.fromkeys(self.together.get(name, (name,)) for name in controller.sites):
            group = self.group(controller, names)
            weight = group.bases[0].weight
            if weight.is_floating_point() and (weight.device.type != "cpu" or weight.dtype != factors[0].dtype):
                by_dtype.setdefault(weight.dtype, []).append(group)
        for dtype, members in by_dtype.items():
            layouts = []
            for group in members:
                layouts.append(Layout(tuple(2 * index[part] for part in group.down), 0))
                layouts += [Layout(tuple(2 * index[part] + 1 for part in window), 1) for window in group.up]
            matrices = iter(pack(layouts, factors, dtype))
            for group in members:
                self.packed[group.names] = next(matrices), tuple(next(matrices) for _ in group.names)

    def close(self) -> None:
        """Inverse of `open`."""
        self.ready.clear()
        self.packed.clear()

    def say(self, form: str) -> None:
        if form not in self.said:
            self.said.add(form)
            log.info("ResLoRA layers compute %s", form)

    # ------------------------------------------------------------------------------------------------------ layers

    def factors(self, group: Group, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`(D, U)` of a group."""
        if self.packed and group.names in self.packed and (self.packed_with_grad or not torch.is_grad_enabled()):
            return self.packed[group.names]
        D = concatenate([weight_of(module) for module in group.down_modules], 0, dtype)
        return D, tuple([concatenate([weight_of(m) for m in window], 1, dtype) for window in group.up_modules])

    def forward(self, controller: "Controller", site: "Site", x: Tensor) -> Tensor | None:
        """The output of one layer, or None where it must compute plainly."""
        if self.ready and site.name in self.ready:
            prepared_for, output = self.ready.pop(site.name)
            if prepared_for is x:
                controller.let_go(site)
                return output
            controller.retract(site)
        group = self.group(controller, (site.name,))
        if why_plain(controller, group, x) is not None:
            return None
        output = self.compute(controller, group, x)[0]
        if controller.shortcut in (Shortcut.INPUT, Shortcut.MIDDLE):
            controller.let_go(site)
        return output

    def prepare(self, controller: "Controller", names: Sequence[str], x: Tensor) -> None:
        """Compute several layers that are about to be called with the same `x` [..., in], where they can be fused."""
        together = tuple(name for name in names if name in controller.sites)
        if len(together) < 2 or controller.is_idle():
            return
        group = self.group(controller, together)
        if why_plain(controller, group, x) is not None:
            return
        self.together.update(dict.fromkeys(together, together))
        for name, output in zip(together, self.compute(controller, group, x), strict=True):
            self.ready[name] = x, output

    def compute(self, controller: "Controller", group: Group, x: Tensor) -> Sequence[Tensor]:
        """Outputs of layers that read `x`, with the shortcuts into them and what they hand on."""
        shortcut = controller.shortcut
        D, U = self.factors(group, x.dtype)
        scalings = [scaling[controller.adapter_name] for scaling in group.scalings]
        carried: list[Tensor | None] = [None] * len(scalings)
        if shortcut is Shortcut.INPUT:
            at = 0
            for place, site in enumerate(group.sites):
                carried[place], previous = controller.read_input(site, x)
                if previous is not None:
                    carried[place] = down(previous.to(x.dtype), D[at : at + site.rank])
                elif carried[place] is None:  # a first layer reads itself twice
                    scalings[place] *= 2
                at += site.rank
                if self.sharded:
                    controller.publish(site, x)
        elif shortcut is Shortcut.MIDDLE:
            for place, site in enumerate(group.sites):
                if names := controller.read_by(site):
                    wanted = torch.Size((*x.shape[:-1], site.rank))
                    if earlier := [value for _, value in controller.read(site, names, wanted)]:
                        carried[place] = sum(earlier[1:], start=earlier[0]).to(x.dtype)
        outputs, published = fused_linears(x, D, U, group.bases, scalings, carried, group.publishes, group.later)
        for name, value in zip(group.receivers, published, strict=True):
            key = carried_key(name) if shortcut is Shortcut.INPUT else name
            controller.publish(controller.sites[name], value, key)
        return outputs


def is_sharded(weight: Any) -> bool:
    """Whether FSDP or the like holds only a part of a factor, or will between forwards."""
    return type(weight) not in (nn.Parameter, Tensor) or not weight.numel()
