"""The correction C that merging adds to lora_A: delta_weight = s B (A + C), of the same rank r.

    none, block     C is not needed: these merge exactly
    input, middle   the methods differ in C:

    least_squares   C = G + (P - G S)(S + l I)^{-1}: of all C, the one that makes C x come nearest to what the shortcut
                    added at the bottleneck. The ridge l = RIDGE * tr(S) / in pulls towards G = sum_k a_k A_k, which
                    takes x_{n-k} for a_k x_n. So directions that calibration never saw get a sensible value, and a
                    layer that reads the same tensor as its predecessor (cross-attention k and v) merges exactly.
    paper_input     x_{n-k} = a_k x_n with a_k = f_{n-k} / f_n, a ratio of norms; middle in the scalar form:
                    C = (sum_k a_k) A_n                                        (arXiv 2402.18039, section 3.3, merge_bi)
    paper_weight    the norms of merged weights instead, f_j = ||W_j + s B_j A_j*||_F, as x_j is made by layer j - 1:
                    a_k = f_{n-k-1} / f_{n-1}, C = sum_k a_k A_k                                            (merge_bw)
    drop            C = 0

A_k is A_n for `input`, where A_n reads x_{n-1} too, and A_{n-k} for `middle`. S, P, a, f: `core.merging.statistics`.
"""

import warnings
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from ...rules import MergeMethod
from ..adapter import Adapter
from ..arrivals import settle
from ..chains import Site
from ..functional import to_float64
from ..sharding import whole
from .statistics import Moments, Norms

RIDGE = 1e-3


def least_squares_correction(guess: Tensor, second: Tensor, cross: Tensor, ridge: float = RIDGE) -> Tensor:
    """C [r, in] from G [r, in], S [in, in] and P [r, in], in float64."""
    G, S, P = (to_float64(value) for value in (guess, second, cross))
    size = S.diagonal().mean()
    if not size > 0:  # the layer read nothing but zeros
        return G
    S_ridge = S + ridge * size * torch.eye(len(S), dtype=S.dtype, device=S.device)
    return G + torch.linalg.solve(S_ridge, P - G @ S, left=False)


def neighbours(adapter: Adapter, site: Site) -> list[tuple[str, str]]:
    """The layers whose input `site` reads, nearest first, each with the layer whose lora_A is the A_k of it."""
    return adapter.by_data.neighbours(adapter.layer(site.name))


def least_squares(adapter: Adapter, site: Site, moments: Moments) -> Tensor:
    A = adapter.lora_A(site.name).detach()
    if site.name not in moments.cross:
        return torch.zeros_like(A)
    guess = torch.zeros_like(to_float64(A))
    for _, reader in neighbours(adapter, site):
        other = to_float64(adapter.lora_A(reader).detach()).to(guess.device)
        guess += float(moments.alignment(site.name, reader)) * other
    return least_squares_correction(guess, moments.second_of(site.name), moments.cross[site.name])


def paper_input(adapter: Adapter, site: Site, norms: Norms) -> Tensor:
    total = sum(norms.mean(name) / norms.mean(site.name) for name, _ in neighbours(adapter, site))
    return total * adapter.lora_A(site.name).detach()


def paper_weight(adapter: Adapter) -> dict[str, Tensor]:
    """C of every layer; f of a layer needs C of that layer, so chains are walked in order."""
    corrections: dict[str, Tensor] = {}
    for chain in adapter.chains:
        size: list[float] = []
        for place, site in enumerate(chain.sites):
            A, B = (factor.detach() for factor in adapter.factors(site.name))
            correction = torch.zeros_like(A)
            for back, (_, reader) in enumerate(neighbours(adapter, site), 1):
                reaches = place - back - 1
                ratio = size[reaches] / size[place - 1] if reaches >= 0 else 1.0
                correction = correction + ratio * adapter.lora_A(reader).detach().to(A.device)
            corrections[site.name] = correction
            layer = adapter.layers[site.name]
            base: Any = layer.get_base_layer()
            W = whole(dequantize_module_weight(base).detach()).to(A)
            delta = layer.scaling[adapter.adapter_name] * (B @ (A + correction))
            size.append((W + (delta.T if getattr(layer, "fan_in_fan_out", False) else delta)).norm().item())
    return corrections


def corrections_of(adapter: Adapter) -> dict[str, Tensor]:
    """C of every layer by the configured method; raises `ValueError` where that needs `calibrate` first."""
    settle(adapter)
    method = MergeMethod(adapter.config.merge_method)
    if adapter.merges_exactly or method is MergeMethod.DROP:
        return {name: torch.zeros_like(adapter.lora_A(name).detach()) for name in adapter.sites}
    if method is MergeMethod.PAPER_WEIGHT:
        return paper_weight(adapter)
    if adapter.calibration.keys() != adapter.sites.keys():
        raise ValueError(
            f"merging shortcut {str(adapter.shortcut)!r} by {method} needs activations: call calibrate(model, "
            "batches, forward) first, or choose merge_method='paper_weight' or 'drop', which need none"
        )
    if adapter.changed_since_calibration():
        adapter.calibrated_A = {}
        warnings.warn("the adapter was trained on since it was calibrated; calibrate it again", stacklevel=3)
    return adapter.calibration
