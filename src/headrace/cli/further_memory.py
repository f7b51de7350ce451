"""What more memory of one kind would bring, found by planning again with more of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from headrace.planning.planner import Candidate
from headrace.units import format_bytes, format_seconds

STEP_BYTES = 1 << 30


class FurtherMemory(NamedTuple):
    """A memory whose budget could be larger."""

    name: str
    """as sentences call it: device memory"""
    option: str
    budget_bytes: int
    enough_bytes: int | None
    """the budget beyond which more would change nothing; None where no budget would be enough"""
    holds: str
    """what as much as that would hold"""
    block_bytes: int
    """of the largest block: a step that is smaller may hold no more than before"""
    planned: Callable[[int], Candidate]
    """the fastest plan under another budget"""

    def describe(self, best: Candidate) -> str:
        """Say what a step more would save of a pass; nothing where there is enough."""
        budget, enough = self.budget_bytes, self.enough_bytes
        step = max(STEP_BYTES, 2 * self.block_bytes)
        if enough is not None:
            step = min(step, enough - budget)
        if step <= 0:
            return ""
        now_s = best.prediction.decode_s_per_pass
        saved_s = now_s - self.planned(budget + step).prediction.decode_s_per_pass
        if saved_s < 0.01 * now_s:
            return f"More {self.name} would save nothing worth having."
        if enough is not None and step == enough - budget:
            return (
                f"{format_bytes(step)} more {self.name} would hold {self.holds}: {format_seconds(now_s - saved_s)} per "
                f"pass ({self.option} {enough})."
            )
        saved_s *= STEP_BYTES / step
        return f"Each further GiB of {self.name} saves about {format_seconds(saved_s)} per pass."
