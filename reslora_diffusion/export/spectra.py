"""Tensors of a safetensors file and their singular values, by numpy alone.

With G_A = A A^T and G_B = B^T B, of [r, r], the squared singular values of B A are the eigenvalues of
G_B^(1/2) G_A G_B^(1/2). Their sum is the squared norm, and they tell how few of them would do.
"""

import json
from functools import cache

import numpy as np

from .header import Header, open_safetensors
from .limits import LOSSY_ERROR

LARGEST_SIZE = 1e75  # of a product of numbers whose fourth power is computed


class Arrays:
    """Tensors of a safetensors file as float64 arrays, by name."""

    def __init__(self, header: Header):
        self.dtypes = header.dtypes
        self.path = header.path

    def __enter__(self) -> "Arrays":
        self.file = open_safetensors(self.path, framework="np").__enter__()
        with self.path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            self.entries = json.loads(raw.read(length))
        self.start = 8 + length
        return self

    def __exit__(self, *error: object) -> None:
        self.file.__exit__(*error)

    def alike(self, *names: str) -> bool:
        """Whether tensors are stored alike; NaN is like NaN."""

        def stored(name: str) -> tuple[object, ...]:
            entry = self.entries[name]
            begin, end = entry["data_offsets"]
            bits = np.fromfile(self.path, np.uint8, end - begin, offset=self.start + begin)
            return entry["dtype"], tuple(entry["shape"]), bits.tobytes()

        return len({stored(name) for name in names}) == 1

    def __call__(self, name: str) -> np.ndarray:
        if self.dtypes[name] in ("F16", "F32", "F64"):
            return self.file.get_tensor(name).astype(np.float64)
        if self.dtypes[name] == "BF16":  # numpy has no such type: the upper half of a float32
            begin, end = self.entries[name]["data_offsets"]
            halves = np.fromfile(self.path, np.uint16, (end - begin) // 2, offset=self.start + begin)
            whole = (halves.astype(np.uint32) << 16).view(np.float32)
            return whole.reshape(self.entries[name]["shape"]).astype(np.float64)
        begin, end = self.entries[name]["data_offsets"]
        codes = np.fromfile(self.path, np.uint8, end - begin, offset=self.start + begin)
        return eight_bit_values(self.dtypes[name])[codes].reshape(self.entries[name]["shape"])


@cache
def eight_bit_values(dtype: str) -> np.ndarray:
    """The 256 values of an eight-bit float: F8_E5M2 is the upper half of a float16, F8_E4M3 has no infinity."""
    codes = np.arange(256)
    if dtype == "F8_E5M2":
        return (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
    exponent, fraction = (codes >> 3) & 15, codes & 7
    sizes = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10))
    sizes[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, sizes, -sizes)


def energy_spectrum(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Squared singular values of B A, largest first; infinite where they are too large for float64."""
    size = float(np.abs(A).max(initial=0)) * float(np.abs(B).max(initial=0))
    if not 0 < size < LARGEST_SIZE:
        return np.full(min(len(A), A.shape[1], len(B)), size and np.inf)
    if len(A) > min(A.shape[1], len(B)):  # more rank than the matrix can have: it is the smaller of the two
        D = B @ A if A.shape[1] >= len(B) else (B @ A).T
        return np.linalg.eigvalsh(D @ D.T)[::-1].clip(min=0)
    values, vectors = np.linalg.eigh(B.T @ B)
    half = vectors * np.sqrt(values.clip(min=0))
    return np.linalg.eigvalsh(half.T @ (A @ A.T) @ half)[::-1].clip(min=0)


def needed(energies: np.ndarray) -> int:
    """How many of them leave at most `LOSSY_ERROR` behind."""
    beyond = energies[::-1].cumsum()[::-1]  # beyond[k] = what a cut to rank k loses
    return max(1, int((beyond > LOSSY_ERROR**2 * beyond[0]).sum()))
