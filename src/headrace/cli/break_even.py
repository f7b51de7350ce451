"""The tokens per pass at which computing a pass takes as long as loading it, what they cost, and how to reach them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from headrace.dtypes import DTYPES
from headrace.errors import BudgetError
from headrace.planning.break_even import Reach
from headrace.planning.infeasible import minimum_bytes
from headrace.planning.prediction import Candidate
from headrace.planning.scenario import Scenario
from headrace.units import format_bytes

DRAFT_TOKENS_MAX = 16
"""Drafts longer than this are hardly ever accepted whole, so that they count as no way to more tokens per pass."""


class BreakEven(NamedTuple):
    """Below `tokens_per_pass` further tokens are free; zero where nothing is streamed."""

    tokens_per_pass: float
    tokens_now: int
    """tokens of a decode pass of the work as it was asked for"""
    kv_cache_bytes: int
    """keys and values of that many sequences at the workload's full context"""
    ways: tuple[Reach, ...]

    def describe(self) -> str:
        """In one or two sentences."""
        if not self.tokens_per_pass:
            return "Nothing is streamed, so there is no break-even: a pass takes as long as its arithmetic."
        if self.tokens_per_pass <= self.tokens_now:
            return (
                f"Break-even: {self.tokens_per_pass:.3g} tokens per pass, which this work is past already: computing a "
                "pass takes longer than loading it."
            )
        start = (
            f"Break-even: {self.tokens_per_pass:.0f} tokens per pass (as that many sequences, "
            f"{format_bytes(self.kv_cache_bytes)} of KV cache)"
        )
        if not self.ways:
            return f"{start}; within this budget nothing reaches it."
        return f"{start}; reached by {', or '.join(way.how for way in self.ways)}."


NO_BREAK_EVEN = BreakEven(0.0, 0, 0, ())


def break_even_of(scenario: Scenario, candidate: Candidate) -> BreakEven:
    """Return the break-even of one plan, its price in KV cache, and the ways to it that fit this budget."""
    tokens = candidate.prediction.break_even_tokens_per_pass
    model, work = scenario.model, scenario.workload
    if not tokens:
        return BreakEven(0.0, work.sequences, 0, ())
    sequences = math.ceil(tokens)
    element_bytes = DTYPES[scenario.compute_dtype].size_bytes
    kv_cache_bytes = model.kv_cache_bytes(
        sequences=sequences, context_tokens=work.context_tokens, element_bytes=element_bytes
    )
    ways = [Reach("decode", reached=True, how="every pass of this work")] if tokens <= work.sequences else []
    if sequences <= model.context_tokens * work.sequences:
        prompt_tokens = math.ceil(tokens / work.sequences)
        ways.append(Reach("prefill", reached=True, how=f"prompts of {prompt_tokens} tokens (the first pass)"))
    if _fits(scenario, sequences):
        ways.append(Reach("batch", reached=True, how=f"a batch of {sequences}"))
    drafts = math.ceil(tokens / work.sequences) - 1
    if 1 <= drafts <= DRAFT_TOKENS_MAX:
        ways.append(Reach("speculation", reached=True, how=f"{drafts} draft tokens per pass"))
    return BreakEven(tokens, work.sequences, round(kv_cache_bytes), tuple(ways))


def _fits(scenario: Scenario, sequences: int) -> bool:
    """Whether so many sequences at once could be run at all within the budget."""
    try:
        needed = minimum_bytes(replace(scenario, workload=replace(scenario.workload, sequences=sequences)))
    except BudgetError:
        return False
    return needed <= scenario.budget_bytes
