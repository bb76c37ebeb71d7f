"""The rank of an export: `full`, a number, or `auto`.

    full   every module exactly; the file's rank is that of its largest module ((m + 1) r for a block shortcut, unless
           the matrices are smaller)
    N      every module cut to its N largest singular values, padded where it has fewer
    auto   the smallest rank at which no module loses more than `LOSSY_ERROR`

A module's loss is ||delta' - delta||_F / ||delta||_F. Above `LOSSY_ERROR` a cut must be asked for with `allow_lossy`.
"""

from typing import TypedDict

import torch
from torch import Tensor

from reslora_diffusion.core.functional import LoraFactors

from .factors import Components, Loss, common_rank, rank_of, singular_values, truncated
from .limits import LOSSY_ERROR, CheckFailed, Rank
from .progress import progress


class RankSettings(TypedDict, total=False):
    """Settings of how exactly factors are written; every writer takes these, see `export_lora`."""

    dtype: torch.dtype
    rank: Rank
    allow_lossy: bool


Losses = dict[tuple[str, str], Loss]  # (component, module path) -> what was lost


def needed_rank(singular_values: Tensor, largest_error: float = LOSSY_ERROR) -> int:
    """Return the number of singular values, largest first, that leave a relative error of `largest_error` or less."""
    energy = singular_values.square()
    lost = energy.flip(0).cumsum(0).flip(0)  # lost[k] = energy beyond the first k
    return max(1, int((lost > largest_error**2 * lost[0]).sum()))


def smallest_rank(components: Components, largest_error: float = LOSSY_ERROR) -> int:
    """The smallest rank at which every module's relative error stays within `largest_error`."""
    every = [factors for modules in components.values() for factors in modules.values()]
    return max([1, *(needed_rank(singular_values(factors), largest_error) for factors in every)])


def at_most_its_own(factors: LoraFactors) -> LoraFactors:
    """The same delta_weight without the rank that a matrix of its shape cannot have."""
    limit = min(factors.lora_A[0].numel(), len(factors.lora_B))
    return truncated(factors, limit)[0] if rank_of(factors) > limit else factors


def at_rank(components: Components, rank: Rank, *, allow_lossy: bool = False) -> tuple[Components, int, Losses]:
    """Cut every module to the rank asked for: `(components, rank of the file, losses)`.

    Raises:
        CheckFailed: a module loses more than `LOSSY_ERROR` and `allow_lossy` is not set.
    """
    exact = {(c, path): Loss(0.0, 1.0) for c, modules in components.items() for path in modules}
    if rank == "full":
        whole = {c: {path: at_most_its_own(f) for path, f in modules.items()} for c, modules in components.items()}
        return whole, common_rank(whole), exact
    if rank == "auto":
        rank = smallest_rank(components)
    cut: Components = {component: {} for component in components}
    losses: Losses = {}
    todo = [(c, path, factors) for c, modules in components.items() for path, factors in modules.items()]
    for component, path, factors in progress(todo, f"cutting to rank {rank}"):
        cut[component][path], losses[component, path] = truncated(factors, rank)
    lossy = sorted(((loss.relative_error, name) for name, loss in losses.items()), reverse=True)
    lossy = [(error, name) for error, name in lossy if error > LOSSY_ERROR]
    if lossy and not allow_lossy:
        error, (component, path) = lossy[0]
        raise CheckFailed(
            f"rank {rank} loses more than {LOSSY_ERROR:.0%} of the delta of {len(lossy)} of {len(losses)} modules, "
            f"most ({error:.0%}) of {component}.{path}; rank {smallest_rank(components)} would not. "
            "Choose rank 'auto' or 'full', or allow the loss (--allow_lossy)."
        )
    return cut, rank, losses
