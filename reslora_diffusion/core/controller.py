"""One adapter on one model: its layers, their chains, the values that cross them, and how they compute.

The controller is reached from every adapted layer (`layer.lora_variant[adapter_name].controller`) and from nowhere
else: it is no module, holds no parameters, and goes with its layers through `deepcopy`. While training, layer n of a
chain with m = num_previous computes, with z = A x at rank r and D the dropout of the adapter:

    none     W x + s B A D(x)
    input    W x + s B A D(x + x')                  publishes x;  x' from layer n-1, x itself in the first of several
    block    W x + s [B_n, B_{n-1}, ...] [A_n; A_{n-1}; ...] D(x)
    middle   W x + s B (z_n + z_{n-1} + ...)        publishes z, or the running sum if m is all

Inside `merged_forward` it computes the plain LoRA that it will be exported as.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .chains import Explanation, Site, build_chains, find_sites, windows
from .checkpointing import cover_checkpointing, may_checkpoint, uncover_checkpointing
from .config import ResLoraConfig, Shortcut
from .context import OUTSIDE, ForwardContext
from .fast_forward import Fusion
from .functional import LoraFactors, concatenated, down, down_sum, up_add
from .groups import carried_key
from .sharding import whole

FUSED = (
    "fuse_qkv_projections() has replaced to_q, to_k and to_v, so their adapters are never called; call "
    "unfuse_qkv_projections(), or merge the adapter first (fuse_lora)"
)
DATA_PARALLEL = (
    "torch.nn.DataParallel runs its replicas in threads that share one ResLoRA context; use DistributedDataParallel "
    "(accelerate launch, torchrun)"
)


class Observer(Protocol):
    """Looks at what flows through the shortcuts; see `core.statistics`."""

    def see(self, site: Site, x: Tensor, previous: list[tuple[str, Tensor]]) -> None: ...


class Unjoined(NamedTuple):
    """A layer that is adapted by plain LoRA beside the chains, such as a convolution."""

    layer: LoraLayer
    kind: str
    has_factors: bool  # of a linear map or a convolution, as `LoraFactors` holds them


class Controller:
    """Adapter `adapter_name` of `model`. Made by injecting a `ResLoraConfig`; found by `get_controller`."""

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str,
        configs: dict[str, Any],
        layers: dict[str, LoraLayer],
        unlinked: dict[str, str],
        unjoined: dict[str, Unjoined],
    ) -> None:
        self.adapter_name = adapter_name
        self.configs = configs  # `peft_config` of the model
        self.config: ResLoraConfig = configs[adapter_name]
        self.layers = layers
        self.unjoined = unjoined
        shapes = {name: (*layer_shape(layer), layer.r[adapter_name]) for name, layer in layers.items()}
        self.sites = {site.name: site for site in find_sites(model, shapes, unlinked)}
        self.context = ForwardContext()
        self.observer: Observer | None = None
        self.merged: dict[str, LoraFactors] | None = None
        self.calibration: dict[str, Tensor] = {}  # C by layer; see core.merging
        self.calibrated_at: dict[str, int] = {}
        self.corrections_while_merged: dict[str, Tensor] = {}
        self.skipped: dict[str, int] = {}
        self.fusion = Fusion()
        self.homes = {name: model.get_submodule(name.rpartition(".")[0]) for name in layers}
        self.root_name, self.root = find_root(model, list(layers))
        parents = set(map(id, self.homes.values()))
        self.fusible = [m for m in model.modules() if id(m) in parents and hasattr(m, "fused_projections")]
        self.gone = False
        self.link()
        self.roots = self.roots_of_chains(model)
        self.checkpointing = [module for root in self.roots.values() for module in may_checkpoint(root)]
        self.hooks: list[Any] = []
        for root in self.roots.values():
            self.hooks.append(root.register_forward_pre_hook(self.open))
            self.hooks.append(root.register_forward_hook(self.close, always_call=True))

    def link(self) -> None:
        """Build the chains of the configuration as it is now."""
        shortcut = self.config.effective_shortcut
        self.shortcut = shortcut
        self.fusion.forget()
        self.places = self.present_places()
        dropouts = [layer.lora_dropout[self.adapter_name] for layer in self.layers.values()]
        self.dropless = all(isinstance(dropout, nn.Identity) for dropout in dropouts)
        self.chains = build_chains(self.sites.values(), shortcut, self.config.same_resolution_only)
        self.windows = windows(self.chains, self.config.num_previous)
        self.alone = {chain.sites[0].name for chain in self.chains if len(chain.sites) == 1}
        self.followers = {a.name: b.name for c in self.chains for a, b in zip(c.sites, c.sites[1:], strict=False)}
        self.readers: dict[str, int] = dict.fromkeys(self.sites, 0)
        for chain in self.chains if shortcut in (Shortcut.INPUT, Shortcut.MIDDLE) else ():
            for place, site in enumerate(chain.sites):
                later = len(chain.sites) - 1 - place
                running_sum = shortcut is Shortcut.MIDDLE and self.config.num_previous is None
                self.readers[site.name] = min(later, 1 if running_sum else self.config.num_previous or later)

    def own_config(self) -> ResLoraConfig:
        """The configuration, to be changed: users give one to several models, so the model gets a copy in its place."""
        self.config = self.configs[self.adapter_name] = copy.copy(self.config)
        return self.config

    def refresh(self) -> None:
        """Link anew if something has put other factors into the layers: `update_layer`, EVA's initialisation."""
        if all(home.get(key) is module for home, key, module in self.places):
            return
        layers = {name: layer for name, layer in self.layers.items() if self.is_present(name, layer)}
        if not layers:  # the adapter is gone
            return
        self.layers, before = layers, self.places
        self.places = self.present_places()
        if len(before) == len(self.places) and not any(
            new is not old and "weight" in new._parameters  # rather than a wrapper around the old one
            for (*_, new), (*_, old) in zip(self.places, before, strict=True)
        ):
            return
        ranks = {name: layer.r[self.adapter_name] for name, layer in layers.items()}
        self.sites = {n: replace(site, rank=ranks[n]) for n, site in self.sites.items() if n in ranks}
        self.calibration, self.calibrated_at = {}, {}
        self.link()

    def present_places(self) -> list[tuple[Any, str, Any]]:
        """Where layers and factors stand now: dictionary of a parent, key, module."""
        found: list[tuple[Any, str, Any]] = []
        for name, layer in self.layers.items():
            home, key = self.homes[name]._modules, name.rpartition(".")[2]
            found.append((home, key, home[key]))
            for side in (layer.lora_A._modules, layer.lora_B._modules):
                found.append((side, self.adapter_name, side[self.adapter_name]))
        return found

    def is_present(self, name: str, layer: Any) -> bool:
        """Whether a layer is where it was, or wrapped, and has this adapter."""
        found = self.homes[name]._modules.get(name.rpartition(".")[2])
        inside = found is layer or (found is not None and any(module is layer for module in found.modules()))
        return inside and self.adapter_name in layer.lora_A

    @property
    def joined(self) -> list[list[str]]:
        """Names of the layers of each chain in which some are joined."""
        return [[site.name for site in chain.sites] for chain in self.chains if len(chain.sites) > 1]

    def scales_chains_evenly(self) -> bool:
        """Whether the layers of each chain have one scaling."""
        scalings = [{self.layers[name].scaling[self.adapter_name] for name in chain} for chain in self.joined]
        return all(len(found) == 1 for found in scalings)

    @property
    def is_plain(self) -> bool:
        """Whether no layer is joined to another, so that the factors are those of a plain LoRA."""
        return len(self.alone) == len(self.chains)

    def roots_of_chains(self, model: nn.Module) -> dict[str, nn.Module]:
        """The outermost of the modules that run whole chains: one for a UNet, two for an encoder and its decoder."""
        names = self.joined
        if self.shortcut not in (Shortcut.INPUT, Shortcut.MIDDLE) or not names:
            return {self.root_name: self.root}
        found = dict(find_root(model, chain) for chain in names)
        return {n: r for n, r in found.items() if not any(o != n and is_inside(n, o) for o in found)}

    # ------------------------------------------------------------------------------------------- explain

    def explain(self) -> Explanation:
        """Which layers are joined."""
        return Explanation(
            self.shortcut, self.config.num_previous, self.chains, {n: u.kind for n, u in self.unjoined.items()}
        )

    def lora_A(self, name: str) -> Tensor:
        """`lora_A` of one layer, as it is; gathered where it is sharded."""
        layer: Any = self.layers[name]
        return whole(layer.lora_A[self.adapter_name].weight)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """`(lora_A, lora_B)` of one layer, likewise."""
        layer: Any = self.layers[name]
        return self.lora_A(name), whole(layer.lora_B[self.adapter_name].weight)

    def version(self, name: str) -> int:
        """Counts the changes of one layer's `lora_A`, of a shard too."""
        layer: Any = self.layers[name]
        return layer.lora_A[self.adapter_name].weight._version

    # ------------------------------------------------------------------------------------------- the root's forward

    def open(self, root: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the root."""
        if not torch.compiler.is_compiling():  # the form that is compiled reads factors where they are
            self.refresh()
        self.gone = self.is_gone()
        if self.gone:  # `close` will take the hooks away
            return
        if any(map(is_fused, self.fusible)) and not self.is_idle():
            raise RuntimeError(FUSED)
        self.fusion.open(self)
        if self.shortcut is Shortcut.NONE:
            return
        if getattr(root, "_is_replica", False):
            raise RuntimeError(DATA_PARALLEL)
        if self.shortcut is not Shortcut.BLOCK:
            if torch.is_grad_enabled():
                cover_checkpointing(self.checkpointing, self)
            self.context.open()

    def close(self, root: nn.Module, args: tuple, output: object) -> None:
        """Forward hook of the root; runs after an exception too."""
        self.context.close()
        self.fusion.close()
        if self.gone:
            self.remove_hooks()

    def context_fn(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For `torch.utils.checkpoint(..., use_reentrant=False, context_fn=...)` around part of the model."""
        return self.context.segment()

    def is_gone(self) -> bool:
        """Whether the adapter was deleted, or its layers unloaded, behind our back."""
        name, layer = next(iter(self.layers.items()))
        variant = layer.lora_variant.get(self.adapter_name)
        if getattr(variant, "controller", None) is not self:
            return True
        found: nn.Module | None = self.root
        for part in filter(None, name.removeprefix(self.root_name).split(".")):
            found = None if found is None else found._modules.get(part)
        return found is not layer

    def is_idle(self) -> bool:
        """Whether the layers compute without this adapter: merged, disabled, not active, or gone."""
        layer = next(iter(self.layers.values()))
        active = self.adapter_name in layer.active_adapters and not layer.disable_adapters and not layer.merged
        return not active or self.is_gone()

    def require_active(self) -> None:
        """Raise `ValueError` unless the adapter computes with its shortcuts now."""
        if self.is_idle() or self.merged is not None:
            raise ValueError(
                f"adapter {self.adapter_name!r} does not compute with its shortcuts now: it is merged, disabled, not "
                f"active, or inside merged_forward; wanted set_adapter({self.adapter_name!r}), and none of these"
            )

    def remove_hooks(self) -> None:
        """Inverse of what the constructor hung on the model."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        uncover_checkpointing(self.checkpointing, self)

    # ------------------------------------------------------------------------------------------- forward of a layer

    def forward(self, site: Site, layer: Any, x: Tensor, result: Tensor) -> Tensor:
        """`result` [..., out], the frozen layer's output on `x` [..., in], and what the adapter adds."""
        name, adapter = self.adapter_name, site.name
        dropout, scaling = layer.lora_dropout[name], layer.scaling[name]
        if self.merged is not None:
            plain = self.merged[adapter]
            A, B = plain.lora_A.to(x.dtype), plain.lora_B.to(x.dtype)
            return up_add(result, down(dropout(x), A), B, scaling)
        A, B = (factor.to(x.dtype) for factor in self.factors(adapter))
        if self.shortcut is Shortcut.BLOCK:
            earlier = [self.factors(other) for other in self.windows[adapter]]
            A, B = concatenated([(A, B), *((a.to(x.dtype), b.to(x.dtype)) for a, b in earlier)])
        if self.shortcut is Shortcut.INPUT:
            z = self.input_bottleneck(site, x, A, dropout)
        elif self.shortcut is Shortcut.MIDDLE:
            z = self.middle_bottleneck(site, x, down(dropout(x), A))
        else:
            z = down(dropout(x), A)
        return up_add(result, z, B, scaling)

    def input_bottleneck(self, site: Site, x: Tensor, lora_A: Tensor, dropout: nn.Module) -> Tensor:
        """A D(x + x') [..., r]."""
        if site.name in self.alone:
            if self.observer is not None:
                self.observer.see(site, x, [])
            return down(dropout(x), lora_A)
        carried, previous = self.read_input(site, x)
        self.let_go(site)
        self.publish(site, x)
        other = x if previous is None else previous.to(x.dtype)
        if self.observer is not None:
            self.observer.see(site, x, [(site.name, other)])
        if carried is not None:
            return down(x, lora_A) + carried.to(x.dtype)
        if previous is None:
            return 2 * down(dropout(x), lora_A)
        if isinstance(dropout, nn.Identity) or not dropout.training:
            return down_sum(x, other, lora_A)
        return down(dropout(x + other), lora_A)

    def read_input(self, site: Site, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`(A x', x')` of the layer before: one of the two, as that layer chose, or neither for a first layer."""
        names = self.read_by(site)
        carried = self.context.get(carried_key(names[0])) if names else None
        if carried is None:
            previous = self.read(site, names, x.shape)
            return None, previous[0][1] if previous else None
        self.require_root(site)
        if carried.shape[:-1] != x.shape[:-1]:
            self.skip(site, names[0], x.shape, torch.Size((*carried.shape[:-1], site.in_features)))
            return None, None
        return carried, None

    def middle_bottleneck(self, site: Site, x: Tensor, z: Tensor) -> Tensor:
        """z_n + z_{n-1} + ... [..., r], given z_n."""
        previous = self.read(site, self.read_by(site), z.shape)
        self.let_go(site)
        total = z
        for _, earlier in previous:
            total = total + earlier.to(z.dtype)
        self.publish(site, total if self.config.num_previous is None else z)
        if self.observer is not None:
            self.observer.see(site, x, previous)
        return total

    def read(self, site: Site, names: tuple[str, ...], shape: torch.Size) -> list[tuple[str, Tensor]]:
        """What the nearest predecessors published, as far back as it is there and of this shape."""
        found = []
        for name in names:
            self.require_root(site)
            value = self.context.get(name)
            if value is None or value.shape != shape:
                self.skip(site, name, shape, None if value is None else value.shape)
                break
            found.append((name, value))
        return found

    def read_by(self, site: Site) -> tuple[str, ...]:
        """Names of the published values that a layer takes in, nearest first."""
        window = self.windows[site.name]
        running_sum = self.shortcut is Shortcut.MIDDLE and self.config.num_previous is None
        return window[:1] if running_sum else window

    def let_go(self, site: Site) -> None:
        """Forget values that `site` was the only one to read: they need not live as long as the forward."""
        for name in self.read_by(site):
            if self.readers[name] == 1:
                self.context.drop(name)
                self.context.drop(carried_key(name))

    def publish(self, site: Site, value: Tensor, key: str | None = None) -> None:
        if self.readers[site.name]:
            self.require_root(site)
            self.context.put(key or site.name, value)

    def retract(self, site: Site) -> None:
        """Inverse of `publish`."""
        self.context.retract(site.name)
        self.context.retract(carried_key(site.name))

    def require_root(self, site: Site) -> None:
        if self.context.scope is None:
            roots = " or ".join(name or type(root).__name__ for name, root in self.roots.items())
            raise RuntimeError(OUTSIDE.format(layer=site.name, shortcut=str(self.shortcut), root=roots))

    def skip(self, site: Site, name: str, shape: torch.Size, found: torch.Size | None) -> None:
        """Count a link that could not be used, and warn of the first."""
        if not self.skipped:
            got = "did not run before it" if found is None else f"has shape {tuple(found)}"
            warnings.warn(
                f"the shortcut into {site.name} is skipped: {name} {got}, wanted {tuple(shape)}. The layer is treated "
                "as the first of a chain; further ones are counted in `get_controller(model).skipped`",
                stacklevel=2,
            )
        self.skipped[site.name] = self.skipped.get(site.name, 0) + 1


def is_fused(attention: Any) -> bool:
    """Whether diffusers' `fuse_qkv_projections` is in force; on older attentions undoing it leaves the flag."""
    if not attention.fused_projections:
        return False
    return hasattr(attention, "unfuse_projections") or "Fused" in type(attention.processor).__name__


def layer_shape(layer: Any) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def is_inside(name: str, ancestor: str) -> bool:
    return not ancestor or name.startswith(f"{ancestor}.")


def find_root(model: nn.Module, names: list[str]) -> tuple[str, nn.Module]:
    """The lowest common ancestor of the layers that has a forward of its own: whoever calls the layers calls it."""
    paths = [name.split(".") for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and type(model.get_submodule(".".join(common))).forward is nn.Module.forward:
        common.pop()
    name = ".".join(common)
    return name, model.get_submodule(name)


Forward = Callable[[nn.Module, Any], object]
