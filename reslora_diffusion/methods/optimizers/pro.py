"""LoRA-Pro (Wang et al., arXiv 2407.18242): gradients of the factors that move B A along the gradient g of the matrix.

g_A = s B^T g and g_B = s g A^T are at hand, g itself is never formed. The motion s B h_A + s h_B A is closest to g in
the Frobenius norm for

    h_A = (1/s^2) P^-1 g_A + X A                        P = B^T B  [r, r]
    h_B = (1/s^2) (I - B P^-1 B^T) g_B Q^-1 - B X       Q = A A^T  [r, r]

and any X [r, r], which cancels in the motion. X is chosen so that |h_A - g_A|^2 + |h_B - g_B|^2 is least (Theorem 2.3),
the Sylvester equation P X + X Q = -(1/s^2) P^-1 g_A A^T. While B is zero, h_A = 0 and h_B = (1/s^2) g_B Q^-1.

The light form, the default, gives h_A and h_B to AdamW. The paper's form (`full=True`, Algorithm 1) keeps the moments
of the motion itself, two matrices [out, in] a layer, as much as full fine-tuning does.
"""

from typing import Any

import torch
from torch import Tensor

from .algebra import damped_inverse, sylvester, transposed
from .pairs import FactorPair, PairOptimizer, StackedPairs, add_to_factors, write_gradients


class LoraPro(PairOptimizer):
    """LoRA-Pro over AdamW.

    Args:
        damping: added to the eigenvalues of P and Q before they are inverted.
        full: keep the moments of the whole matrix, as the paper does.
    """

    def __init__(
        self, params: Any, pairs: Any, lr: float = 1e-4, damping: float = 1e-8, full: bool = False, **adamw: Any
    ) -> None:
        super().__init__(params, pairs, lr=lr, **adamw)
        self.damping, self.full = damping, full

    def update(self, batches: list[StackedPairs]) -> list[FactorPair]:
        for batch in batches:
            if self.full:
                self.step_full(batch)
            else:
                factors = batch.A, batch.B, batch.grad_A, batch.grad_B, batch.scaling
                write_gradients(batch.pairs, *adjusted(*factors, self.damping))
        return [pair for batch in batches for pair in batch.pairs] if self.full else []

    def step_full(self, batch: StackedPairs) -> None:
        """Algorithm 1: the motion, Adam's moments of it, and the factors' motion closest to Adam's step."""
        A, B, s, group = batch.A, batch.B, batch.scaling, batch.group
        h_A, h_B = adjusted(A, B, batch.grad_A, batch.grad_B, s, self.damping, minimal=False)
        motion = s * (B @ h_A + h_B @ A)
        step = torch.stack([self.adam(pair, m, group) for pair, m in zip(batch.pairs, motion, strict=True)])
        h_A, h_B = adjusted(A, B, s * transposed(B) @ step, s * step @ transposed(A), s, self.damping)
        kept = (1 - group["lr"] * group["weight_decay"]) ** 0.5  # on each factor, so that B A decays as AdamW has it
        delta_A, delta_B = (kept - 1) * A - group["lr"] * h_A, (kept - 1) * B - group["lr"] * h_B
        add_to_factors(batch.pairs, delta_A, delta_B)

    def adam(self, pair: FactorPair, motion: Tensor, group: dict[str, Any]) -> Tensor:
        """Adam's step [out, in] for one pair, without the learning rate."""
        state = self.state[pair.A]
        if not state:
            state["step"] = torch.zeros(())
            state["motion"], state["motion_sq"] = torch.zeros_like(motion), torch.zeros_like(motion)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["motion"].lerp_(motion, 1 - beta1)
        state["motion_sq"].mul_(beta2).addcmul_(motion, motion, value=1 - beta2)
        corrections = 1 - beta1 ** float(state["step"]), 1 - beta2 ** float(state["step"])
        return state["motion"] / corrections[0] / ((state["motion_sq"] / corrections[1]).sqrt() + group["eps"])


def adjusted(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: Tensor, damping: float, minimal: bool = True
) -> tuple[Tensor, Tensor]:
    """`(h_A, h_B)` of the module's equations for A [n, r, in], B [n, out, r]; X is zero unless `minimal`."""
    P, Q = transposed(B) @ B, A @ transposed(A)
    inverse_P, inverse_Q = damped_inverse(P, damping), damped_inverse(Q, damping)
    inverse_square = 1 / scaling**2
    solved_A = inverse_square * inverse_P @ grad_A
    rest = grad_B - B @ (inverse_P @ (transposed(B) @ grad_B))
    h_B = inverse_square * rest @ inverse_Q
    if not minimal:
        return solved_A, h_B
    X = sylvester(P, Q, -solved_A @ transposed(A))
    return solved_A + X @ A, h_B - B @ X
