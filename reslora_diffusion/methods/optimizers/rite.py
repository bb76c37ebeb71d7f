"""LoRA-RITE (Yen et al., arXiv 2410.20625, Algorithm 1): adaptive steps that are equal for (R A, B R^-1).

For A, with the orthonormal basis U_B of B = U_B R_B (QR); for B likewise with A^T = U_A R_A. Gradients are written with
the rank last, G_A^T [in, r]:

    G'  = G_A^T R_B^-1                                  the gradient in the basis of B, whatever the size of B
    P   = U_B(t)^T U_B(t-1)                             the change of basis
    V   = b2' P V P^T + (1 - b2') G'^T G' / in          second moment [r, r]
    M   = b1' M P^T   + (1 - b1') G' (V + rho I)^-1/2   first moment  [in, r], of the preconditioned gradient
    A^T = A^T - lr M R_B^-T

b' = b (1 - b^(t-1)) / (1 - b^t) is the decay with its bias correction in it. While B is zero, R_B^-1 is its
pseudo-inverse, zero, and A does not move. The number of rows and the clipping are the official code's.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .algebra import symmetric, transposed
from .pairs import FactorPair, PairOptimizer, StackedPairs, add_to_factors


class Basis(NamedTuple):
    """The QR of a factor [n, rows, r]: U [n, rows, k] has orthonormal columns, R^+ is [n, r, k], k = min(rows, r)."""

    U: Tensor
    inverse: Tensor


class LoraRite(PairOptimizer):
    """LoRA-RITE. Parameters that are no factors are updated by AdamW.

    Args:
        eps: added to the root of V's eigenvalues. 1e-8, usual for Adam, makes noise of the first steps large.
        clip_unmagnified: largest norm of all G' together; a trainer's own clipping should be off. None is no limit.
        skip_unmagnified: a factor whose G' has a larger root mean square is not moved by it (official code: 1).
        escape: add to rho what a change of basis loses of V (the paper's escaped mass; off in the official code).
    """

    def __init__(
        self,
        params: Any,
        pairs: Any,
        lr: float = 1e-3,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clip_unmagnified: float | None = 1.0,
        skip_unmagnified: float | None = None,
        escape: bool = False,
        **adamw: Any,
    ) -> None:
        super().__init__(params, pairs, lr=lr, eps=eps, weight_decay=weight_decay, **adamw)
        self.clip_unmagnified, self.skip_unmagnified, self.escape = clip_unmagnified, skip_unmagnified, escape
        self._step_supports_amp_scaling = False  # G' is clipped, so gradients have to come without the loss scale

    def update(self, batches: list[StackedPairs]) -> list[FactorPair]:
        bases = [(basis_of(batch.B), basis_of(transposed(batch.A))) for batch in batches]
        unmagnified = [
            (self.skipped(transposed(batch.grad_A) @ of_B.inverse), self.skipped(batch.grad_B @ of_A.inverse))
            for batch, (of_B, of_A) in zip(batches, bases, strict=True)
        ]
        if batches and self.clip_unmagnified is not None:
            device = batches[0].A.device
            norms = [gradient.norm().to(device) for both in unmagnified for gradient in both]
            factor = (self.clip_unmagnified / torch.stack(norms).norm()).clamp_max(1.0)
            unmagnified = [tuple(g * factor.to(g.device) for g in both) for both in unmagnified]
        for batch, (of_B, of_A), (for_A, for_B) in zip(batches, bases, unmagnified, strict=True):
            self.step_batch(batch, of_B, of_A, for_A, for_B)
        return [pair for batch in batches for pair in batch.pairs]

    def skipped(self, gradient: Tensor) -> Tensor:
        if self.skip_unmagnified is None:
            return gradient
        rms = gradient.square().mean((-2, -1), keepdim=True).sqrt()
        return torch.where(rms > self.skip_unmagnified, 0, gradient)

    def step_batch(self, batch: StackedPairs, of_B: Basis, of_A: Basis, for_A: Tensor, for_B: Tensor) -> None:
        """Moments and factors of pairs of one shape."""
        group, states = batch.group, [self.state[pair.A] for pair in batch.pairs]
        for state in states:
            state.setdefault("step", torch.zeros(()))
            state["step"] += 1
        steps = batch.A.new_tensor([float(state["step"]) for state in states]).view(-1, 1, 1)
        M_A = self.moments("A", states, for_A, of_B.U, steps, group)
        M_B = self.moments("B", states, for_B, of_A.U, steps, group)
        lr, decay = group["lr"], group["weight_decay"]
        delta_A = transposed(M_A @ transposed(of_B.inverse)) + decay * batch.A
        delta_B = M_B @ transposed(of_A.inverse) + decay * batch.B
        add_to_factors(batch.pairs, -lr * delta_A, -lr * delta_B)

    def moments(
        self, factor: str, states: list[dict], gradient: Tensor, basis: Tensor, steps: Tensor, group: dict[str, Any]
    ) -> Tensor:
        """The first moment M [n, rows, k] after this gradient, all states of the factor brought up to date."""
        rows, rank = gradient.shape[-2:]
        empty = {"M": (rows, rank), "V": (rank, rank), "U": basis.shape[-2:], "rho": ()}
        for state in states:
            for name, shape in empty.items():
                state.setdefault(f"{name}_{factor}", gradient.new_zeros(shape))
        M, V, U, rho = (torch.stack([state[f"{name}_{factor}"] for state in states]) for name in empty)
        beta1, beta2 = (decay_with_correction(beta, steps) for beta in group["betas"])
        change = transposed(basis) @ U
        transported = symmetric(change @ V @ transposed(change))
        if self.escape:
            rho = beta2.view(-1) * (rho + escaped_mass(V, transported))
        V = beta2 * transported + (1 - beta2) * symmetric(transposed(gradient) @ gradient) / rows
        preconditioned = gradient @ inverse_root(V, rho, group["eps"])
        M = beta1 * (M @ transposed(change)) + (1 - beta1) * preconditioned
        for name, value in {"M": M, "V": V, "U": basis, "rho": rho}.items():
            for state, own in zip(states, value, strict=True):
                state[f"{name}_{factor}"].copy_(own)
        return M


def basis_of(factor: Tensor) -> Basis:
    """QR of a factor [n, rows, r]."""
    U, R = torch.linalg.qr(factor)
    return Basis(U, torch.linalg.pinv(R))


def decay_with_correction(beta: float, steps: Tensor) -> Tensor:
    """b (1 - b^(t-1)) / (1 - b^t) for t = 1, 2, ...: an average with this decay needs no bias correction."""
    return beta * (1 - beta ** (steps - 1)) / (1 - beta**steps)


def escaped_mass(before: Tensor, after: Tensor) -> Tensor:
    """min(max_i (l_i(before) - l_i(after)), tr(before) - tr(after)) [n], at least zero, of matrices [n, k, k]."""
    lost = (torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)).amax(-1)
    trace = (before - after).diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.minimum(lost, trace).clamp_min(0)


def inverse_root(V: Tensor, rho: Tensor, eps: float) -> Tensor:
    """(V + rho I)^(-1/2) [n, k, k], with eigenvalues 1 / (sqrt(l + rho) + eps)."""
    eigenvalues, vectors = torch.linalg.eigh(V)
    roots = (eigenvalues.clamp_min(0) + rho.unsqueeze(-1)).sqrt()
    return vectors / (roots + eps).unsqueeze(-2) @ transposed(vectors)
