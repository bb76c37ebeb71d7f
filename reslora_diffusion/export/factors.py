"""Arithmetic on plain LoRA factors, delta_weight = scaling * lora_B @ lora_A, without ever forming delta_weight.

    norm           ||B A||_F^2 = sum((B^T B) * (A A^T)), two Gram matrices of [R, R]
    weighted sum   sum_k w_k s_k B_k A_k = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...], exact, ranks add up
    truncation     B = Q_B R_B and A^T = Q_A R_A by thin QR; U S V^T = R_B R_A^T, of [R, R]; keep the largest of S
    folding        scaling moves into B, then each rank-one term is shared out evenly between A and B by a power of two:
                   an exact step in floating point, which keeps both factors away from the ends of float16's range

Of a DoRA, all of it is about the direction W + scaling * lora_B @ lora_A; its magnitude goes along unchanged.

A convolution's factors, lora_A [R, in, kh, kw] and lora_B [out, R, 1, 1], are matrices with their trailing dimensions
flattened, and get them back.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from reslora_diffusion.core.functional import LoraFactors, Magnitude, to_float64, with_magnitude

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of a module: what rounding may cost
Components = dict[str, dict[str, LoraFactors]]  # component -> module path -> factors


class Loss(NamedTuple):
    """The loss by truncating one module: ||delta' - delta|| / ||delta||, and the share of ||delta||^2 that is left."""

    relative_error: float
    energy_kept: float


def matrices(factors: LoraFactors) -> tuple[Tensor, Tensor]:
    """Float64 `(A [R, in], scaling * B [out, R])`."""
    return to_float64(factors.lora_A).flatten(1), to_float64(factors.lora_B).flatten(1) * factors.scaling


def with_matrices(like: LoraFactors, A: Tensor, B: Tensor) -> LoraFactors:
    """Inverse of `matrices`: float32, scaling 1, trailing dimensions as in `like`."""
    A = A.reshape(A.shape[0], *like.lora_A.shape[1:])
    B = B.reshape(*B.shape, *like.lora_B.shape[2:])
    return with_magnitude(LoraFactors(A.float().contiguous(), B.float().contiguous(), 1.0), like.magnitude)


def on_cpu(factors: LoraFactors) -> LoraFactors:
    """Off the device they were trained on and out of its graph; float64 is not everywhere."""
    held = LoraFactors(factors.lora_A.detach().cpu(), factors.lora_B.detach().cpu(), float(factors.scaling))
    magnitude = factors.magnitude
    return with_magnitude(held, magnitude and magnitude._replace(values=magnitude.values.detach().cpu()))


def computable(tensor: Tensor) -> Tensor:
    """Eight-bit floats as float16, which holds every one of them exactly; torch does not compute with them."""
    return tensor.half() if tensor.dtype.itemsize == 1 else tensor


def rank_of(factors: LoraFactors) -> int:
    return factors.lora_A.shape[0]


def common_rank(components: Components) -> int:
    """The one rank that holds every module of a file."""
    return max(rank_of(f) for modules in components.values() for f in modules.values())


