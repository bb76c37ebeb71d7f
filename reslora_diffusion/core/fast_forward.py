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
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import forward_ad

from .config import Shortcut
from .functional import down
from .fused import Publishes, fused_linears
from .packing import Layout, concatenate, pack

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
        self.groups: dict[str, tuple[str, ...]] = {}  # by layer, as `prepare` was called; others are alone
        self.ready: dict[str, tuple[Tensor, Tensor]] = {}  # (x, output) of layers that were computed ahead
        self.packed: dict[tuple[str, ...], tuple[Tensor, tuple[Tensor, ...]]] = {}
        self.sharded = False
        self.packed_with_grad = False
        self.said: set[str] = set()

    def __deepcopy__(self, memo: dict) -> "Fusion":
        other = Fusion()
        other.groups = dict(self.groups)
        return other

    # --------------------------------------------------------------------------------------- one forward of the root

    def open(self, controller: "Controller") -> None:
        """Pack the factors of a forward that begins."""
        if torch.compiler.is_compiling():
            return
        name = controller.adapter_name
        layers: list[Any] = list(controller.layers.values())
        factors = [side[name].weight for layer in layers for side in (layer.lora_A, layer.lora_B)]
        self.sharded = self.sharded or any(hasattr(weight, "full_tensor") or not weight.numel() for weight in factors)
        first = layers[0]
        plain = "its adapter is off" if controller.is_idle() else why_plain(controller, first, first.base_layer.weight)
        self.say(f"layer by layer: {plain}" if plain else f"fused, on {factors[0].device.type}")
        if plain or self.sharded:
            return
        self.packed_with_grad = torch.is_grad_enabled()
        groups = dict.fromkeys(self.group_of(each) for each in controller.sites)
        index = {each: place for place, each in enumerate(controller.layers)}
        # Elsewhere than on a CPU an operation costs more to launch than such small matrices take to copy.
        by_dtype: dict[torch.dtype, list[tuple[str, ...]]] = {}
        for group in groups:
            layer: Any = controller.layers[group[0]]
            weight = layer.get_base_layer().weight
            if weight.is_floating_point() and (weight.device.type != "cpu" or weight.dtype != factors[0].dtype):
                by_dtype.setdefault(weight.dtype, []).append(group)
        for dtype, members in by_dtype.items():
            layouts = []
            for group in members:
                down, ups = self.parts(controller, group)
                layouts.append(Layout(tuple(2 * index[part] for part in down), 0))
                layouts += [Layout(tuple(2 * index[part] + 1 for part in up), 1) for up in ups]
            matrices = iter(pack(layouts, factors, dtype))
            for group in members:
                self.packed[group] = next(matrices), tuple(next(matrices) for _ in group)

    def close(self) -> None:
        """Inverse of `open`."""
        self.ready.clear()
        self.packed.clear()

    def say(self, form: str) -> None:
        if form not in self.said:
            self.said.add(form)
            log.info("ResLoRA layers compute %s", form)

    # ------------------------------------------------------------------------------------------------------ layers

    def group_of(self, name: str) -> tuple[str, ...]:
        return self.groups.get(name, (name,))

    @staticmethod
    def parts(controller: "Controller", group: tuple[str, ...]) -> tuple[list[str], list[tuple[str, ...]]]:
        """Layers whose lora_A are the rows of D, and for each layer of a group those whose lora_B are columns of U."""
        if controller.shortcut is Shortcut.BLOCK:
            windows = [(name, *controller.windows[name]) for name in group]
            return [part for window in windows for part in window], windows
        later = []
        if controller.shortcut is Shortcut.INPUT:
            later = [controller.followers[name] for name in group if name in controller.followers]
        return [*group, *later], [(name,) for name in group]

    def factors(
        self, controller: "Controller", group: tuple[str, ...], dtype: torch.dtype, carry: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`(D, U)` of a group."""
        if group in self.packed and (self.packed_with_grad or not torch.is_grad_enabled()):
            return self.packed[group]
        down, ups = self.parts(controller, group)
        if not carry and controller.shortcut is Shortcut.INPUT:
            down = list(group)
        own = {name: controller.factors(name) for name in {*down, *(part for up in ups for part in up)}}
        D = concatenate([own[name][0] for name in down], 0, dtype)
        return D, tuple(concatenate([own[part][1] for part in up], 1, dtype) for up in ups)

    def forward(self, controller: "Controller", site: "Site", layer: Any, x: Tensor) -> Tensor | None:
        """The output of one layer, or None where it must compute plainly."""
        if site.name in self.ready:
            prepared_for, output = self.ready.pop(site.name)
            if prepared_for is x:
                controller.let_go(site)
                return output
            controller.retract(site)
        if why_plain(controller, layer, x) is not None:
            return None
        output = self.compute(controller, [site], [layer], x)[0]
        controller.let_go(site)
        return output

    def prepare(self, controller: "Controller", names: Sequence[str], x: Tensor) -> None:
        """Compute several layers that are about to be called with the same `x` [..., in], where they can be fused."""
        group = tuple(name for name in names if name in controller.sites)
        if len(group) < 2 or controller.is_idle():
            return
        layers = [controller.layers[name] for name in group]
        if any(why_plain(controller, layer, x) is not None for layer in layers):
            return
        self.groups.update(dict.fromkeys(group, group))
        outputs = self.compute(controller, [controller.sites[name] for name in group], layers, x)
        for name, output in zip(group, outputs, strict=True):
            self.ready[name] = x, output

    def compute(self, controller: "Controller", sites: list["Site"], layers: list[Any], x: Tensor) -> Sequence[Tensor]:
        """Outputs of layers that read `x`, with the shortcuts into them and what they hand on."""
        shortcut, group = controller.shortcut, tuple(site.name for site in sites)
        carry = not self.sharded
        D, U = self.factors(controller, group, x.dtype, carry)
        scalings = [layer.scaling[controller.adapter_name] for layer in layers]
        carried: list[Tensor | None] = [None] * len(sites)
        publishes, receivers = Publishes.NOTHING, group
        later: tuple[int, ...] = ()
        if shortcut is Shortcut.INPUT:
            at = 0
            for place, (site, up) in enumerate(zip(sites, U, strict=True)):
                carried[place], previous = controller.read_input(site, x)
                if previous is not None:
                    carried[place] = down(previous.to(x.dtype), D[at : at + up.shape[1]])
                elif carried[place] is None:  # a first layer reads itself twice
                    scalings[place] *= 2
                at += up.shape[1]
            if carry:
                receivers = tuple(name for name in group if name in controller.followers)
                later = tuple(controller.sites[controller.followers[name]].rank for name in receivers)
                publishes = Publishes.NEXT if receivers else Publishes.NOTHING
            else:
                for site in sites:
                    controller.publish(site, x)
        elif shortcut is Shortcut.MIDDLE:
            shape = x.shape[:-1]
            for place, site in enumerate(sites):
                wanted = torch.Size((*shape, site.rank))
                if earlier := [value for _, value in controller.read(site, controller.read_by(site), wanted)]:
                    carried[place] = sum(earlier[1:], start=earlier[0]).to(x.dtype)
            if any(controller.readers[name] for name in group):
                publishes = Publishes.SUM if controller.config.num_previous is None else Publishes.OWN
        bases = [layer.get_base_layer() for layer in layers]
        outputs, published = fused_linears(x, D, U, bases, scalings, carried, publishes, later)
        for name, value in zip(receivers, published, strict=bool(published)):
            key = carried_key(name) if shortcut is Shortcut.INPUT else name
            controller.publish(controller.sites[name], value, key)
        return outputs


def why_plain(controller: "Controller", layer: Any, x: Tensor) -> str | None:
    """What keeps a layer from the fused form on `x` (or on anything of the dtype and device of `x`), if anything."""
    if torch.compiler.is_compiling():
        return "torch.compile fuses the plain form better"
    base = layer.base_layer
    if type(base) is not nn.Linear or not isinstance(layer, LoraLayer):
        return f"{type(base).__name__} is not a plain linear layer"
    weight = base.weight
    if controller.observer is not None or controller.merged is not None:
        return "calibrating or computing as merged"
    if controller.fusion.sharded:
        return "factors in shards"
    if layer.disable_adapters or layer.merged:
        return "disabled or merged"
    if not controller.dropless:
        return "dropout"
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return "autocast"
    if weight.requires_grad or weight.dtype != x.dtype or type(weight) not in (nn.Parameter, Tensor):
        return "a base layer that is trained, sharded or of another precision than its input"
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or "forward" in base.__dict__:
        return "hooks on the base layer"
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return "functorch or forward-mode differentiation"
    return None
