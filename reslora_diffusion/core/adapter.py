"""One adapter on one model: its layers, their chains, and the hooks around a forward of the model.

An `Adapter` is reached from every adapted layer (`core.peft.lookup.adapter_of`) and from nowhere else: it
is no module, holds no parameters, and goes with its layers through `deepcopy`. What a layer computes is in
`core.shortcuts` and `core.layer`; what the adapter merges into is in `core.merging`.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..rules import Shortcut
from .arrivals import settle, warn_of_lost_links
from .chains import build_chains, windows
from .checkpointing import cover_checkpointing, may_checkpoint, uncover_checkpointing
from .config import ResLoraConfig
from .discovery import find_sites
from .dora import transform_of
from .explanations import Explanation, KernelReport
from .layer import AdaptedLayer, Gate, Shared
from .packed import Packer
from .peft.lookup import adapter_of
from .roots import DATA_PARALLEL, FUSED_PROJECTIONS, find_root, find_roots, is_fused, may_be_fused
from .sharding import are_whole, whole
from .shortcuts import SHORTCUTS, Input, Plain

ALONE = SHORTCUTS[Shortcut.NONE]  # what a layer computes that is joined to no other: plain LoRA
Forward = Callable[[nn.Module, Any], object]  # runs a model on a batch


class Unjoined(NamedTuple):
    """A layer that is adapted by plain LoRA beside the chains, such as a convolution."""

    layer: LoraLayer
    kind: str
    has_factors: bool  # of a linear map or a convolution, as `LoraFactors` holds them


class Adapter(Shared):
    """Adapter `adapter_name` of `model`. Made by injecting a `ResLoraConfig`; found by `get_adapter`."""

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str,
        configs: dict[str, Any],
        layers: dict[str, Any],
        unlinked: dict[str, str],
        unjoined: dict[str, Unjoined],
    ) -> None:
        super().__init__(adapter_name)
        self.configs = configs  # `peft_config` of the model
        self.config: ResLoraConfig = configs[adapter_name]
        self.layers = layers
        self.unjoined = unjoined
        shapes = {n: (one.in_features, one.out_features, one.r[adapter_name]) for n, one in layers.items()}
        self.sites = {site.name: site for site in find_sites(model, shapes, unlinked)}
        self.calibration: dict[str, Tensor] = {}  # C by layer; see core.merging
        self.calibrated_A: dict[str, Tensor] = {}  # lora_A by layer, as it was then
        self.awaits = False  # whether buffers are there for what a loader puts beside the factors; see core.arrivals
        self.lacks_links = False  # whether it was loaded without the frozen links that its file has
        self.corrections_while_merged: dict[str, Tensor] = {}
        self.groups: dict[str, tuple[str, ...]] = {}  # by layer, those that `core.grouping` computes together
        self.packer = Packer()
        self.adapted: dict[str, AdaptedLayer] = {}
        homes = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in layers]
        self.homes = dict(zip(layers, homes, strict=True))  # the module that each layer is in, and its name there
        self.root_name, self.root = find_root(model, list(layers))
        self.attentions = may_be_fused(model, [home for home, _ in homes])
        self.gone = False
        self.link()
        self.roots = (find_roots(model, self.joined) if self.path.crosses_layers else {}) or {self.root_name: self.root}
        self.checkpointing = [module for root in self.roots.values() for module in may_checkpoint(root)]
        self.hooks: list[Any] = []
        for root in self.roots.values():
            self.hooks.append(root.register_forward_pre_hook(self.open))
            self.hooks.append(root.register_forward_hook(self.close, always_call=True))

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle, without the layers, which refer to each other as far as chains reach."""
        return self.__dict__ | {"adapted": {}, "packed": {}, "prepared": {}}

    # ------------------------------------------------------------------------------------------------- chains

    @property
    def path(self) -> Plain:
        """The shortcut as `core.shortcuts` has it: what it links, computes and merges into."""
        return SHORTCUTS[self.shortcut]

    @property
    def by_data(self) -> Input:
        """The shortcut, where what it merges into depends on data."""
        assert isinstance(self.path, Input)
        return self.path

    @property
    def joined(self) -> list[list[str]]:
        """Names of the layers of each chain in which some are joined."""
        return [[site.name for site in chain.sites] for chain in self.chains if len(chain.sites) > 1]

    @property
    def dora(self) -> bool:
        """Return whether each layer has a magnitude beside its factors."""
        return bool(self.config.use_dora)

    @property
    def is_plain(self) -> bool:
        """Return whether the factors are a plain LoRA's: no layer is joined to another, and none has frozen links."""
        return not self.joined and not self.frozen

    @property
    def merges_exactly(self) -> bool:
        """Return whether the plain LoRA that it merges into computes the same on any data."""
        return self.is_plain or self.path.merges_exactly

    def link(self) -> None:
        """Build the chains of the configuration as it is now, and tell each layer its place in them."""
        self.shortcut = self.config.effective_shortcut
        self.transform = transform_of if self.dora else self.transform
        path, m = self.path, self.config.num_previous
        dropouts = [layer.lora_dropout[self.adapter_name] for layer in self.layers.values()]
        self.dropless = all(isinstance(dropout, nn.Identity) for dropout in dropouts)
        self.chains = build_chains(self.sites.values(), path.links, self.config.same_resolution_only)
        self.windows = windows(self.chains, m)
        self.packer.forget()
        self.watch()
        self.adapted = {name: AdaptedLayer(site, self.layers[name], self) for name, site in self.sites.items()}
        running_sum = self.shortcut is Shortcut.MIDDLE and m is None
        for chain in self.chains:
            members = [self.adapted[site.name] for site in chain.sites]
            for place, layer in enumerate(members):
                layer.path = path if len(members) > 1 else ALONE
                layer.window = tuple(self.adapted[name] for name in self.windows[layer.name])
                layer.blocks = layer.path.blocks(layer)
                if path.crosses_layers:
                    later = len(members) - 1 - place
                    layer.sums = running_sum
                    layer.readers = min(later, 1 if running_sum else m or later)
                    layer.reads = layer.window[:1] if running_sum else layer.window
                    layer.follower = members[place + 1] if later else None

    def layer(self, name: str) -> AdaptedLayer:
        """A layer of the adapter; a copy of an adapter makes its layers on first use."""
        if not self.adapted:
            self.link()
        return self.adapted[name]

    def own_config(self) -> ResLoraConfig:
        """The configuration, to be changed: users give one to several models, so the model gets a copy in its place."""
        self.config = self.configs[self.adapter_name] = copy.copy(self.config)
        return self.config

    def watch(self) -> None:
        """Remember which modules are where layers and factors belong."""
        name = self.adapter_name
        self.places: list[tuple[dict, str]] = []
        for layer_name, layer in self.layers.items():
            home, leaf = self.homes[layer_name]
            self.places += [(home._modules, leaf), (layer.lora_A._modules, name), (layer.lora_B._modules, name)]
        self.placed: list[Any] = [modules.get(key) for modules, key in self.places]

    def refresh(self) -> None:
        """Link anew if something has put other factors into the layers: `update_layer`, EVA's initialisation, which
        takes the adapter off some of them too. Wrappers around them change nothing here."""
        if [modules.get(key) for modules, key in self.places] == self.placed:
            return
        if not (layers := {name: layer for name, layer in self.layers.items() if self.has(name, layer)}):
            return
        before, fewer, self.layers = self.placed, len(layers) < len(self.layers), layers
        self.watch()
        if fewer or any(a is not b and "weight" in b._parameters for a, b in zip(before, self.placed, strict=True)):
            ranks = {name: layer.r[self.adapter_name] for name, layer in layers.items()}
            self.sites = {n: replace(site, rank=ranks[n]) for n, site in self.sites.items() if n in ranks}
            self.calibration, self.calibrated_A = {}, {}
            self.link()

    def has(self, name: str, layer: Any) -> bool:
        """Return whether a layer is where it was, or wrapped, and still has the adapter."""
        home, leaf = self.homes[name]
        found = home._modules.get(leaf)
        inside = found is layer or (found is not None and any(module is layer for module in found.modules()))
        return inside and self.adapter_name in layer.lora_A

    def explain(self) -> Explanation:
        """Report which layers are joined."""
        unjoined = {name: other.kind for name, other in self.unjoined.items()}
        return Explanation(self.shortcut, self.config.num_previous, self.chains, unjoined)

    def explain_kernels(self) -> KernelReport:
        """Report which kernel computed each layer in the last forward, and why."""
        choices = {name: self.layer(name).choice for name in self.sites}
        return KernelReport({name: choice and (choice.name, choice.reason) for name, choice in choices.items()})

    # ------------------------------------------------------------------------------------------------ factors

    def lora_A(self, name: str) -> Tensor:
        """`lora_A` of one layer, gathered where it is sharded."""
        return whole(self.layers[name].lora_A[self.adapter_name].weight)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """`(lora_A, lora_B)` of one layer, gathered where they are sharded."""
        return self.lora_A(name), whole(self.layers[name].lora_B[self.adapter_name].weight)

    def changed_since_calibration(self) -> bool:
        """Return whether some `lora_A` is another than when `calibrate` ran."""
        return any(not torch.equal(now := self.lora_A(n), A.to(now)) for n, A in self.calibrated_A.items())

    # ---------------------------------------------------------------------------------------- the root's forward

    def open(self, root: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the root."""
        if not torch.compiler.is_compiling():
            self.refresh()
            settle(self)
            warn_of_lost_links(self)
        self.gone = self.is_gone()
        if self.gone:  # `close` will take the hooks away
            return
        if any(map(is_fused, self.attentions)) and not self.is_idle():
            raise RuntimeError(FUSED_PROJECTIONS)
        if not self.adapted:
            self.link()
        if getattr(root, "_is_replica", False):
            raise RuntimeError(DATA_PARALLEL)
        if not torch.compiler.is_compiling():
            self.pack()
        if self.path.crosses_layers:
            if torch.is_grad_enabled():
                cover_checkpointing(self.checkpointing, self)
            self.context.open(root)

    def close(self, root: nn.Module, args: tuple, output: object) -> None:
        """Forward hook of the root; runs after an exception too."""
        self.context.close(root)
        self.prepared.clear()
        self.packed.clear()
        if self.gone:
            self.remove_hooks()

    def context_fn(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """A `context_fn` for `torch.utils.checkpoint(..., use_reentrant=False)` around part of the model."""
        return self.context.segment()

    def is_gone(self) -> bool:
        """Return whether the adapter was deleted, or its layers unloaded, without a call of ours."""
        name, layer = next(iter(self.layers.items()))
        if adapter_of(layer, self.adapter_name) is not self:
            return True
        found: nn.Module | None = self.root
        for part in filter(None, name.removeprefix(self.root_name).split(".")):
            found = None if found is None else found._modules.get(part)
        return found is not layer

    def is_idle(self) -> bool:
        """Return whether the layers compute without this adapter: merged, disabled, not active, or gone."""
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

    def pack(self) -> None:
        """Cast and lay together the factors of a forward that begins, where that saves work (`core.packed`)."""
        self.packed = {}  # those of a forward that Ctrl-C ended are still there
        name = self.adapter_name
        modules = [module for layer in self.adapted.values() for module in (layer.downs[name], layer.ups[name])]
        factors: list[Any] = [module._parameters.get("weight") for module in modules]
        self.ordinary = are_whole(factors)
        device = factors[0].device.type if self.ordinary else "cpu"
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if self.ordinary and not (autocast or self.gates or self.frozen or self.merged is not None or self.is_idle()):
            ahead = self.shortcut is Shortcut.INPUT and self.dropless and self.observer is None
            self.packed = self.packer.pack(self.adapted, factors, self.groups, ahead)

    # ------------------------------------------------------------------------------- what schedules may change

    def set_gates(self, gates: Mapping[str, Gate]) -> None:
        """Multiply s B A of some blocks by a gate, in every layer that uses them; blocks without one are open.

        A number of 0 saves the products of the block; a scalar on the device can change without recompilation.

        Raises:
            ValueError: a layer is not in this adapter.
        """
        self.refuse_strangers(gates)
        self.gates = dict(gates)

    def add_frozen(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Put one more pair (A, B) beside the factors of some layers, under the same scaling, and never train it.

        Raises:
            ValueError: a layer is not in this adapter, or its shortcut does not merge exactly.
        """
        self.refuse_strangers(factors)
        if not self.path.merges_exactly:
            raise ValueError(f"frozen factors are for shortcuts none and block; got {str(self.shortcut)!r}")
        for name, (A, B) in factors.items():
            self.frozen.setdefault(name, []).append((A.detach(), B.detach()))

    def refuse_strangers(self, names: Iterable[str]) -> None:
        if strange := [name for name in names if name not in self.sites]:
            known = next(iter(self.sites))
            raise ValueError(
                f"adapter {self.adapter_name!r} has no layers {', '.join(strange)}; it has such as {known}"
            )
