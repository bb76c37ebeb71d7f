"""Where and how adapted layers compute in a fused form, instead of by PEFT's modules.

One layer is one node (`core.fused_layer`; on a CPU also `core.whole_layer`, by the count of `core.forms`); layers that
read the same x, of which `core` is told by whoever knows (`diffusion.attn_processor`), are one node together
(`core.fused`), which saves launches on a GPU. `Fusion` knows, for one adapter, these groups, their packed factors, and
results that were computed ahead. docs/LOG.md has the timings that chose between the forms. A layer computes plainly, to
the same numbers, where something else must see what happens inside it: under torch.compile (which fuses the plain form
better than this), autocast, functorch and forward-mode differentiation; with dropout, hooks, several adapters, merged
or quantised weights; while calibrating.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import Shortcut
from .context import version_of
from .forms import EXACT, LOW_RANK, cheapest
from .functional import down
from .fused import fused_linears
from .fused_layer import FusedLinear, Publishes
from .groups import Group, why_plain
from .packing import Layout, concatenate, pack
from .whole_layer import WholeLinear

if TYPE_CHECKING:
    from .chains import Site
    from .controller import Controller

log = logging.getLogger(__name__)
WHOLE = {nn.Parameter, Tensor}


class Fusion:
    """Groups of one adapter's layers, and what is at hand for them during one forward."""

    def __init__(self) -> None:
        self.together: dict[str, tuple[str, ...]] = {}  # by layer, as `prepare` was called; others are alone
        self.groups: dict[tuple[str, ...], Group] = {}
        self.alone: dict[str, Group] = {}  # those of one layer
        self.holders: list[dict[str, Any]] = []  # the parameters of their lora_A and lora_B
        self.layouts: list[tuple[Group, list[Layout]]] = []  # of what is packed, if anything is
        self.ready: dict[str, tuple[Tensor, int | None, Tensor]] = {}  # computed ahead: x, its version, output
        self.packed: dict[tuple[str, ...], tuple[Tensor, tuple[Tensor, ...]]] = {}
        self.packed_with_grad = False
        self.sharded = False
        self.is_open = False  # inside a forward of the root
        self.said: set[str] = set()

    def __deepcopy__(self, memo: dict) -> "Fusion":
        other = Fusion()
        other.together = dict(self.together)
        return other

    def forget(self) -> None:
        """The chains are others now."""
        self.groups.clear()
        self.alone.clear()
        self.layouts.clear()

    def compute_together(self, names: tuple[str, ...]) -> None:
        """Layers that are prepared together are packed together from the next forward on."""
        if self.together.get(names[0]) != names:
            self.together.update(dict.fromkeys(names, names))
            self.layouts.clear()

    def compute_alone(self) -> None:
        """Inverse of `compute_together`, for all layers."""
        self.together.clear()
        self.layouts.clear()

    def group(self, controller: "Controller", names: tuple[str, ...]) -> Group:
        found = self.groups.get(names)
        if found is None:
            found = self.groups[names] = Group.of(controller, names)
        return found

    # --------------------------------------------------------------------------------------- one forward of the root

    def open(self, controller: "Controller") -> None:
        """Pack the factors of a forward that begins."""
        if torch.compiler.is_compiling():
            return
        self.is_open = True
        if not self.alone:
            self.alone = {name: self.group(controller, (name,)) for name in controller.sites}
            pairs = [(group.down_modules[0], group.up_modules[0][0]) for group in self.alone.values()]
            self.holders = [module._parameters for pair in pairs for module in pair]
        factors: list[Any] = [holder.get("weight") for holder in self.holders]
        self.sharded = self.sharded or are_partial(factors)
        first = next(iter(self.alone.values()))
        weight = first.bases[0].weight
        plain = "its adapter is off" if controller.is_idle() else why_plain(controller, first, weight)
        counted = ", each in the form with the least arithmetic" if weight.is_cpu and weight.dtype in EXACT else ""
        self.say(f"layer by layer: {plain}" if plain else f"fused, on {weight.device.type}{counted}")
        self.packed_with_grad = torch.is_grad_enabled()
        if not plain and is_packed(weight, factors[0]):
            self.pack(controller, factors)

    def pack(self, controller: "Controller", factors: list[Any]) -> None:
        """Cast and lay together `factors`, lora_A and lora_B of each layer."""
        if not self.layouts:
            index = {name: place for place, name in enumerate(controller.sites)}
            for names in dict.fromkeys(self.together.get(name, (name,)) for name in controller.sites):
                group = self.group(controller, names)
                layouts = [Layout(tuple(2 * index[part] for part in group.down), 0)]
                layouts += [Layout(tuple(2 * index[part] + 1 for part in window), 1) for window in group.up]
                self.layouts.append((group, layouts))
        by_dtype: dict[torch.dtype, list[tuple[Group, list[Layout]]]] = {}
        for group, layouts in self.layouts:
            weight = group.bases[0].weight
            if weight.is_floating_point() and is_packed(weight, factors[0]):
                by_dtype.setdefault(weight.dtype, []).append((group, layouts))
        for dtype, members in by_dtype.items():
            matrices = iter(pack([layout for _, layouts in members for layout in layouts], factors, dtype))
            for group, _ in members:
                self.packed[group.names] = next(matrices), tuple(next(matrices) for _ in group.names)

    def close(self) -> None:
        """Inverse of `open`."""
        self.is_open = False
        self.ready.clear()
        self.packed.clear()

    def say(self, form: str) -> None:
        if form not in self.said:
            self.said.add(form)
            log.info("ResLoRA layers compute %s", form)

    # ------------------------------------------------------------------------------------------------------ layers

    def factors(self, group: Group, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`(D, U)` of a group."""
        if group.names in self.packed and (self.packed_with_grad or not torch.is_grad_enabled()):
            return self.packed[group.names]
        D = concatenate([module._parameters["weight"] for module in group.down_modules], 0, dtype)
        ups = [[module._parameters["weight"] for module in window] for window in group.up_modules]
        return D, tuple([concatenate(window, 1, dtype) for window in ups])

    def forward(self, controller: "Controller", site: "Site", x: Tensor) -> Tensor | None:
        """The output of one layer, or None where it must compute plainly."""
        if self.ready and site.name in self.ready:
            prepared_for, version, output = self.ready.pop(site.name)
            if prepared_for is x and version == version_of(x):
                controller.let_go(site)
                return output
            controller.retract(site)
        group = self.alone.get(site.name) or self.group(controller, (site.name,))
        if not self.is_open and not group.is_current(controller):
            controller.refresh()
            group = self.group(controller, (site.name,))
        if why_plain(controller, group, x) is not None:
            return None
        scaling = group.scalings[0][controller.adapter_name]
        publishes, read, carry, times = group.publishes, None, None, 1
        own: list[Any] = [module._parameters["weight"] for module in group.own_modules]
        if is_packed(x, own[0]):
            D, (U,) = self.factors(group, x.dtype)
            own, downs = [D, U], 1
            if group.reads:
                carry, times = self.carried(controller, site, x, D)
        else:
            downs = len(own) // 2
            if publishes is Publishes.NEXT:  # the layer after reads x itself
                publishes = Publishes.NOTHING
                controller.publish(site, x)
            if controller.shortcut is Shortcut.INPUT:
                carry, read = controller.read_input(site, x)
                times = 2 if carry is None and read is None and site.name not in controller.alone else 1
                read = None if read is None else self.sum_of(controller, x, read)
            elif group.reads:
                carry, times = self.carried(controller, site, x, own[0])
        base = group.bases[0]._parameters
        weight, bias, form = base["weight"], base["bias"], LOW_RANK
        if publishes is Publishes.NOTHING and carry is None and read is None and x.is_cpu and x.dtype in EXACT:
            with_grad = torch.is_grad_enabled()
            wanted = with_grad and x.requires_grad, with_grad and own[0].requires_grad
            form = cheapest(x.numel() // x.shape[-1], *group.shape, *wanted)
        if form != LOW_RANK:
            output = WholeLinear.apply(form, times * scaling, x, weight, bias, *own)
        else:
            output = FusedLinear.apply(publishes, times * scaling, downs, x, weight, bias, read, carry, *own)
        if publishes is not Publishes.NOTHING:
            output, value = output
            controller.publish(site, value, group.keys[0])
        if group.reads:
            controller.let_go(site)
        return output

    @staticmethod
    def sum_of(controller: "Controller", x: Tensor, previous: Tensor) -> Tensor:
        """x + previous, once for all layers that read the two."""
        scope, with_grad = controller.context.scope, torch.is_grad_enabled()
        assert scope is not None
        version, known = version_of(x), scope.sum
        same = known is not None and known[0] is x and version is not None and known[1] == version
        if known is None or not same or known[2] is not previous or known[4] != with_grad:
            known = scope.sum = x, version, previous, x + previous.to(x.dtype), with_grad
        return known[3]

    def prepare(self, controller: "Controller", names: Sequence[str], x: Tensor) -> None:
        """Compute several layers that are about to be called with the same `x` [..., in], where they can be fused."""
        together = tuple(name for name in names if name in controller.sites)
        if len(together) < 2 or controller.is_idle():
            return
        group = self.group(controller, together)
        if x.ndim > 3 or len(group.layers[0].active_adapters) > 1:  # pictures, channels first; adapters one by one
            return
        if why_plain(controller, group, x) is not None:
            return
        self.compute_together(together)
        version = version_of(x)
        for name, output in zip(together, self.compute(controller, group, x), strict=True):
            self.ready[name] = x, version, output

    def compute(self, controller: "Controller", group: Group, x: Tensor) -> Sequence[Tensor]:
        """Outputs of layers that read `x`, with the shortcuts into them and what they hand on."""
        D, U = self.factors(group, x.dtype)
        scalings = [scaling[controller.adapter_name] for scaling in group.scalings]
        carried: list[Tensor | None] = []
        at = 0
        for place, site in enumerate(group.sites):
            carry, times = self.carried(controller, site, x, D[at : at + site.rank])
            scalings[place] *= times
            carried.append(carry)
            at += site.rank
        outputs, published = fused_linears(x, D, U, group.bases, scalings, carried, group.publishes, group.later)
        for name, key, value in zip(group.receivers, group.keys, published, strict=True):
            controller.publish(controller.sites[name], value, key)
        return outputs

    def carried(self, controller: "Controller", site: "Site", x: Tensor, lora_A: Tensor) -> tuple[Tensor | None, int]:
        """What the shortcut adds at the bottleneck of a layer, and how often the layer reads its own input."""
        if controller.shortcut is Shortcut.INPUT:
            carry, previous = controller.read_input(site, x)
            if previous is not None:
                carry = down(previous.to(x.dtype), lora_A[: site.rank])
            # The first of several layers reads itself twice.
            return carry, 2 if carry is None and site.name not in controller.alone else 1
        if controller.shortcut is Shortcut.MIDDLE and (names := controller.read_by(site)):
            wanted = torch.Size((*x.shape[:-1], site.rank))
            if earlier := [value for _, value in controller.read(site, names, wanted)]:
                return sum(earlier[1:], start=earlier[0]).to(x.dtype), 1
        return None, 1


def is_packed(weight: Tensor, factor: Tensor) -> bool:
    """Whether factors are cast and laid together once per forward, for layers of this base weight (or input).

    On a CPU that computes in the precision of the factors there is nothing to cast, and to put two or three of them
    together costs less inside the layer.
    """
    return weight.dtype != factor.dtype or not weight.is_cpu


def are_partial(weights: Sequence[Any]) -> bool:
    """Whether FSDP or the like holds only a part of one, or will between forwards."""
    return not {type(weight) for weight in weights} <= WHOLE or not all([weight.numel() for weight in weights])
