"""A constant with the range that its sources span.

Every figure about a machine, a price or an efficiency is one of these, so that a prediction can say how far it may be
off (`interval_of`) and where each of its constants comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headrace.errors import MachineError


@dataclass(frozen=True, slots=True)
class Interval:
    """An expected value between its ends."""

    expected: float
    low: float
    high: float

    def times(self, factor: float) -> Interval:
        """The same scaled."""
        return Interval(self.expected * factor, self.low * factor, self.high * factor)

    def dividing(self, amount: float) -> Interval:
        """`amount` over this: a rate, where this is its seconds."""
        return Interval(amount / self.expected, amount / self.high, amount / self.low)


@dataclass(frozen=True, slots=True)
class Quantity(Interval):
    """An expected value between the lowest and highest that are believable; all positive or zero, finite."""

    source: str

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.expected <= self.high < math.inf:
            raise MachineError(
                f"a constant must be 0 <= low <= expected <= high: {self.low}, {self.expected}, {self.high} "
                f"({self.source})"
            )

    @classmethod
    def of(cls, expected: float, source: str, *, low: float | None = None, high: float | None = None) -> Quantity:
        """Make one; a bound that is left out is the expected value itself (an exact figure)."""
        return cls(expected, expected if low is None else low, expected if high is None else high, source)

    @classmethod
    def about(cls, expected: float, source: str, *, share: float) -> Quantity:
        """Make one that may be off by `share` either way (0.1: a factor of 1.1)."""
        return cls(expected, expected / (1 + share), expected * (1 + share), source)

    def times(self, factor: float, why: str = "") -> Quantity:
        """The same constant scaled, its range with it."""
        source = f"{self.source}; {why}" if why else self.source
        return Quantity(self.expected * factor, self.low * factor, self.high * factor, source)

    def widened(self, *, low: float = 1.0, high: float = 1.0, why: str) -> Quantity:
        """The same constant with its ends times these factors, at most 1 and at least 1."""
        if low == high == 1.0:
            return self
        return Quantity(self.expected, self.low * low, self.high * high, f"{self.source}; {why}")

    def fixed(self, value: float) -> Quantity:
        """Return this constant taken to be exactly `value`: how an interval is explored."""
        return Quantity(value, value, value, self.source)


def interval_of(constants: Mapping[str, Interval], predict: Callable[[Mapping[str, float]], float]) -> Interval:
    """The prediction at the expected values, and how far it moves.

    Each constant is moved to its low and its high end, the others kept; the logarithms of the resulting factors are
    added in quadrature, upwards and downwards apart, as the constants are wrong independently of one another.
    """
    values = {name: constant.expected for name, constant in constants.items()}
    expected = predict(values)
    if not 0 < expected < math.inf:
        return Interval(expected, expected, expected)
    up = down = 0.0
    for name, constant in constants.items():
        for end in (constant.low, constant.high):
            if end == constant.expected:
                continue
            moved = math.log(max(predict(values | {name: max(end, 1e-30)}), 1e-300) / expected)
            if moved > 0:
                up += moved**2
            else:
                down += moved**2
    return Interval(expected, expected * math.exp(-math.sqrt(down)), expected * math.exp(math.sqrt(up)))
