"""Arithmetic as a curve: seconds per weight element against the tokens that are multiplied with it at once."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from headrace.errors import MachineError
from headrace.machine.toml_table import TomlTable, is_number

STORED_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""of one weight element, by the name that checkpoints give its dtype"""


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
        points = tuple(CurvePoint(p.tokens, p.seconds_per_parameter * factor) for p in self.points)
        return ComputeCurve(compute_dtype=self.compute_dtype, stored_dtype=self.stored_dtype, points=points)

    def through(self, measured: Sequence[CurvePoint]) -> ComputeCurve:
        """The same curve bent so that it passes through these points.

        What it was wrong by at a measured point is what it is taken to be wrong by beyond it, and between two of them
        what lies (log-log) between.
        """
        if not measured:
            return self
        errors = ComputeCurve(
            compute_dtype=self.compute_dtype,
            stored_dtype=self.stored_dtype,
            points=tuple(
                CurvePoint(p.tokens, p.seconds_per_parameter / self.seconds_per_parameter(p.tokens)) for p in measured
            ),
        )
        exact = {point.tokens: point for point in measured}
        last = measured[-1].tokens
        bent = {
            p.tokens: CurvePoint(p.tokens, p.seconds_per_parameter * errors.seconds_per_parameter(min(p.tokens, last)))
            for p in self.points
        }
        points = tuple(point for _, point in sorted((bent | exact).items()))
        return ComputeCurve(compute_dtype=self.compute_dtype, stored_dtype=self.stored_dtype, points=points)

    @property
    def flops(self) -> float:
        """Operations per second with the most tokens that were measured: two for each weight and token."""
        last = self.points[-1]
        return 2.0 * last.tokens / last.seconds_per_parameter

    @property
    def weight_bytes_per_s(self) -> float:
        """Bytes of weights per second with the fewest tokens, as stored: what memory gives where it is the limit."""
        return STORED_BYTES.get(self.stored_dtype, 2) / self.points[0].seconds_per_parameter

    def to_raw(self) -> dict[str, Any]:
        """Return the curve as a table of a TOML file; `from_raw` is its inverse."""
        return {
            "compute_dtype": self.compute_dtype,
            "stored_dtype": self.stored_dtype,
            "tokens": [point.tokens for point in self.points],
            "seconds_per_parameter": [point.seconds_per_parameter for point in self.points],
        }

    @classmethod
    def from_raw(cls, table: TomlTable) -> ComputeCurve:
        """Read a curve; raises MachineError that names the field."""
        tokens, seconds = table.array("tokens"), table.array("seconds_per_parameter")
        if len(tokens) != len(seconds):
            raise MachineError(f"{table.path}tokens has {len(tokens)} entries and seconds_per_parameter {len(seconds)}")
        points = []
        for count, time_s in zip(tokens, seconds, strict=True):
            if type(count) is not int:
                raise MachineError(f"{table.path}tokens holds {count!r} where a whole number is expected")
            if not is_number(time_s):
                raise MachineError(f"{table.path}seconds_per_parameter holds {time_s!r} where a number is expected")
            points.append(CurvePoint(count, float(time_s)))
        names = {name: table.text(name) for name in ("compute_dtype", "stored_dtype")}
        try:
            return cls(**names, points=tuple(points))
        except MachineError as error:
            raise MachineError(f"{table.path[:-1]} (tokens, seconds_per_parameter): {error}") from None


def find_curve(
    curves: Sequence[ComputeCurve], *, compute_dtype: str, stored_dtype: str, measured_on: str
) -> ComputeCurve:
    """The curve for this pair of dtypes; raises MachineError where `measured_on` was not measured with it."""
    for curve in curves:
        if (curve.compute_dtype, curve.stored_dtype) == (compute_dtype, stored_dtype):
            return curve
    raise MachineError(
        f"{measured_on} has no measurement of {compute_dtype} products with {stored_dtype} weights; "
        "run `headrace probe` again"
    )
