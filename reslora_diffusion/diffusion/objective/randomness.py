"""Every random number of a run as a pure function of (seed, stream, index).

No generator state is carried from step to step. So two runs with equal seeds see the same images, noise and
timesteps whatever they train; a resumed run continues as if it had never stopped; and N processes, or N accumulated
micro-batches, draw together what one process draws in one batch N times as large.
"""

from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch


class Stream(IntEnum):
    """The purpose of a random number: streams are independent of each other. Their numbers never change."""

    ADAPTER = 0
    INSTANCE_ORDER = 1
    CLASS_ORDER = 2
    INSTANCE_NOISE = 3
    CLASS_NOISE = 4
    DROPOUT = 5
    CROP = 6
    CLASS_IMAGE = 7
    CALIBRATION = 8
    VALIDATION = 9
    TOKENS = 10


def seed_of(seed: int, stream: Stream, index: int = 0) -> int:
    """A 63-bit seed, well mixed."""
    return int(np.random.SeedSequence([seed, stream, index]).generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int, stream: Stream, index: int = 0) -> torch.Generator:
    """A generator on the CPU, as the numbers must not depend on the device that trains."""
    return torch.Generator().manual_seed(seed_of(seed, stream, index))


@lru_cache(maxsize=8)
def permutation(seed: int, stream: Stream, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, stream, epoch)).tolist()


def shuffled(seed: int, stream: Stream, index: int, count: int) -> int:
    """Element `index` of an endless sequence of shuffled passes over `range(count)`."""
    epoch, position = divmod(index, count)
    return permutation(seed, stream, epoch, count)[position]
