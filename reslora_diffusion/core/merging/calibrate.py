"""Running batches through an adapted model: to find what its merge needs, and to see what the merge loses.

    calibrate                 batches -> statistics (`.statistics`) -> C of every layer (`.corrections`)
    relative_output_errors    batches -> sqrt(sum ||s B (t - C x)||^2 / sum ||s B (A x + t)||^2) of every layer

The model runs in evaluation mode and without gradients, on batches like those it was trained on. Where they are padded,
`mask` says which tokens are real, as `lambda batch: batch["attention_mask"]`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...rules import DEFAULT_ADAPTER, MergeMethod
from ..adapter import Adapter, Forward
from ..attach import get_adapter
from ..sharding import is_distributed
from .corrections import corrections_of, least_squares, paper_input
from .statistics import Moments, Norms, OutputErrors, Sums

RESUME_EVERY = 16  # batches between two writes of a resume file
Mask = Callable[[Any], Tensor | None]
STATISTICS_BYTES = 4 * 1024**3  # of second moments held at once; more layers take more passes over the batches


def call(model: nn.Module, batch: Any) -> Any:
    """`model(**batch)`: what runs a model on a batch if nothing else is given.

    Raises:
        TypeError: the batch does not have names.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"got a batch of type {type(batch).__name__}, wanted a dict for model(**batch), or `forward`")
    return model(**batch)


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
    adapter: Adapter,
    observer: Sums,
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    mask: Mask | None = None,
    resume_file: Path | None = None,
) -> int:
    """Run batches while `observer` sees what flows through the shortcuts; returns how many there were.

    With `resume_file`, sums are saved there as they grow, and batches that are in it already are not run again.
    """
    adapter.require_active()
    done = observer.load(resume_file, adapter.lora_A(next(iter(adapter.layers))).device) if resume_file else 0
    count = 0
    adapter.observer = observer
    gates, adapter.gates = adapter.gates, {}  # what is merged is every block
    try:
        with evaluating(model):
            for batch in batches:
                count += 1
                if count <= done:
                    continue
                observer.start_batch(mask(batch) if mask else None)
                forward(model, batch)
                if resume_file and count % RESUME_EVERY == 0:
                    observer.save(resume_file, count)
            observer.start_batch()  # the last batch is over
    finally:
        adapter.observer, adapter.gates = None, gates
    if resume_file and count > done:
        observer.save(resume_file, count)
    observer.all_reduce()
    return count


def passes(adapter: Adapter, limit: int) -> list[list[str]]:
    """Layers in groups whose second moments fit in `limit` bytes; in one order everywhere, as factors are gathered."""
    groups: list[list[str]] = [[]]
    used = 0
    for site in sorted(adapter.sites.values(), key=lambda site: site.in_features):
        size = 4 * site.in_features**2
        if used + size > limit and groups[-1]:
            groups.append([])
            used = 0
        groups[-1].append(site.name)
        used += size
    return groups


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward = call,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    mask: Mask | None = None,
    statistics_bytes: int = STATISTICS_BYTES,
    resume_file: str | os.PathLike | None = None,
) -> None:
    """Find C for every layer of `model`, from batches like those it was trained on; C replaces an earlier one.

    Does nothing for shortcuts and methods that need no data. The model is run in evaluation mode, without gradients.

    Args:
        batches: what `forward` takes. Read once if the statistics fit in `statistics_bytes`, else once per group of
            layers, and must then be a sequence.
        forward: runs the model on a batch, as in training; what it returns is not used. `model(**batch)` if not given.
        mask: which tokens [batch, length] of a batch count; all if not given.
        statistics_bytes: bound on the memory of second moments.
        resume_file: where sums are kept, one file for each process and group of layers, so that a calibration that was
            cut off, or is given more batches, goes on. It belongs to one adapter as it is: remove it when that changes.

    Raises:
        ValueError: the adapter is not active, there are no batches, or they can be read only once where that is not
            enough.
    """
    adapter = get_adapter(model, adapter_name)
    by_data = (MergeMethod.LEAST_SQUARES, MergeMethod.PAPER_INPUT)
    if adapter.merges_exactly or adapter.config.merge_method not in by_data:
        return
    by_norms = adapter.config.merge_method == MergeMethod.PAPER_INPUT
    groups = [list(adapter.sites)] if by_norms else passes(adapter, statistics_bytes)
    if len(groups) > 1 and not isinstance(batches, Sequence):
        raise ValueError(
            f"the statistics take {len(groups)} passes over the batches (statistics_bytes={statistics_bytes}); got "
            f"{type(batches).__name__}, which can be read once; wanted a list"
        )
    corrections: dict[str, Tensor] = {}
    for number, group in enumerate(groups):
        file = numbered(resume_file, number) if resume_file else None
        observer: Sums = Norms(adapter) if by_norms else Moments(adapter, set(group))
        if observe(adapter, observer, model, batches, forward, mask, file) == 0:
            raise ValueError("calibrate: got no batches")
        solve: Any = paper_input if by_norms else least_squares
        found = {name: solve(adapter, adapter.sites[name], observer) for name in group}
        corrections |= {name: correction.to(adapter.lora_A(name)) for name, correction in found.items()}
    adapter.calibration = corrections
    adapter.calibrated_A = {name: adapter.lora_A(name).detach().to("cpu", copy=True) for name in corrections}


def numbered(file: str | os.PathLike, group: int) -> Path:
    """`sums.safetensors` -> `sums-<process>-<group>.safetensors`."""
    path = Path(file)
    process = torch.distributed.get_rank() if is_distributed() else 0
    return path.with_name(f"{path.stem}-{process}-{group}.safetensors")


def relative_output_errors(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward = call,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    mask: Mask | None = None,
) -> dict[str, float]:
    """Error that merging makes in each layer's output, relative to all that the adapter adds to it.

    sqrt(sum ||s B (t - C x)||^2 / sum ||s B (A x + t)||^2) over `batches` that calibration has not used. Zero for
    shortcuts that merge exactly.
    """
    adapter = get_adapter(model, adapter_name)
    if adapter.merges_exactly:
        return dict.fromkeys(adapter.sites, 0.0)
    observer = OutputErrors(adapter, corrections_of(adapter))
    observe(adapter, observer, model, batches, forward, mask)
    return dict.fromkeys(adapter.sites, 0.0) | observer.relative()
