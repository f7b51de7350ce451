"""What is asked of a model: how many sequences, how long, how many drafts; and what a single pass carries of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from headrace.errors import InvalidRequestError


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`sequences` prompts of `prompt_tokens` each, `generate_tokens` more for each."""

    sequences: int = 1
    prompt_tokens: int
    generate_tokens: int

    def __post_init__(self) -> None:
        for name in ("sequences", "prompt_tokens", "generate_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def context_tokens(self) -> int:
        """Longest context of the run."""
        return self.prompt_tokens + self.generate_tokens


DEFAULT_WORKLOAD = Workload(prompt_tokens=500, generate_tokens=500)
"""what is planned for unless something else is asked: a question with its material, and a page of text"""


def asked_workload(
    context_tokens: int, *, sequences: int = 1, prompt_tokens: int | None = None, generate_tokens: int | None = None
) -> Workload:
    """The work that is asked for; lengths that are not are `DEFAULT_WORKLOAD`'s, cut to what the context leaves."""
    if prompt_tokens is None:
        left = context_tokens // 2 if generate_tokens is None else context_tokens - generate_tokens
        prompt_tokens = max(1, min(DEFAULT_WORKLOAD.prompt_tokens, left))
    if generate_tokens is None:
        generate_tokens = max(1, min(DEFAULT_WORKLOAD.generate_tokens, context_tokens - prompt_tokens))
    return Workload(sequences=sequences, prompt_tokens=prompt_tokens, generate_tokens=generate_tokens)


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Drafts checked in the same pass: `draft_tokens` per sequence, each accepted with probability `acceptance`."""

    draft_tokens: int
    acceptance: float
    draft_s_share: float = 0.0
    """time of making the drafts, as a share of a plain decode pass (a small draft model; 0 for n-gram drafts)"""

    def __post_init__(self) -> None:
        if self.draft_tokens < 1 or not 0 <= self.acceptance <= 1 or not 0 <= self.draft_s_share < 100:
            raise InvalidRequestError(
                f"speculation with {self.draft_tokens} drafts, acceptance {self.acceptance} and draft share "
                f"{self.draft_s_share} is invalid: give at least 1 draft, and an acceptance from 0 to 1"
            )

    @property
    def tokens_per_pass(self) -> float:
        """Expected tokens that a pass brings a sequence: 1 + a + a^2 + ... + a^k (a draft counts if all before did)."""
        return sum(self.acceptance**number for number in range(self.draft_tokens + 1))


@dataclass(frozen=True, kw_only=True)
class PassTokens:
    """What a pass carries: `sequences` of `new_tokens` positions each, of which the last sees `context_tokens`."""

    sequences: float
    new_tokens: float
    context_tokens: float

    @property
    def tokens(self) -> float:
        """Positions in the pass."""
        return self.sequences * self.new_tokens


class Packed(NamedTuple):
    """Memory of passes that carry tokens of many sequences, none of them padded, in place of a rectangular batch."""

    positions: int
    """of keys and values, of all sequences together"""
    pass_tokens: int
    samples: int
    """sequences whose logits a pass gives, at most"""
    longest: int
    """positions of the longest sequence"""


class Group(NamedTuple):
    """Sequences that go through rectangular passes together."""

    sequences: int
    first_tokens: int
    """of each of them in the first pass"""
    positions: int
    """of the longest one's keys and values"""

    @property
    def passes(self) -> int:
        """Until the longest one has all its tokens."""
        return self.positions - self.first_tokens + 1


class Grouped(NamedTuple):
    """Memory of passes that carry one group of sequences after another, in place of a single batch."""

    groups: tuple[Group, ...]


JobMemory = Packed | Grouped
