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

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .attach import DEFAULT_ADAPTER, get_controller
from .chains import Site
from .config import MergeMethod, Shortcut
from .controller import Controller, Forward
from .functional import LoraFactors, concatenated
from .statistics import Moments, Norms, OutputErrors, load_statistics, save_statistics

RIDGE = 1e-3
RESUME_EVERY = 16  # batches between two writes of a resume file
STATISTICS_BYTES = 4 * 1024**3  # of second moments held at once; more layers take more passes over the batches

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
    """Layers that the shortcut into `site` reads, nearest first; a first layer of `input` reads itself."""
    window = list(controller.windows[site.name])
    if controller.shortcut is Shortcut.INPUT:
        return window[:1] or [site.name]
    return window


def factor_read(controller: Controller, site: Site, neighbour: str) -> Tensor:
    """A_k: the down-projection that is applied to the input of `neighbour`."""
    return controller.factors(site.name if controller.shortcut is Shortcut.INPUT else neighbour)[0].detach()


def least_squares(controller: Controller, site: Site, moments: Moments) -> Tensor:
    A = controller.factors(site.name)[0].detach()
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
    return total * controller.factors(site.name)[0].detach()


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
            W = base.weight.detach().to(A)
            delta = layer.scaling[controller.adapter_name] * (B @ (A + correction))
            size.append((W + (delta.T if getattr(layer, "fan_in_fan_out", False) else delta)).norm().item())
    return corrections


# ------------------------------------------------------------------------------------------------ calibration


def needs_calibration(controller: Controller) -> bool:
    """Whether merging depends on data."""
    return controller.shortcut in (Shortcut.INPUT, Shortcut.MIDDLE) and controller.config.merge_method in (
        MergeMethod.LEAST_SQUARES,
        MergeMethod.PAPER_INPUT,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no gradients and no dropout; every module is put back as it was."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in trained:
            module.training = True


def observe(
    controller: Controller,
    observer: Any,
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    resume_file: Path | None = None,
) -> int:
    """Run batches while `observer` sees what flows through the shortcuts; returns how many there were.

    With `resume_file`, sums are put down there as they grow, and batches that are in it already are not run again.
    """
    done = load_statistics(resume_file, observer, controller_device(controller)) if resume_file else 0
    count = 0
    controller.observer = observer
    try:
        with evaluating(model):
            for batch in batches:
                count += 1
                if count <= done:
                    continue
                observer.start_batch()
                forward(model, batch)
                if resume_file and count % RESUME_EVERY == 0:
                    save_statistics(resume_file, observer, count)
    finally:
        controller.observer = None
        observer.start_batch()
    if resume_file and count > done:
        save_statistics(resume_file, observer, count)
    observer.all_reduce()
    return count


def controller_device(controller: Controller) -> torch.device:
    return controller.factors(next(iter(controller.layers)))[0].device


def passes(controller: Controller, limit: int) -> list[set[str]]:
    """Layers in groups whose second moments fit in `limit` bytes, whole chains' neighbours together."""
    groups: list[set[str]] = [set()]
    used = 0
    for site in sorted(controller.sites.values(), key=lambda site: site.in_features):
        size = 4 * site.in_features**2
        if used + size > limit and groups[-1]:
            groups.append(set())
            used = 0
        groups[-1].add(site.name)
        used += size
    return groups


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    statistics_bytes: int = STATISTICS_BYTES,
    resume_file: str | os.PathLike | None = None,
) -> None:
    """Find C for every layer of `model`, from batches like those it was trained on; C replaces an earlier one.

    Does nothing for shortcuts and methods that need no data. The model is run in evaluation mode, without gradients.

    Args:
        batches: what `forward` takes. Read once if the statistics fit in `statistics_bytes`, else once per group of
            layers, and must then be a sequence.
        forward: runs the model on a batch, as in training; what it returns is not used.
        statistics_bytes: bound on the memory of second moments.
        resume_file: where sums are kept, one file for each process and group of layers, so that a calibration that was
            cut off, or is given more batches, goes on. It belongs to one adapter as it is: remove it when that changes.

    Raises:
        ValueError: there are no batches, or they can be read only once where that is not enough.
    """
    controller = get_controller(model, adapter_name)
    if not needs_calibration(controller):
        return
    groups = passes(controller, statistics_bytes)
    if controller.config.merge_method == MergeMethod.PAPER_INPUT:
        groups = [set(controller.sites)]
    if len(groups) > 1 and not isinstance(batches, Sequence):
        raise ValueError(
            f"the statistics take {len(groups)} passes over the batches (statistics_bytes={statistics_bytes}); got "
            f"{type(batches).__name__}, which can be read once; wanted a list"
        )
    corrections: dict[str, Tensor] = {}
    for number, group in enumerate(groups):
        file = numbered(resume_file, number) if resume_file else None
        if controller.config.merge_method == MergeMethod.LEAST_SQUARES:
            moments = Moments(controller, group)
            count = observe(controller, moments, model, batches, forward, file)
            found = {name: least_squares(controller, controller.sites[name], moments) for name in group}
        else:
            norms = Norms(controller)
            count = observe(controller, norms, model, batches, forward, file)
            found = {name: paper_input(controller, controller.sites[name], norms) for name in group}
        if count == 0:
            raise ValueError("calibrate: got no batches")
        corrections |= {name: correction.to(controller.factors(name)[0]) for name, correction in found.items()}
    controller.calibration = corrections
    controller.calibrated_at = {name: controller.factors(name)[0]._version for name in corrections}


