"""The break-even report: tokens per pass at which computing a pass takes as long as loading it, and who reaches it.

Below it further tokens are free; above it more bandwidth is. For 16-bit weights it is about flops / link rate
(docs/formulas.md, section 3); with a mixture of experts more, since all experts travel and few compute; with fewer
bits less. It is of use only where it can be reached, so it comes with its price: the cache of so many sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from headrace.errors import HeadraceError
from headrace.machine.machine import Tier
from headrace.machine.quantity import Interval, interval_of
from headrace.model.formats import requantised
from headrace.model.model import Model
from headrace.planning.arrangement import Arrangement
from headrace.planning.comparison import Question
from headrace.planning.cost import load_seconds
from headrace.planning.machine_rates import MachineRates, quantities
from headrace.planning.memory_need import memory_need, usable_bytes
from headrace.planning.workload import PassTokens, Workload
from headrace.units import format_bytes

MOST_DRAFT_TOKENS = 16
_MOST_TOKENS = 2.0**40


class Reach(NamedTuple):
    """One way to fill a pass: whether it reaches break-even, how, or why not."""

    name: str
    reached: bool
    how: str


@dataclass(frozen=True, kw_only=True)
class BreakEvenReport:
    """Tokens per pass, the tier that is loaded from, and the ways there."""

    tokens_per_pass: Interval
    source: Tier
    kv_cache_bytes: float
    """of as many sequences as tokens, each at this work's context"""
    critical_batch: float
    """tokens per pass at which arithmetic takes as long as reading the weights from the device's own memory"""
    ways: tuple[Reach, ...]

    @property
    def reachable(self) -> bool:
        """Whether any way reaches it."""
        return any(way.reached for way in self.ways)


def break_even_report(question: Question) -> BreakEvenReport | None:
    """Report for streaming from the fastest tier that holds the weights; None where there is nothing to stream from."""
    arrangement = _streaming(question)
    if arrangement is None:
        return None
    tokens = break_even_tokens(question, arrangement)
    work = question.work
    context = work.context_tokens
    cache_bytes = question.model.kv_cache_bytes(sequences=tokens.expected, context_tokens=context)
    return BreakEvenReport(
        tokens_per_pass=tokens,
        source=arrangement.source,
        kv_cache_bytes=cache_bytes,
        critical_batch=critical_batch(question),
        ways=(
            _by_decode(question, arrangement, tokens.expected, cache_bytes),
            _by_prefill(question, tokens.expected),
            _by_drafts(work, tokens.expected),
            _by_fewer_bits(question, arrangement, tokens.expected),
        ),
    )


def break_even_tokens(question: Question, arrangement: Arrangement) -> Interval:
    """Tokens per pass at which the products of all layers take as long as loading them over the slowest hop."""
    constants = quantities(question.machine, question.engine, arrangement, weight_format=question.model.weight_format)
    return interval_of(constants, lambda values: _tokens(question.model, arrangement, MachineRates.of(values)))


def critical_batch(question: Question) -> float:
    """Tokens per pass at which arithmetic takes as long as reading resident weights: above it, batches are not free."""
    constants = quantities(
        question.machine, question.engine, Arrangement(strategy="resident"), weight_format=question.model.weight_format
    )
    rates = MachineRates.of({name: constant.expected for name, constant in constants.items()})
    model = question.model

    def arithmetic_exceeds(tokens: float) -> bool:
        operations = model.linear_flops(tokens=tokens, head_tokens=tokens)
        return operations / rates.flops >= model.bytes_read(tokens) / rates.memory_bytes_per_s

    return _least(arithmetic_exceeds)


def _streaming(question: Question) -> Arrangement | None:
    machine = question.machine
    for source in (Tier.HOST, Tier.DISK):
        offered = question.host_bytes if source is Tier.HOST else usable_bytes(machine, source)
        if offered >= question.model.weights_bytes and (source is Tier.DISK or machine.host is not None):
            return Arrangement(strategy="overlap", source=source, slots=2, resident_share=0.0)
    return None


