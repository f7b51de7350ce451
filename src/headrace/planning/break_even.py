"""The break-even report: tokens per pass at which computing a pass takes as long as loading it, and what reaches it.

Below it further tokens are free; above it more bandwidth is. For 16-bit weights it is about flops / link rate
(docs/formulas.md, section 3); with a mixture of experts more, since all experts travel and few compute; with fewer
bits less. It is that of the recommended plan where that streams, and otherwise what streaming everything from the
fastest memory that holds the weights would have. It comes with its price: the cache of so many sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from headrace.dtypes import DTYPES
from headrace.errors import BudgetError, HeadraceError
from headrace.machine.machine import Tier
from headrace.machine.quantity import Interval, interval_of
from headrace.model.formats import requantised
from headrace.planning.closed_form import ClosedForm, least_tokens
from headrace.planning.described_rates import quantities
from headrace.planning.infeasible import lack_of, minimum_bytes
from headrace.planning.plan import Arrangement, Placement, arranged
from headrace.planning.prediction import Candidate, is_simulated
from headrace.planning.scenario import Scenario
from headrace.planning.workload import Workload
from headrace.units import format_bytes, format_count, format_number

MAX_DRAFT_TOKENS = 16
"""drafts longer than this are hardly ever accepted whole, so they count as no way to more tokens per pass"""


class Reach(NamedTuple):
    """One way to fill a pass: whether it reaches break-even, how, or why not."""

    name: str
    reached: bool
    how: str


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Tokens per pass, the tier that is loaded from, and the ways there."""

    tokens_per_pass: Interval
    source: Tier
    tokens_now: int
    """tokens of a decode pass of the workload"""
    kv_cache_bytes: float
    """of as many sequences as it takes, each at this workload's full context"""
    ways: tuple[Reach, ...]
    critical_batch: float | None = None
    """tokens per pass at which arithmetic takes as long as reading the weights from the device's own memory"""

    @property
    def reachable(self) -> bool:
        """Whether any way reaches it."""
        return any(way.reached for way in self.ways)


def break_even(scenario: Scenario, best: Candidate | None) -> BreakEven | None:
    """Report on the recommended plan, or on streaming everything; None where there is nothing to stream from."""
    if best is not None and is_simulated(best.plan, scenario):
        tokens = best.prediction.break_even_tokens_per_pass
        if not tokens:
            return None
        source = Tier.DISK if Placement.DISK in best.plan.placements else Tier.HOST
        return _report(scenario, Interval(tokens, tokens, tokens), source, best.plan.arrangement)
    if scenario.machine is None:
        return None
    if best is not None and best.plan.arrangement.streamed_share > 0:
        arrangement = best.plan.arrangement
    else:
        streamed = _streaming_everything(scenario)
        if streamed is None:
            return None
        arrangement = streamed
    return _report(scenario, break_even_tokens(scenario, arrangement), arrangement.source, arrangement)


def break_even_tokens(scenario: Scenario, arrangement: Arrangement) -> Interval:
    """Tokens per decode pass at which computing takes as long as loading over the slowest hop, with its range."""
    work, checked = scenario.workload, scenario.tokens_checked
    return interval_of(
        quantities(scenario, arrangement),
        lambda values: ClosedForm.of(scenario, arrangement, values).even_tokens(work, checked=checked),
    )


def critical_batch(scenario: Scenario) -> float:
    """Tokens per pass at which arithmetic takes as long as reading resident weights: above it, batches are not free."""
    model = scenario.model
    peaks = ClosedForm.of(scenario, arranged(model.num_layers)).rates.peaks

    def arithmetic_exceeds(tokens: float) -> bool:
        operations = model.linear_flops(tokens=tokens, head_tokens=tokens)
        return operations / peaks.flops >= model.bytes_read(tokens) / peaks.memory_bytes_per_s

    return least_tokens(arithmetic_exceeds)


def fastest_source(scenario: Scenario) -> Placement | None:
    """The fastest tier outside of the device that holds all weights; None where there is none."""
    machine, needed = scenario.described_machine, scenario.model.weights_bytes
    if machine.host is not None and "host" in machine.links and scenario.host_budget_bytes >= needed:
        return Placement.HOST
    return Placement.DISK if machine.usable_bytes(Tier.DISK) >= needed else None


def _streaming_everything(scenario: Scenario) -> Arrangement | None:
    source = fastest_source(scenario)
    return None if source is None else arranged(scenario.model.num_layers, resident=0, source=source)