def numbered(file: str | os.PathLike, group: int) -> Path:
    """`sums.safetensors` -> `sums-<process>-<group>.safetensors`."""
    path = Path(file)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    process = torch.distributed.get_rank() if distributed else 0
    return path.with_name(f"{path.stem}-{process}-{group}.safetensors")


# --------------------------------------------------------------------------------------------- merged factors


def corrections_of(controller: Controller) -> dict[str, Tensor]:
    """C of every layer by the configured method.

    Raises:
        ValueError: the method needs `calibrate` first.
    """
    method = MergeMethod(controller.config.merge_method)
    if controller.shortcut in (Shortcut.NONE, Shortcut.BLOCK) or method is MergeMethod.DROP:
        return {name: torch.zeros_like(controller.factors(name)[0].detach()) for name in controller.sites}
    if method is MergeMethod.PAPER_WEIGHT:
        return paper_weight(controller)
    if controller.calibration.keys() != controller.sites.keys():
        raise ValueError(
            f"merging shortcut {str(controller.shortcut)!r} by {method} needs activations: call calibrate(model, "
            "batches, forward) first, or choose merge_method='paper_weight' or 'drop', which need none"
        )
    versions = controller.calibrated_at
    if any(controller.factors(name)[0]._version != version for name, version in versions.items()):
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
    """The plain LoRA of one layer, while others may be merged already: no C may depend on their merged weights."""
    if not any(controller.adapter_name in layer.merged_adapters for layer in controller.layers.values()):
        controller.corrections_while_merged = corrections_of(controller)
    return plain_factors(controller, site, controller.corrections_while_merged[site.name])


def merged_factors(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, LoraFactors]:
    """The plain LoRA that the adapter merges into, by module path: what `export_lora` writes.

    Raises:
        ValueError: the method needs `calibrate` first.
    """
    controller = get_controller(model, adapter_name)
    corrections = corrections_of(controller)
    factors = {name: plain_factors(controller, site, corrections[name]) for name, site in controller.sites.items()}
    return factors | convolution_factors(model, adapter_name)


def convolution_factors(model: nn.Module, adapter_name: str) -> dict[str, LoraFactors]:
    """Factors of adapted convolutions, which no shortcut joins; refuses embeddings, which have no such factors."""
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if adapter_name in layer.lora_embedding_A:
            raise ValueError(f"{name} is an adapted embedding, which is no LoRA of a linear layer; merge_and_unload it")
        factors: Any = layer.lora_A[adapter_name] if adapter_name in layer.lora_A else None
        if factors is not None and factors.weight.ndim > 2:
            up: Any = layer.lora_B[adapter_name]
            scaling = layer.scaling[adapter_name]
            found[name] = LoraFactors(factors.weight.detach(), up.weight.detach(), scaling)
    return found


@contextmanager
def merged_forward(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> Iterator[None]:
    """Inside, the model computes as the exported LoRA will, without touching a weight."""
    controller = get_controller(model, adapter_name)
    before, corrections = controller.merged, corrections_of(controller)
    controller.merged = {n: plain_factors(controller, site, corrections[n]) for n, site in controller.sites.items()}
    try:
        yield
    finally:
        controller.merged = before


def relative_output_errors(
    model: nn.Module, batches: Iterable[Any], forward: Forward, adapter_name: str = DEFAULT_ADAPTER
) -> dict[str, float]:
    """What merging changes in each layer's output, relative to all that the adapter adds to it.

    sqrt(sum ||s B (t - C x)||^2 / sum ||s B (A x + t)||^2) over `batches`, which calibration should not have seen. Zero
    for shortcuts that merge exactly.
    """
    controller = get_controller(model, adapter_name)
    if controller.shortcut in (Shortcut.NONE, Shortcut.BLOCK):
        return dict.fromkeys(controller.sites, 0.0)
    observer = OutputErrors(controller, corrections_of(controller))
    observe(controller, observer, model, batches, forward)
    return observer.relative()
