"""Random weights at the speed of the disk: one buffer of bfloat16 values, of which every tensor is another stretch.

Drawing 16 GB of random numbers takes minutes. Here 64 MiB are drawn once, and a tensor is written as that buffer read
round and round from a place of its own. The buffer's length is a prime number of elements, so that no two tensors
begin alike and no two rows of a matrix are the same; no page is all zeros, and none repeats at a distance that a disk
would find.
"""

from __future__ import annotations

from functools import lru_cache
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

MATRIX_ELEMENTS = 33_554_393
"""of the buffer that matrices are written from: the largest prime below 2^25, so 64 MiB"""
NORM_ELEMENTS = 65_537
STRIDE = 12_582_917
"""between the beginnings of one tensor and the next, in elements; shares no factor with either length"""


class TiledWeights:
    """N(0, 0.02) for matrices, 1 + N(0, 0.02) for norms, as bfloat16."""

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self._matrix = as_bfloat16(generator.standard_normal(MATRIX_ELEMENTS, dtype=np.float32) * np.float32(0.02))
        norm = generator.standard_normal(NORM_ELEMENTS, dtype=np.float32) * np.float32(0.02) + np.float32(1.0)
        self._norm = as_bfloat16(norm)

    def write(self, file: BinaryIO, dimensions: tuple[int, ...], number: int) -> None:
        """Append tensor `number` of the checkpoint; numbers below NORM_ELEMENTS give different tensors."""
        values = self._norm if len(dimensions) == 1 else self._matrix
        left, start = int(np.prod(dimensions)), number * STRIDE % len(values)
        while left:
            part = values[start : start + left]
            file.write(part.data)
            left, start = left - len(part), 0


@lru_cache(maxsize=1)
def tiled_weights(seed: int) -> TiledWeights:
    """The buffers of a seed, kept for the next checkpoint."""
    return TiledWeights(seed)


def as_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of float32 values rounded to bfloat16, to the nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
