"""Arithmetic as a curve: seconds per weight element against the tokens that are multiplied with it at once."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from headrace.dtypes import DTYPES, STORED_BYTES
from headrace.errors import MachineError
from headrace.machine.quantity import Quantity

_BLOCK_OVERHEAD = Quantity.of(0.0003, "assumed")
_PASS_OVERHEAD = Quantity.of(0.002, "assumed")
_NO_SLOWDOWN = Quantity.of(1.0, "assumed")


class CurvePoint(NamedTuple):
    """Seconds that one weight element of a matrix product takes when `tokens` tokens are multiplied with it at once."""

    tokens: int
    seconds_per_parameter: float


@dataclass(frozen=True, kw_only=True)
class ComputeCurve:
    """Arithmetic as a curve over tokens per pass, for one dtype of the product and one dtype of the stored weights."""

    compute_dtype: str
    stored_dtype: str
    points: tuple[CurvePoint, ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise MachineError("a compute curve needs at least one point")
        tokens = [point.tokens for point in self.points]
        if tokens != sorted(set(tokens)) or tokens[0] < 1:
            raise MachineError("the points of a compute curve must be in order of tokens, none twice, from 1 on")
        if any(not 0 < point.seconds_per_parameter < math.inf for point in self.points):
            raise MachineError("a compute curve holds a time that is not positive")

    def seconds_per_parameter(self, tokens: float) -> float:
        """Interpolate in log-log; proportional to `tokens` beyond the last point, constant before the first."""
        points = self.points
        if tokens <= points[0].tokens:
            return points[0].seconds_per_parameter
        if tokens >= points[-1].tokens:
            return points[-1].seconds_per_parameter * (tokens / points[-1].tokens)
        upper = bisect.bisect_right([point.tokens for point in points], tokens)
        low, high = points[upper - 1], points[upper]
        share = math.log(tokens / low.tokens) / math.log(high.tokens / low.tokens)
        ratio = high.seconds_per_parameter / low.seconds_per_parameter
        return low.seconds_per_parameter * math.pow(ratio, share)

    def scaled(self, factor: float) -> ComputeCurve:
        """The same curve with every time multiplied by `factor`."""
        return replace(self, points=tuple(CurvePoint(tokens, seconds * factor) for tokens, seconds in self.points))

    def later(self, seconds: float, *, stored_dtype: str) -> ComputeCurve:
        """The curve of weights stored otherwise, which take `seconds` more each at any number of tokens."""
        points = tuple(CurvePoint(tokens, own + seconds) for tokens, own in self.points)
        return replace(self, stored_dtype=stored_dtype, points=points)

    def through(self, measured: Sequence[CurvePoint]) -> ComputeCurve:
        """The same curve bent so that it passes through these points.

        What it was wrong by at a measured point is what it is taken to be wrong by beyond it, and between two of them
        what lies (log-log) between.
        """
        if not measured:
            return self
        errors = replace(
            self, points=tuple(CurvePoint(at, seconds / self.seconds_per_parameter(at)) for at, seconds in measured)
        )
        last = measured[-1].tokens
        bent = {at: seconds * errors.seconds_per_parameter(min(at, last)) for at, seconds in self.points}
        points = (bent | dict(measured)).items()
        return replace(self, points=tuple(itertools.starmap(CurvePoint, sorted(points))))

    @property
    def flops(self) -> float:
        """Operations per second with the most tokens that were measured: two for each weight and token."""
        last = self.points[-1]
        return 2.0 * last.tokens / last.seconds_per_parameter

    @property
    def weight_bytes_per_s(self) -> float:
        """Bytes of weights per second with the fewest tokens, as stored: what memory gives where it is the limit."""
        return STORED_BYTES.get(self.stored_dtype, 2) / self.points[0].seconds_per_parameter


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What was measured of a processor: its products as curves, what comes on top, and how reading interferes."""

    curves: tuple[ComputeCurve, ...] = ()
    block_overhead_s: Quantity = _BLOCK_OVERHEAD
    """fixed time per block and pass: norms, activation functions, the interpreter, launches"""
    pass_overhead_s: Quantity = _PASS_OVERHEAD
    """time per pass outside the blocks: sampling, masks, embedding"""
    slowdown_while_reading: Quantity = _NO_SLOWDOWN
    """how many times longer computing takes while the disk is being read"""
    slowdown_of_reading: Quantity = _NO_SLOWDOWN
    """how many times longer reading takes while this computes"""
    source: str = "the machine file"
    """of the curves"""

    def __post_init__(self) -> None:
        for name in ("slowdown_while_reading", "slowdown_of_reading"):
            slowdown: Quantity = getattr(self, name)
            if not 1 <= slowdown.low <= slowdown.high < 100:
                raise MachineError(f"{name} is {slowdown.expected}; it must be at least 1 and below 100")

    def curve(self, *, compute_dtype: str, stored_dtype: str, measured_on: str) -> ComputeCurve:
        """The curve for this pair of dtypes; raises MachineError where `measured_on` was not measured with it."""
        for own in self.curves:
            if (own.compute_dtype, own.stored_dtype) == (compute_dtype, stored_dtype):
                return own
        raise MachineError(
            f"{measured_on} has no measurement of {compute_dtype} products with {stored_dtype} weights; "
            "run `headrace probe` again"
        )

    def fastest(self, *compute_dtypes: str) -> ComputeCurve | None:
        """The curve with most operations per second, of all or of those that compute in one of these dtypes."""
        known = (own for own in self.curves if not compute_dtypes or own.compute_dtype in compute_dtypes)
        return max(known, key=lambda curve: curve.flops, default=None)

    def peaks(self) -> dict[str, Quantity]:
        """Operations per second by format, as the curves reach them; `bf16`: in whichever 16-bit dtype is faster."""
        found = {
            dtype.short_name: self.fastest(*(own.name for own in DTYPES.values() if own.size_bytes == dtype.size_bytes))
            for dtype in (DTYPES["bfloat16"], DTYPES["float32"])
        }
        return {
            name: Quantity.about(curve.flops, f"{self.source}, in {curve.compute_dtype}", share=0.1)
            for name, curve in found.items()
            if curve is not None
        }


UNMEASURED = Arithmetic()
