"""AdamW on gradients that are first multiplied by an r x r matrix, a function of the other factor.

With P = B^T B and Q = A A^T, both [r, r], and damping d:

    ScaledAdamW   g_A <- (P + d)^-1 g_A        g_B <- g_B (Q + d)^-1        Riemannian metric, arXiv 2402.02347, eq. 3
    RefLora       g_A <- S g_A                 g_B <- g_B S^-1              S P S = Q: arXiv 2505.18877, Theorem 4

RefLora steps as if the factors had been balanced first: with S = T T^T, the factors B T and T^-1 A have the same
product and equal Gram matrices, and a gradient step on them moves B A as the step above does.
"""

from abc import abstractmethod
from typing import Any

from torch import Tensor

from .algebra import damped_inverse, square_root, symmetric, transposed
from .pairs import FactorPair, PairOptimizer, StackedPairs, write_gradients


class PreconditionedAdamW(PairOptimizer):
    """AdamW whose gradients of pairs go through `precondition` first."""

    @abstractmethod
    def precondition(self, batch: StackedPairs) -> tuple[Tensor, Tensor]:
        """New gradients of A [n, r, in] and B [n, out, r]."""

    def update(self, batches: list[StackedPairs]) -> list[FactorPair]:
        for batch in batches:
            write_gradients(batch.pairs, *self.precondition(batch))
        return []


class ScaledAdamW(PreconditionedAdamW):
    """Riemannian preconditioning (Zhang and Pilanci, arXiv 2402.02347).

    Args:
        damping: added to the eigenvalues of P and Q. Small values let A turn early along noisy gradients while B is
            close to zero, which costs more than the method gains: docs/methods.md.
    """

    def __init__(self, params: Any, pairs: Any, lr: float = 1e-3, damping: float = 1e-2, **adamw: Any) -> None:
        super().__init__(params, pairs, lr=lr, **adamw)
        self.damping = damping

    def precondition(self, batch: StackedPairs) -> tuple[Tensor, Tensor]:
        P, Q = transposed(batch.B) @ batch.B, batch.A @ transposed(batch.A)
        return damped_inverse(P, self.damping) @ batch.grad_A, batch.grad_B @ damped_inverse(Q, self.damping)


class RefLora(PreconditionedAdamW):
    """Steps of balanced factors (Zhang, Li and Giannakis, arXiv 2505.18877), without refactoring them.

    Args:
        damping: added to the eigenvalues of P and Q, for the start, where B is zero.
    """

    def __init__(self, params: Any, pairs: Any, lr: float = 1e-3, damping: float = 1e-4, **adamw: Any) -> None:
        super().__init__(params, pairs, lr=lr, **adamw)
        self.damping = damping

    def precondition(self, batch: StackedPairs) -> tuple[Tensor, Tensor]:
        S, inverse = balancing(transposed(batch.B) @ batch.B, batch.A @ transposed(batch.A), self.damping)
        return S @ batch.grad_A, batch.grad_B @ inverse


def balancing(P: Tensor, Q: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """`(S, S^-1)` with S (P + d) S = Q + d: S = R^-1 (R (Q + d) R)^(1/2) R^-1 for R = (P + d)^(1/2)."""
    identity = damping * P.new_ones(P.shape[-1]).diag()
    P, Q = P + identity, Q + identity
    R = square_root(P)
    inverse_R = damped_inverse(R, 0)
    middle = square_root(symmetric(R @ Q @ R))
    return symmetric(inverse_R @ middle @ inverse_R), symmetric(R @ damped_inverse(middle, 0) @ R)
