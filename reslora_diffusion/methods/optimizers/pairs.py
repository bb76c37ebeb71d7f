"""The pairs of factors that optimizers of the family update, and the optimizer that groups them.

A pair is one LoRA, dW = s B A with A [r, in], B [out, r]. It is found by name, never by the order of parameters, which
groups, frozen factors and heads change. Factors of convolutions are flattened: A [r, in kh kw], B [out, r].

Pairs of equal shape are stacked, so that a step takes a few batched operations per shape and not a dozen per layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ...rules import DEFAULT_ADAPTER
from ..pair_optimizers import CONFLICTS

WORKING_DTYPES = (torch.float32, torch.float64)


class FactorPair(NamedTuple):
    """`lora_A` [r, ...] and `lora_B` [out, r, ...] of one layer, its scaling, and what else acts on them."""

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    features: frozenset[str] = frozenset()  # "dora", "middle", ...: names that `conflicts` of an optimizer may hold


def factor_pairs(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> list[FactorPair]:
    """The trainable pairs of one adapter, in the order of `model.named_modules()`.

    Raises:
        ValueError: the model has no trainable pair of that adapter.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    shortcut = str(getattr(config, "effective_shortcut", getattr(config, "shortcut", "none")))
    pairs = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        factors = trained_factors(layer, adapter_name)
        if factors is None or not all(factor.requires_grad for factor in factors):
            continue
        dora = {"dora"} if adapter_name in layer.lora_magnitude_vector else set()
        features = frozenset(dora | {shortcut.rpartition(".")[2].lower()} - {"none"})
        pairs.append(FactorPair(name, *factors, layer.scaling[adapter_name], features))
    if not pairs:
        raise ValueError(f"the model has no trainable pair of LoRA factors named {adapter_name!r}")
    return pairs


def trained_factors(layer: LoraLayer, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter] | None:
    """`(A, B)` of a linear layer or a convolution, or of an embedding; None where the layer lacks the adapter."""
    if adapter_name in layer.lora_A:
        pair = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        return cast(tuple[nn.Parameter, nn.Parameter], pair)  # those of nn.Linear and of convolutions
    if adapter_name in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    return None


class StackedPairs(NamedTuple):
    """n pairs of one shape in one group: A [n, r, in], B [n, out, r], their gradients, scaling [n, 1, 1]."""

    pairs: list[FactorPair]
    group: dict[str, Any]
    A: Tensor
    B: Tensor
    grad_A: Tensor
    grad_B: Tensor
    scaling: Tensor


