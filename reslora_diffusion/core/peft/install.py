"""Turning layers that PEFT has freshly injected into an `Adapter`."""

import logging
from typing import Any

from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora.layer import MultiheadAttention
from torch import nn

from ...rules import Shortcut
from ...utils.problems import listing
from ..adapter import Adapter, Unjoined
from ..arrivals import make_places
from ..config import ResLoraConfig
from ..discovery import runs_twice
from ..dora import start_at_the_base
from ..shortcuts import SHORTCUTS
from .variant import put_variant

log = logging.getLogger(__name__)
WITHOUT_VARIANTS = ("aqlm", "awq", "eetq", "inc", "te", "tp_layer")  # layers of PEFT that never ask for one


def install(model: nn.Module, adapter_name: str, configs: dict[str, Any]) -> None:
    """Give every linear layer of a freshly injected adapter its variant, and the layers their `Adapter`.

    Convolutions, embeddings, `nn.MultiheadAttention` and `target_parameters` (fused experts) stay PEFT's plain LoRA; an
    adapter of nothing else has no `Adapter`.

    Args:
        configs: `peft_config` of the model.
    """
    config: ResLoraConfig = configs[adapter_name]
    layers: dict[str, LoraLayer] = {}
    names: dict[int, list[str]] = {}
    silent = []
    unjoined: dict[str, Unjoined] = {}
    by_merging: list[str] = []  # torch's own attention computes from merged weights, its output projection included
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, MultiheadAttention):
            by_merging.append(f"{name}.")
        if not isinstance(layer, LoraLayer) or adapter_name not in {*layer.lora_A, *layer.lora_embedding_A}:
            continue
        if other := beside_chains(layer, adapter_name, f"{name}.".startswith(tuple(by_merging))):
            unjoined[name] = other
            continue
        if type(layer).__module__.rpartition(".")[2] in WITHOUT_VARIANTS:
            silent.append(f"{name} ({type(layer).__name__})")
        names.setdefault(id(layer), []).append(name)
        layers.setdefault(names[id(layer)][0], layer)
    if silent and config.effective_shortcut is not Shortcut.NONE:
        raise ValueError(
            f"{len(silent)} layers are of kinds that cannot carry a shortcut, such as {', '.join(silent[:3])}; "
            "use LoraConfig, or a base quantised by bitsandbytes, GPTQ, HQQ or torchao"
        )
    if not layers:
        if config.effective_shortcut is not Shortcut.NONE:
            log.warning("no linear layer is adapted, so no shortcut joins anything: this is plain LoRA")
        return
    unlinked = {known[0]: f"also known as {known[1]}" for known in names.values() if len(known) > 1}
    if SHORTCUTS[config.effective_shortcut].crosses_layers:
        unlinked |= {name: "runs more than once in a forward" for name in layers if runs_twice(model, name)}
    if config.use_dora:
        others = [layer for layer, _, has_factors in unjoined.values() if has_factors]
        for layer in (*layers.values(), *others):
            start_at_the_base(layer, adapter_name)
    adapter = Adapter(model, adapter_name, configs, layers, unlinked, unjoined)
    log_what_is_alone(adapter)
    for name, layer in layers.items():
        put_variant(layer, adapter, name)
    make_places(adapter)


def log_what_is_alone(adapter: Adapter) -> None:
    """Log which layers the shortcut joins to no other; as a warning where that is all of a role."""
    found = adapter.explain()
    if not (kinds := found.joined_to_nothing) or found.shortcut is Shortcut.NONE:
        return
    joined = {chain.role for chain in found.chains if len(chain.sites) > 1}
    expected = not found.unjoined and {site.role for site in found.alone} <= joined
    what = listing([f"{count} x {kind}" for kind, count in kinds.items()])
    log.log(
        logging.INFO if expected else logging.WARNING,
        f"shortcut {str(found.shortcut)!r} joins {sum(kinds.values())} of {found.sites + len(found.unjoined)} adapted "
        f"layers to no other; they compute plain LoRA: {what}",
    )


def beside_chains(layer: Any, adapter_name: str, by_merging: bool) -> Unjoined | None:
    """Describe an adapted layer that no shortcut can join; None for a linear layer."""
    if adapter_name in layer.lora_embedding_A:
        return Unjoined(layer, "embedding", has_factors=False)
    if isinstance(layer, ParamWrapper):
        return Unjoined(layer, f"parameter {layer.parameter_name!r} (target_parameters)", has_factors=False)
    if by_merging:
        return Unjoined(layer, "torch.nn.MultiheadAttention", has_factors=True)
    if not isinstance(layer.lora_A[adapter_name], nn.Linear):
        return Unjoined(layer, type(layer.get_base_layer()).__name__, has_factors=True)
    return None
