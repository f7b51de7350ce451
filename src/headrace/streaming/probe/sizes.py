"""How much is moved and multiplied to measure an accelerator, and the memory that this takes there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from headrace.errors import BudgetError
from headrace.model.layout import PAGE_BYTES, align_device, align_down
from headrace.units import format_bytes

WIDEST_BYTES = 4
"""of an element of the dtypes that are measured"""
_NARROWEST = 128
_SHARE_OF_FREE = 0.5


@dataclass(frozen=True, kw_only=True)
class ProbeSizes:
    """Sizes and numbers of what is timed; the defaults take some seconds on a GPU."""

    size_bytes: int = 256 << 20
    """of a copy; a multiple of the page size"""
    shape: tuple[int, int] = (14336, 4096)
    """of a weight matrix (out, in)"""
    tokens: tuple[int, ...] = tuple(2**power for power in range(15))
    """multiplied with it at once, ascending"""
    rotated_bytes: int = 256 << 20
    """the weight matrices that are used in turn are this much at least, which no cache holds"""
    repetitions: int = 5
    """of which the median counts"""
    batch_s: float = 0.01
    """products are timed so long together, without a gap between them"""
    launches: int = 500
    """of small kernels in one go: fewer than a driver lets wait (1,024), or the host would be held up"""
    warm_up_s: float = 0.3
    """of products at first, so that the clocks are up"""

    def matrices(self, element_bytes: int) -> int:
        """The number of weight matrices of this dtype that are used in turn."""
        return max(2, math.ceil(self.rotated_bytes / (self.shape[0] * self.shape[1] * element_bytes)))

    def products_bytes(self, element_bytes: int) -> int:
        """Weights, and what the most tokens need before and after: each tensor at an aligned place."""
        out_features, in_features = self.shape
        elements = [out_features * in_features] * self.matrices(element_bytes)
        elements += [self.tokens[-1] * in_features, self.tokens[-1] * out_features]
        return sum(align_device(count * element_bytes) for count in elements)

    @property
    def device_bytes(self) -> int:
        """Memory of the device that is taken at once: a copy's target, and another one's or the products'."""
        products_bytes = max(self.products_bytes(element_bytes) for element_bytes in (2, WIDEST_BYTES))
        return align_device(self.size_bytes) + max(align_device(self.size_bytes), products_bytes)

    def within(self, free_bytes: int) -> ProbeSizes:
        """These sizes, or halves of them until they take no more than half of what is free.

        Raises BudgetError where so little is free that nothing could be learned.
        """
        sizes = self
        while sizes.device_bytes > free_bytes * _SHARE_OF_FREE:
            out_features, in_features = (extent // 2 for extent in sizes.shape)
            if min(out_features, in_features) < _NARROWEST:
                required_bytes = math.ceil(sizes.device_bytes / _SHARE_OF_FREE)
                raise BudgetError(
                    f"{format_bytes(free_bytes)} of the device's memory are free; measuring it needs "
                    f"{format_bytes(required_bytes)} (other processes may hold the rest), or take --device cpu",
                    required_bytes=required_bytes,
                )
            sizes = replace(
                sizes,
                size_bytes=max(PAGE_BYTES, align_down(sizes.size_bytes // 2)),
                shape=(out_features, in_features),
                rotated_bytes=sizes.rotated_bytes // 2,
            )
        return sizes