class PairOptimizer(torch.optim.AdamW, ABC):
    """AdamW that treats pairs of LoRA factors in its own way; see the subclasses.

    Args:
        params: parameters or groups, as any torch optimizer takes them. Both factors of a pair stand in one group.
        pairs: from `factor_pairs(model)`.

    Raises:
        ValueError: with all problems, if a pair is not among the parameters, is split over groups, has another
            precision than float32 or float64, is sharded, or has a feature that the optimizer conflicts with.
    """

    conflicts: ClassVar[Mapping[str, str]] = CONFLICTS  # feature -> the reason why the two do not go together

    def __init__(self, params: Any, pairs: Iterable[FactorPair], **adamw: Any) -> None:
        super().__init__(params, **adamw)
        self.pairs = list(pairs)
        groups = {id(p): number for number, group in enumerate(self.param_groups) for p in group["params"]}
        problems = [problem for pair in self.pairs for problem in self.problems_of(pair, groups)]
        if problems:
            more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
            raise ValueError(f"{type(self).__name__}: {'; '.join(problems[:8])}{more}")

    def problems_of(self, pair: FactorPair, groups: Mapping[int, int]) -> Iterator[str]:
        in_A, in_B = groups.get(id(pair.A)), groups.get(id(pair.B))
        if in_A is None or in_B is None:
            yield f"{pair.name}: its factors are not among the parameters"
        elif in_A != in_B:
            yield f"{pair.name}: lora_A and lora_B are in different groups, as LoRA+ has them; wanted one group"
        for factor in (pair.A, pair.B):
            if factor.dtype not in WORKING_DTYPES:
                yield f"{pair.name}: got factors in {factor.dtype}, wanted float32 (QR and eigh have no 16-bit form)"
                break
        if any(hasattr(factor, "placements") for factor in (pair.A, pair.B)):
            yield f"{pair.name}: its factors are sharded, and products of whole factors are needed"
        for feature in sorted(pair.features & set(self.conflicts)):
            yield f"{pair.name}: {self.conflicts[feature]}"

    def batches(self) -> list[StackedPairs]:
        """Pairs that have gradients now. A pair without any, such as one that a schedule dropped, is left alone.

        Raises:
            RuntimeError: a pair is of factors that others have taken the place of, as after `handover` of `block`.
        """
        groups = {id(p): number for number, group in enumerate(self.param_groups) for p in group["params"]}
        if gone := [pair.name for pair in self.pairs if not {id(pair.A), id(pair.B)} <= groups.keys()]:
            raise RuntimeError(
                f"{type(self).__name__}: {len(gone)} pairs, such as {gone[0]}, are of factors that are trained no "
                "more; wanted optimizer.pairs = factor_pairs(model) where factors were replaced"
            )
        alike: dict[tuple, list[FactorPair]] = {}
        for pair in self.pairs:
            if pair.A.grad is not None or pair.B.grad is not None:
                key = (groups[id(pair.A)], pair.A.shape, pair.B.shape, pair.A.dtype, pair.A.device)
                alike.setdefault(key, []).append(pair)
        return [batch(pairs, self.param_groups[key[0]]) for key, pairs in alike.items()]

    @abstractmethod
    def update(self, batches: list[StackedPairs]) -> list[FactorPair]:
        """Change gradients or factors; return the pairs that are updated, and that AdamW shall leave alone."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with without_gradients(self.update(self.batches())):
            super().step()
        return loss


def batch(pairs: list[FactorPair], group: dict[str, Any]) -> StackedPairs:
    def stack(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([tensor.detach().flatten(1) for tensor in tensors])

    def gradient(factor: nn.Parameter) -> Tensor:
        return torch.zeros_like(factor) if factor.grad is None else factor.grad

    A, B = stack(pair.A for pair in pairs), stack(pair.B for pair in pairs)
    grad_A, grad_B = stack(gradient(pair.A) for pair in pairs), stack(gradient(pair.B) for pair in pairs)
    scaling = A.new_tensor([pair.scaling for pair in pairs]).view(-1, 1, 1)
    return StackedPairs(pairs, group, A, B, grad_A, grad_B, scaling)


def write_gradients(pairs: list[FactorPair], grad_A: Tensor, grad_B: Tensor) -> None:
    """Put `grad_A` [n, r, in] and `grad_B` [n, out, r] in the place of the pairs' gradients."""
    for pair, for_A, for_B in zip(pairs, grad_A, grad_B, strict=True):
        pair.A.grad, pair.B.grad = for_A.reshape(pair.A.shape), for_B.reshape(pair.B.shape)


def add_to_factors(pairs: list[FactorPair], delta_A: Tensor, delta_B: Tensor) -> None:
    """Add `delta_A` [n, r, in] and `delta_B` [n, out, r] to the pairs' factors."""
    for pair, for_A, for_B in zip(pairs, delta_A, delta_B, strict=True):
        pair.A.add_(for_A.reshape(pair.A.shape))
        pair.B.add_(for_B.reshape(pair.B.shape))


@contextmanager
def without_gradients(pairs: list[FactorPair]) -> Iterator[None]:
    """Hide the gradients of pairs from the optimizer that is called inside."""
    hidden = [(factor, factor.grad) for pair in pairs for factor in (pair.A, pair.B)]
    for factor, _ in hidden:
        factor.grad = None
    try:
        yield
    finally:
        for factor, grad in hidden:
            factor.grad = grad
