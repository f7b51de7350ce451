"""A constant with the range that its sources span.

Every figure about a machine, a price or an efficiency is one of these, so that a prediction can say how far it may be
off (`headrace.planning.interval`) and where each of its constants comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from headrace.errors import MachineError


@dataclass(frozen=True, slots=True)
class Quantity:
    """An expected value between the lowest and highest that are believable; all positive or zero, finite."""

    expected: float
    low: float
    high: float
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

    def fixed(self, value: float) -> Quantity:
        """Return this constant taken to be exactly `value`: how an interval is explored."""
        return Quantity(value, value, value, self.source)