def delta_norm(factors: LoraFactors) -> float:
    """Frobenius norm of delta_weight."""
    A, B = matrices(factors)
    if len(A) > min(A.shape[1], len(B)):  # more rank than the matrix can have: it is smaller than the Gram matrices
        return (B @ A).norm().item()
    return ((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt().item()


def relative_error(got: LoraFactors, wanted: LoraFactors) -> float:
    """||delta_got - delta_wanted|| / ||delta_wanted||; infinite if only one of them is zero or the shapes differ.

    Of DoRAs that, or the same of their magnitudes, if it is larger; infinite if only one is a DoRA.
    """
    if got.magnitude is not None or wanted.magnitude is not None:
        plain = relative_error(LoraFactors(*got), LoraFactors(*wanted))
        return max(plain, magnitude_error(got.magnitude, wanted.magnitude))
    if got.lora_A.shape[1:] != wanted.lora_A.shape[1:] or got.lora_B.shape[0] != wanted.lora_B.shape[0]:
        return float("inf")
    error, size = delta_norm(summed_factors([got, wanted], [1.0, -1.0])), delta_norm(wanted)
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return error / size


def magnitude_error(got: Magnitude | None, wanted: Magnitude | None) -> float:
    """||m_got - m_wanted|| / ||m_wanted||; infinite if they are of different kinds."""
    if got is None or wanted is None or got.values.shape != wanted.values.shape or got.of_base != wanted.of_base:
        return float("inf")
    right = to_float64(wanted.values)
    error = (to_float64(got.values) - right).norm() / right.norm()
    return error.nan_to_num(float("inf")).item()


def summed_factors(terms: Iterable[LoraFactors], weights: Iterable[float]) -> LoraFactors:
    """sum_k w_k delta_k of several LoRAs of one module, exactly, in float64; the ranks add up."""
    terms = list(terms)
    if any(term.magnitude is not None for term in terms):
        raise ValueError("DoRAs have no weighted sum; merge them into the base one after the other")
    As, Bs = zip(*(matrices(f) for f in terms), strict=True)
    A = torch.cat(As).reshape(-1, *terms[0].lora_A.shape[1:])
    B = torch.cat([w * b for w, b in zip(weights, Bs, strict=True)], dim=1)
    return LoraFactors(A, B.reshape(*B.shape, *terms[0].lora_B.shape[2:]), 1.0)


def folded(factors: LoraFactors) -> LoraFactors:
    """The same delta_weight with scaling 1, float32, and factors of like size."""
    A, B = matrices(factors)
    size_A, size_B = A.abs().amax(1), B.abs().amax(0)
    present = (size_A > 0) & (size_B > 0)
    shift = torch.where(present, (size_B / size_A).log2() / 2, 0.0).nan_to_num(0.0, 0.0, 0.0).round()
    return with_matrices(factors, A * torch.exp2(shift)[:, None], B * torch.exp2(-shift))


def padded(factors: LoraFactors, rank: int) -> LoraFactors:
    """The same delta_weight at a larger rank, by rank-one terms of zero. Call it on folded factors."""
    extra = rank - rank_of(factors)
    A = torch.cat([factors.lora_A, factors.lora_A.new_zeros(extra, *factors.lora_A.shape[1:])])
    zeros = factors.lora_B.new_zeros(factors.lora_B.shape[0], extra, *factors.lora_B.shape[2:])
    held = LoraFactors(A, torch.cat([factors.lora_B, zeros], dim=1), factors.scaling)
    return with_magnitude(held, factors.magnitude)


def singular_values(factors: LoraFactors) -> Tensor:
    """Singular values of delta_weight that can differ from zero, largest first."""
    A, B = matrices(factors)
    return torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T)


def truncated(factors: LoraFactors, rank: int) -> tuple[LoraFactors, Loss]:
    """The nearest LoRA of at most `rank`, and what it lost."""
    A, B = matrices(factors)
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    root = S[:rank].sqrt()
    kept = with_matrices(factors, root[:, None] * (Vh[:rank] @ Q_A.T), (Q_B @ U[:, :rank]) * root)
    energy, lost = S.square().sum().item(), S[rank:].square().sum().item()
    return kept, Loss((lost / energy) ** 0.5, 1 - lost / energy) if energy else Loss(0.0, 1.0)


def from_matrix(delta_weight: Tensor, rank: int) -> tuple[LoraFactors, Loss]:
    """The nearest LoRA of `rank` to a full matrix [out, in, ...]: its projection on the leading eigenvectors of D D^T.

    The eigenvectors of the smaller Gram matrix are a hundredfold cheaper than the singular value decomposition of D.
    """
    D = to_float64(delta_weight).flatten(1)
    wide = D.shape[0] <= D.shape[1]
    gram = D @ D.T if wide else D.T @ D
    values, vectors = torch.linalg.eigh(gram)
    top = vectors[:, -rank:].flip(1)
    A, B = (top.T @ D, top) if wide else (top.T, D @ top)
    trailing = (1,) * (delta_weight.ndim - 2)
    like = LoraFactors(delta_weight[:0], delta_weight.new_empty(0, 0, *trailing), 1.0)
    energy, kept = values.clamp_min(0).sum().item(), values[-rank:].clamp_min(0).sum().item()
    loss = Loss(max(0.0, 1 - kept / energy) ** 0.5, kept / energy) if energy else Loss(0.0, 1.0)
    return folded(with_matrices(like, A, B)), loss