def _report(scenario: Scenario, tokens: Interval, source: Tier, arrangement: Arrangement) -> BreakEven:
    sequences = tokens.expected / scenario.tokens_checked
    cache_bytes = scenario.model.kv_cache_bytes(
        sequences=math.ceil(sequences) if sequences < math.inf else sequences,
        context_tokens=scenario.workload.context_tokens,
        element_bytes=DTYPES[scenario.compute_dtype].size_bytes if scenario.is_calibrated else None,
    )
    return BreakEven(
        tokens_per_pass=tokens,
        source=source,
        tokens_now=scenario.workload.sequences * scenario.tokens_checked,
        kv_cache_bytes=cache_bytes,
        critical_batch=None if scenario.machine is None else critical_batch(scenario),
        ways=tuple(
            Reach(name, reached=reached, how=how)
            for name, reached, how in _ways(scenario, arrangement, tokens.expected, cache_bytes)
        ),
    )


def _ways(
    scenario: Scenario, arrangement: Arrangement, tokens: float, cache_bytes: float
) -> Iterator[tuple[str, bool, str]]:
    """Name of each way, whether it reaches so many tokens, and how or why not."""
    yield _by_batch(scenario, arrangement, tokens, cache_bytes)
    yield "prefill", tokens < math.inf, _by_prefill(scenario, tokens)
    yield "speculation", *_by_drafts(scenario.workload, tokens)
    if not scenario.is_calibrated:
        yield "quantisation", *_by_fewer_bits(scenario, arrangement, tokens)


def _by_batch(scenario: Scenario, arrangement: Arrangement, tokens: float, cache_bytes: float) -> tuple[str, bool, str]:
    checked = scenario.tokens_checked
    if scenario.workload.sequences * checked >= tokens:
        return "decode", True, f"this batch of {format_count(scenario.workload.sequences)}"
    if tokens == math.inf:
        return "batch", False, "no batch reaches it: keys and values travel with each sequence"
    sequences = math.ceil(tokens / checked)
    batch, priced = f"a batch of {format_count(sequences)} sequences", f"its KV cache takes {format_bytes(cache_bytes)}"
    if _holds(scenario.batch(sequences), arrangement):
        return "batch", True, f"{batch}; {priced}"
    times = format_number(cache_bytes / scenario.model.weights_bytes)
    return "batch", False, f"{batch} cannot be held: {priced}, {times} times the weights"


def _holds(scenario: Scenario, arrangement: Arrangement) -> bool:
    """Whether the workload could be held at all on measured hardware, or as this arrangement on a described one."""
    if not scenario.is_calibrated:
        return lack_of(scenario, arrangement) is None
    try:
        return minimum_bytes(scenario) <= scenario.budget_bytes
    except BudgetError:
        return False


def _by_prefill(scenario: Scenario, tokens: float) -> str:
    work, most = scenario.workload, scenario.model.context_tokens
    if work.sequences * work.prompt_tokens >= tokens:
        return f"this prefill of {format_count(work.sequences * work.prompt_tokens)} tokens"
    if work.sequences * most >= tokens:
        return f"prompts of {format_count(math.ceil(tokens / work.sequences))} tokens"
    if tokens == math.inf:
        return "no prompt is long enough"
    prompts = math.ceil(tokens / work.prompt_tokens)
    return f"the prompts of {format_count(prompts)} such sequences in one pass, a chunk of them at a time"


def _by_drafts(work: Workload, tokens: float) -> tuple[bool, str]:
    if tokens == math.inf:
        return False, "no number of drafts reaches it"
    drafts = math.ceil(tokens / work.sequences) - 1
    if drafts < 1:
        return True, "no drafts are needed"
    if drafts <= MAX_DRAFT_TOKENS:
        return True, f"{drafts} draft tokens per sequence and pass"
    needed = f"{format_count(drafts)} drafts per sequence and pass would be needed"
    return False, f"{needed}; few beyond {MAX_DRAFT_TOKENS} are accepted"


def _by_fewer_bits(scenario: Scenario, arrangement: Arrangement, tokens: float) -> tuple[bool, str]:
    carried = scenario.workload.sequences * scenario.tokens_checked
    if carried >= tokens:
        return True, "no fewer bits are needed"
    try:
        narrow = requantised(scenario.model, "int4")
    except HeadraceError as error:
        return False, str(error)
    fewer = break_even_tokens(replace(scenario, model=narrow), arrangement).expected
    if fewer >= 0.95 * tokens:
        return False, "the weights have few bits already"
    lowered = f"weights in 4 bits lower it to {format_count(fewer)} tokens per pass"
    if carried >= fewer:
        return True, lowered
    return False, f"{lowered}, which a decode pass of {format_count(carried)} still does not reach"
