"""When a run must be over: parts and rounds begin only where they can end in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator


class Deadline:
    """`seconds` from construction on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._ends = clock() + seconds

    @property
    def left_s(self) -> float:
        """Seconds that are left; negative once it has passed."""
        return self._ends - self._clock()

    def rounds(self, most: int) -> Iterator[int]:
        """Numbers of rounds: the first in any case, another one only where the longest so far would fit."""
        longest_s = 0.0
        for number in range(most):
            began = self._clock()
            if number and self._ends - began < longest_s:
                return
            yield number
            longest_s = max(longest_s, self._clock() - began)