def _tokens(model: Model, arrangement: Arrangement, rates: MachineRates) -> float:
    carried = PassTokens(sequences=1, new_tokens=1, context_tokens=1)
    link_s = disk_s = 0.0
    for group in model.groups:
        over_link_s, from_disk_s, _ = load_seconds(group.layer, model, carried, rates=rates, arrangement=arrangement)
        link_s += group.count * over_link_s
        disk_s += group.count * from_disk_s
    load_s = max(link_s, disk_s)

    def computes_longer(tokens: float) -> bool:
        products_s = sum(
            group.count
            * max(
                2.0 * group.layer.active_parameters * tokens / rates.flops,
                group.layer.bytes_read(tokens) / rates.memory_bytes_per_s,
            )
            for group in model.groups
        )
        return products_s + model.num_layers * rates.layer_overhead_s >= load_s

    return _least(computes_longer)


def _least(holds_from: Callable[[float], bool]) -> float:
    """Return the least number of tokens from which a condition holds, by bisection; 1 where it always does."""
    if holds_from(1.0):
        return 1.0
    low, high = 1.0, 2.0
    while not holds_from(high):
        low, high = high, high * 2
        if high > _MOST_TOKENS:
            return math.inf
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds_from(middle) else (middle, high)
    return high


def _by_decode(question: Question, arrangement: Arrangement, tokens: float, cache_bytes: float) -> Reach:
    sequences = math.ceil(tokens)
    if question.work.sequences >= sequences:
        return Reach("decode", reached=True, how=f"this batch of {question.work.sequences} has as many")
    work = replace(question.work, sequences=sequences)
    priced = f"its KV cache takes {format_bytes(cache_bytes)}"
    if memory_need(question.model, question.machine, arrangement, work).device_bytes <= question.device_bytes:
        return Reach("batch", reached=True, how=f"a batch of {sequences:,} sequences; {priced}")
    times = cache_bytes / question.model.weights_bytes
    return Reach(
        "batch",
        reached=False,
        how=f"a batch of {sequences:,} sequences cannot be held: {priced}, {times:.3g} times the weights",
    )


def _by_prefill(question: Question, tokens: float) -> Reach:
    work, most = question.work, question.model.context_tokens
    if work.sequences * work.prompt_tokens >= tokens:
        return Reach(
            "prefill", reached=True, how=f"this prefill of {work.sequences * work.prompt_tokens:,} tokens reaches it"
        )
    prompts = math.ceil(tokens / work.prompt_tokens)
    if work.sequences * most >= tokens:
        return Reach(
            "prefill",
            reached=True,
            how=f"prompts of {math.ceil(tokens / work.sequences):,} tokens, or {prompts:,} such prompts",
        )
    return Reach(
        "prefill", reached=True, how=f"the prompts of {prompts:,} such sequences in one pass, a chunk of them at a time"
    )


def _by_drafts(work: Workload, tokens: float) -> Reach:
    drafts = math.ceil(tokens / work.sequences) - 1
    if drafts < 1:
        return Reach("speculation", reached=True, how="no drafts are needed")
    if drafts <= MOST_DRAFT_TOKENS:
        return Reach("speculation", reached=True, how=f"{drafts} draft tokens per sequence and pass")
    return Reach(
        "speculation",
        reached=False,
        how=f"{drafts:,} drafts per sequence and pass would be needed; few beyond {MOST_DRAFT_TOKENS} are accepted",
    )


def _by_fewer_bits(question: Question, arrangement: Arrangement, tokens: float) -> Reach:
    try:
        narrow = requantised(question.model, "int4")
    except HeadraceError as error:
        return Reach("quantisation", reached=False, how=str(error))
    fewer = break_even_tokens(replace(question, model=narrow), arrangement).expected
    if fewer >= 0.95 * tokens:
        return Reach("quantisation", reached=False, how="the weights have few bits already")
    carried = max(question.work.sequences, 1)
    return Reach(
        "quantisation",
        reached=carried >= fewer,
        how=f"weights in 4 bits lower it to {fewer:,.0f} tokens per pass"
        + ("" if carried >= fewer else f", which a decode pass of {carried:,} still does not reach"),
    )
