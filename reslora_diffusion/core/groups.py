"""Layers that are computed together, with everything that does not change from one forward to the next at hand.

Looking things up through modules is most of what a small layer costs on the host, so a `Group` is made once; parameters
are read from it anew each time, as optimizers, `functional_call` and sharding may put others in their place.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .chains import Site
from .config import Shortcut
from .fused_layer import Publishes

if TYPE_CHECKING:
    from .controller import Controller


def carried_key(name: str) -> str:
    """Under which a layer publishes what the layer after it would make of its input, at rank r."""
    return f"{name} A"


@dataclass(slots=True, eq=False)
class Group:
    """`sites` read one x. The rows of D are the lora_A of `down`; the columns of U_i are the lora_B of `up[i]`."""

    names: tuple[str, ...]
    sites: list[Site]
    layers: list[Any]
    bases: list[Any]
    scalings: list[dict[str, float]]
    down: tuple[str, ...]
    up: list[tuple[str, ...]]
    down_modules: list[Any]
    up_modules: list[list[Any]]
    own_modules: list[Any]  # of one layer by itself: what its D, then what its U is made of, less the rows for others
    shape: tuple[int, int, int, int]  # of one layer: in, out, total rank, parts of D
    reads: bool  # whether shortcuts lead into it
    receivers: tuple[str, ...]  # those of `names` that hand something on
    keys: tuple[str, ...]  # under which they publish it
    later: tuple[int, ...]  # for `input`: the ranks of the layers after them
    publishes: Publishes
    unfit: str | None  # why it can never be fused

    def is_current(self, controller: "Controller") -> bool:
        """Whether the layers still have the factors that they had."""
        layers, adapter = controller.layers, controller.adapter_name
        return all(
            layers[part].lora_A[adapter] is module for part, module in zip(self.down, self.down_modules, strict=True)
        ) and all(
            layers[part].lora_B[adapter] is module
            for window, modules in zip(self.up, self.up_modules, strict=True)
            for part, module in zip(window, modules, strict=True)
        )

    @classmethod
    def of(cls, controller: "Controller", names: tuple[str, ...]) -> "Group":
        adapter, shortcut = controller.adapter_name, controller.shortcut
        layers: list[Any] = [controller.layers[name] for name in names]
        bases = [layer.get_base_layer() for layer in layers]
        up: list[tuple[str, ...]] = [(name,) for name in names]
        down, publishes = names, Publishes.NOTHING
        receivers: tuple[str, ...] = ()
        later: tuple[int, ...] = ()
        if shortcut is Shortcut.BLOCK:
            up = [(name, *controller.windows[name]) for name in names]
            down = tuple(part for window in up for part in window)
        elif shortcut is Shortcut.INPUT:
            receivers = tuple(name for name in names if name in controller.followers)
            followers = tuple(controller.followers[name] for name in receivers)
            down, later = names + followers, tuple(controller.sites[name].rank for name in followers)
            publishes = Publishes.NEXT if receivers else Publishes.NOTHING
        elif shortcut is Shortcut.MIDDLE and any(controller.readers[name] for name in names):
            receivers = names
            publishes = Publishes.SUM if controller.config.num_previous is None else Publishes.OWN
        down_modules = [controller.layers[part].lora_A[adapter] for part in down]
        up_modules = [[controller.layers[part].lora_B[adapter] for part in window] for window in up]
        first, window = controller.sites[names[0]], up[0]
        rank = sum(controller.sites[part].rank for part in window)
        odd = [type(base).__name__ for base in bases if type(base) is not nn.Linear]
        return cls(
            names=names,
            sites=[controller.sites[name] for name in names],
            layers=layers,
            bases=bases,
            scalings=[layer.scaling for layer in layers],
            down=down,
            up=up,
            down_modules=down_modules,
            up_modules=up_modules,
            own_modules=[*down_modules[: len(window)], *up_modules[0]],
            shape=(first.in_features, first.out_features, rank, len(window)),
            reads=shortcut in (Shortcut.INPUT, Shortcut.MIDDLE),
            receivers=receivers,
            keys=tuple(carried_key(name) if shortcut is Shortcut.INPUT else name for name in receivers),
            later=later,
            publishes=publishes,
            unfit=f"{odd[0]} is not a plain linear layer" if odd else None,
        )


def why_plain(controller: "Controller", group: Group, x: Tensor) -> str | None:
    """What keeps a group from the fused form on `x` (or on anything of the dtype and device of `x`), if anything."""
    if group.unfit:
        return group.unfit
    if controller.observer is not None or controller.merged is not None:
        return "calibrating or computing as merged"
    if controller.fusion.sharded:
        return "factors that are sharded or parametrised"
    if not controller.dropless:
        return "dropout"
    device, dtype = x.device.type, x.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return "autocast"
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return "functorch or forward-mode differentiation"
    if torch._C._is_tracing():
        return "torch.jit.trace"
    for layer, base in zip(group.layers, group.bases, strict=True):
        if layer.disable_adapters or layer.merged_adapters:
            return "disabled or merged"
        if layer._modules["base_layer"] is not base:
            return "a base layer that was replaced"
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if weight is None:
            return "a base weight that is computed from others (pruned, normalised, parametrised)"
        if bias is not None and bias.requires_grad:
            return "a base layer whose bias is trained"
        if weight.requires_grad or weight.dtype != dtype or type(weight) not in (nn.Parameter, Tensor):
            return "a base layer that is trained, sharded or of another precision than its input"
        hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        if hooks or "forward" in base.__dict__:
            return "hooks on the base layer"
    return None
