"""How many tokens to draft before a pass: as many as pay, none where none do.

A pass over the weights checks several drafted tokens for the price of reading the weights once; what it costs beyond
is computing with more tokens, which below break-even is hidden behind the reading. With a probability `a` that a
drafted token is right, a pass with k drafts yields 1 + a + ... + a^k tokens in pass_s(1 + k) + k draft_s. Both sides
are corrected by what the run measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

FORGET = 0.97
"""how much of what was seen still counts one pass later"""
TRY_AGAIN_PASSES = 16
TRIED_TOKENS = 2
TRYING_SHARE = 0.02
"""of the time may be lost by looking whether drafts pay again"""


class Drafted(NamedTuple):
    """What drafting did over a run."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    longest: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass yielded, on average."""
        return 1 + self.accepted / self.passes if self.passes else 1.0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were right."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(kw_only=True)
class DraftLength:
    """Chooses the number of drafts of each pass. `pass_s` predicts a pass of so many tokens, in seconds."""

    pass_s: Callable[[int], float]
    most: int
    draft_s: float = 0.0
    """seconds per drafted token"""
    acceptance: float = 0.4
    """what is believed before anything was seen"""
    _right: float = 0.0
    _wrong: float = 0.0
    _single: float = 1.0
    _several: float = 1.0
    _since_tried: int = 0
    drafted: Drafted = field(default_factory=Drafted)
    """what drafting did so far"""

    @property
    def believed(self) -> float:
        """The probability that a drafted token is right, as far as is known."""
        return (2 * self.acceptance + self._right) / (2 + self._right + self._wrong)

    def tokens_per_s(self, drafts: int, acceptance: float | None = None) -> float:
        """Expected tokens per second with so many drafts in each pass."""
        right = self.believed if acceptance is None else acceptance
        expected = sum(right**power for power in range(drafts + 1))
        return expected / self._time_s(drafts)

    def next_length(self) -> int:
        """Drafts for the next pass."""
        best = max(range(self.most + 1), key=self.tokens_per_s)
        if best:
            self._since_tried = 0
            return best
        self._since_tried += 1
        tried = min(TRIED_TOKENS, self.most)
        # The text may have changed its kind: look again now and then, the more rarely the dearer looking is.
        dearer = self._time_s(tried) / self._time_s(0) - 1
        if self._since_tried < max(TRY_AGAIN_PASSES, dearer / TRYING_SHARE):
            return 0
        self._since_tried = 0
        return tried

    def record(self, drafted: int, accepted: int, seconds: float | None) -> None:
        """A pass with `drafted` tokens was seen, of which `accepted` were right; it took `seconds` (None: unknown)."""
        so_far = self.drafted
        self.drafted = Drafted(
            so_far.passes + 1, so_far.drafted + drafted, so_far.accepted + accepted, max(so_far.longest, drafted)
        )
        if drafted:
            self._right = FORGET * self._right + accepted
            self._wrong = FORGET * self._wrong + (accepted < drafted)
        if seconds is None:
            return
        ratio = seconds / (self.pass_s(1 + drafted) + drafted * self.draft_s)
        if drafted:
            self._several += 0.2 * (ratio - self._several)
        else:
            self._single += 0.2 * (ratio - self._single)

    def _time_s(self, drafts: int) -> float:
        return (self.pass_s(1 + drafts) + drafts * self.draft_s) * (self._several if drafts else self._single)
