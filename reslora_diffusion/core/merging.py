"""From a trained shortcut to a plain LoRA, delta_weight = s B A*.

    none, block     exact: the block's own factors; the concatenation [A_n; A_{n-1}; ...], [B_n, B_{n-1}, ...]
    input, middle   A* = A + C, B unchanged, so the rank stays r; the methods differ in C:

    least_squares   C = G + (P - G S)(S + l I)^{-1}: of all C, the one that makes C x come nearest to what the shortcut
                    added at the bottleneck. The ridge l = RIDGE * tr(S) / in pulls towards G = sum_k a_k A_k, which
                    takes x_{n-k} for a_k x_n. So directions that calibration never saw get a sensible value, and a
                    layer that reads the same tensor as its predecessor (cross-attention k and v) merges exactly.
    paper_input     x_{n-k} = a_k x_n with a_k = f_{n-k} / f_n, a ratio of norms; middle in the scalar form:
                    C = (sum_k a_k) A_n                                        (arXiv 2402.18039, section 3.3, merge_bi)
    paper_weight    the norms of merged weights instead, f_j = ||W_j + s B_j A_j*||_F, as x_j is made by layer j - 1:
                    a_k = f_{n-k-1} / f_{n-1}, C = sum_k a_k A_k                                            (merge_bw)
    drop            C = 0

A_k is A_n for `input`, where A_n reads x_{n-1} too, and A_{n-k} for `middle`. S, P, a, f: `core.statistics`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..plain_lora import changes_the_base
from ..problems import listing
from ..rules import VARIANTS
from .attach import DEFAULT_ADAPTER, get_controller
from .chains import Site
from .config import MergeMethod, Shortcut
from .controller import Controller
from .functional import LoraFactors, concatenated
from .sharding import whole
from .statistics import Moments, Norms

RIDGE = 1e-3
MORE_THAN_FACTORS = (
    "adapter {adapter!r} has more than factors of linear layers and convolutions, so no plain LoRA file can hold it; "
    "use merge_and_unload, or adapt other layers"
)

# ------------------------------------------------------------------------------------------------ corrections


def least_squares_correction(guess: Tensor, second: Tensor, cross: Tensor, ridge: float = RIDGE) -> Tensor:
    """C [r, in] from G [r, in], S [in, in] and P [r, in], in float64."""
    G, S, P = (value.double() for value in (guess, second, cross))
    size = S.diagonal().mean()
    if not size > 0:  # the layer read nothing but zeros
        return G
    S_ridge = S + ridge * size * torch.eye(len(S), dtype=S.dtype, device=S.device)
    return G + torch.linalg.solve(S_ridge, P - G @ S, left=False)


def neighbours(controller: Controller, site: Site) -> list[str]:
    """Layers that the shortcut into `site` reads, nearest first; the first of several of `input` reads itself."""
    window = list(controller.windows[site.name])
    if controller.shortcut is Shortcut.INPUT and site.name not in controller.alone:
        return window[:1] or [site.name]
    return window


def factor_read(controller: Controller, site: Site, neighbour: str) -> Tensor:
    """A_k: the down-projection that is applied to the input of `neighbour`."""
    return controller.lora_A(site.name if controller.shortcut is Shortcut.INPUT else neighbour).detach()


def least_squares(controller: Controller, site: Site, moments: Moments) -> Tensor:
    A = controller.lora_A(site.name).detach()
    if site.name not in moments.cross:
        return torch.zeros_like(A)
    inner = moments.inner[site.name]
    guess = torch.zeros_like(A, dtype=torch.float64)
    for name in neighbours(controller, site):
        key = site.name if controller.shortcut is Shortcut.INPUT else name
        if key in inner and inner[""] > 0:
            guess += inner[key] / inner[""] * factor_read(controller, site, name).double()
    return least_squares_correction(guess, moments.second_of(site.name), moments.cross[site.name])


def paper_input(controller: Controller, site: Site, norms: Norms) -> Tensor:
    total = sum(norms.mean(name) / norms.mean(site.name) for name in neighbours(controller, site))
    return total * controller.lora_A(site.name).detach()


def paper_weight(controller: Controller) -> dict[str, Tensor]:
    """C of every layer; f of a layer needs C of that layer, so chains are walked in order."""
    corrections: dict[str, Tensor] = {}
    for chain in controller.chains:
        size: list[float] = []
        for place, site in enumerate(chain.sites):
            A, B = (factor.detach() for factor in controller.factors(site.name))
            correction = torch.zeros_like(A)
            for back, name in enumerate(neighbours(controller, site), 1):
                reaches = place - back - 1
                ratio = size[reaches] / size[place - 1] if reaches >= 0 else 1.0
                correction = correction + ratio * factor_read(controller, site, name)
            corrections[site.name] = correction
            layer = controller.layers[site.name]
            base: Any = layer.get_base_layer()
            W = whole(dequantize_module_weight(base).detach()).to(A)
            delta = layer.scaling[controller.adapter_name] * (B @ (A + correction))
            size.append((W + (delta.T if getattr(layer, "fan_in_fan_out", False) else delta)).norm().item())
    return corrections


# --------------------------------------------------------------------------------------------- merged factors


def corrections_of(controller: Controller) -> dict[str, Tensor]:
    """C of every layer by the configured method.

    Raises:
        ValueError: the method needs `calibrate` first.
    """
    method = MergeMethod(controller.config.merge_method)
    if controller.is_plain or controller.shortcut is Shortcut.BLOCK or method is MergeMethod.DROP:
        return {name: torch.zeros_like(controller.lora_A(name).detach()) for name in controller.sites}
    if method is MergeMethod.PAPER_WEIGHT:
        return paper_weight(controller)
    if controller.calibration.keys() != controller.sites.keys():
        raise ValueError(
            f"merging shortcut {str(controller.shortcut)!r} by {method} needs activations: call calibrate(model, "
            "batches, forward) first, or choose merge_method='paper_weight' or 'drop', which need none"
        )
    versions = controller.calibrated_at
    if any(controller.version(name) != version for name, version in versions.items()):
        controller.calibrated_at = {}
        warnings.warn("the adapter was trained on since it was calibrated; calibrate it again", stacklevel=3)
    return controller.calibration


def plain_factors(controller: Controller, site: Site, correction: Tensor) -> LoraFactors:
    A, B = controller.factors(site.name)
    scaling = controller.layers[site.name].scaling[controller.adapter_name]
    if controller.shortcut is Shortcut.BLOCK:
        A, B = concatenated([(A, B), *(controller.factors(name) for name in controller.windows[site.name])])
    elif controller.shortcut is not Shortcut.NONE:
        A = A.detach() + correction.to(A)
    return LoraFactors(A.detach(), B.detach(), scaling)


def merged_factors_of(controller: Controller, site: Site) -> LoraFactors:
    """The plain LoRA of one layer."""
    return plain_factors(controller, site, corrections_while_merging(controller)[site.name])


def corrections_while_merging(controller: Controller) -> dict[str, Tensor]:
    """C of every layer, while some may be merged already: no C may depend on their merged weights."""
    if not any(controller.adapter_name in layer.merged_adapters for layer in controller.layers.values()):
        controller.corrections_while_merged = corrections_of(controller)
    return controller.corrections_while_merged


def merged_factors(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, LoraFactors]:
    """The plain LoRA that the adapter merges into, by module path: what `export_lora` writes.

    Raises:
        ValueError: the method needs `calibrate` first, or the adapter is not only factors of linear layers.
    """
    controller = get_controller(model, adapter_name)
    refuse_more_than_factors(controller.config)
    return joined_factors(controller) | unjoined_factors(controller)


def refuse_more_than_factors(config: LoraConfig) -> None:
    """Raise `ValueError` if factors alone do not say what an adapter of this configuration changes."""
    if config.bias != "none":
        raise ValueError(
            f"bias={config.bias!r} trains biases, which are no factors and would be lost; use "
            "merge_and_unload or save_pretrained, or train with bias='none'"
        )
    if changes_the_base(config.init_lora_weights):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} has changed the base weights, so the factors are no LoRA "
            "of the base that others have; use merge_and_unload, or train with init_lora_weights=True"
        )


def plain_lora_factors(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, LoraFactors]:
    """The factors of a plain LoRA adapter, made by PEFT's `LoraConfig`, by module path.

    Raises:
        ValueError: there is no such adapter, or it is more than factors of linear layers and convolutions.
    """
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in {*layer.lora_A, *layer.lora_embedding_A}
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA adapter {adapter_name!r}")
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    refuse_more_than_factors(config)
    more = [name for name in VARIANTS if getattr(config, name, None)]
    more += [
        name
        for name, layer in layers.items()
        if adapter_name in layer.lora_embedding_A or isinstance(layer, ParamWrapper) or layer.lora_bias[adapter_name]
    ]
    if more:
        raise ValueError(f"{MORE_THAN_FACTORS.format(adapter=adapter_name)}: {listing(more)}")
    return {
        name: LoraFactors(
            whole(layer.lora_A[adapter_name].weight).detach(),
            whole(layer.lora_B[adapter_name].weight).detach(),
            layer.scaling[adapter_name],
        )
        for name, layer in layers.items()
    }


def joined_factors(controller: Controller) -> dict[str, LoraFactors]:
    """The plain LoRA of the layers that shortcuts may join."""
    corrections = corrections_while_merging(controller)
    return {name: plain_factors(controller, site, corrections[name]) for name, site in controller.sites.items()}


def unjoined_factors(controller: Controller) -> dict[str, LoraFactors]:
    """The plain LoRA of the layers that no shortcut joins, such as convolutions.

    Raises:
        ValueError: a layer's adapter is not two factors of a linear map; all such layers are named.
    """
    adapter = controller.adapter_name
    problems = [f"  - {name}: {other.kind}" for name, other in controller.unjoined.items() if not other.has_factors]
    if problems:
        raise ValueError("\n".join([f"{MORE_THAN_FACTORS.format(adapter=adapter)}:", *problems]))
    return {
        name: LoraFactors(
            whole(layer.lora_A[adapter].weight).detach(),
            whole(layer.lora_B[adapter].weight).detach(),
            layer.scaling[adapter],
        )
        for name, (layer, *_) in controller.unjoined.items()
    }


@contextmanager
def merged_forward(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> Iterator[None]:
    """Inside, the model computes as the exported LoRA will, without touching a weight."""
    controller = get_controller(model, adapter_name)
    with computing_as(controller, joined_factors(controller)):
        yield


@contextmanager
def computing_as(controller: Controller, factors: dict[str, LoraFactors]) -> Iterator[None]:
    """Inside, the layers that shortcuts may join compute plain LoRA with these factors."""
    before, controller.merged = controller.merged, factors
    try:
        yield
    finally:
        controller.merged = before
