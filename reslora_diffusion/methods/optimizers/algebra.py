"""Functions of symmetric positive semi-definite r x r matrices, batched over leading dimensions."""

import torch
from torch import Tensor


def transposed(matrix: Tensor) -> Tensor:
    return matrix.transpose(-1, -2)


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part of a matrix that is symmetric but for rounding."""
    return (matrix + transposed(matrix)) / 2


def damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    """(M + damping I)^+ of M [..., r, r]: directions whose eigenvalue is only rounding are left out."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    eigenvalues = eigenvalues.clamp_min(0) + damping
    smallest = eigenvalues.amax(-1, keepdim=True) * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    inverse = torch.where(eigenvalues > smallest, 1 / eigenvalues, 0)
    return vectors * inverse.unsqueeze(-2) @ transposed(vectors)


def square_root(matrix: Tensor) -> Tensor:
    """M^(1/2) of M [..., r, r]."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return vectors * eigenvalues.clamp_min(0).sqrt().unsqueeze(-2) @ transposed(vectors)


def sylvester(P: Tensor, Q: Tensor, F: Tensor) -> Tensor:
    """X of P X + X Q = F for symmetric P, Q: X = U [(U^T F V)_ij / (p_i + q_j)] V^T; zero where p_i + q_j is."""
    p, U = torch.linalg.eigh(P)
    q, V = torch.linalg.eigh(Q)
    denominator = p.unsqueeze(-1) + q.unsqueeze(-2)
    rotated = transposed(U) @ F @ V
    smallest = denominator.abs().amax((-2, -1), keepdim=True) * P.shape[-1] * torch.finfo(P.dtype).eps
    return U @ torch.where(denominator > smallest, rotated / denominator, 0) @ transposed(V)
