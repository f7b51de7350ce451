"""From model, machine, plan and workload to times. The one function behind every estimate that headrace shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from headrace.machine.compute_curve import ComputeCurve
from headrace.machine.machine import Machine
from headrace.model.blocks import Block
from headrace.model.stored_model import StoredModel
from headrace.planning.block_times import BlockTimes
from headrace.planning.pass_times import least_s
from headrace.planning.plan import EmbeddingPlacement, Plan, Strategy, Workload
from headrace.planning.simulation.one_copy import PassSchedule, Simulated, simulate
from headrace.planning.timeline import Timeline

DECODE_PASSES_SIMULATED = 5


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Seconds that one decoder layer of this model was seen to take on this machine, alone, whole block."""

    prefill_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a plan will do. Seconds; tokens per second count all sequences."""

    prefill_s: float
    decode_s_per_pass: float
    tokens_per_s: float
    total_s: float
    binds: str
    """whatever a decode pass waits for: `disk`, `compute` or `both`; on an accelerator also `link` or `processor`"""
    load_s_per_pass: float
    compute_s_per_pass: float
    break_even_tokens_per_pass: float
    """tokens at which computing a pass takes as long as reading what the plan streams; 0 when nothing is streamed"""
    possible_decode_s: float
    """max(load, compute): no schedule is faster"""
    timeline: Timeline


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The constants of one run: link, arithmetic curve of the chosen dtypes, what a rehearsal corrected."""

    read_bytes_per_s: float
    curve: ComputeCurve
    block_overhead_s: float
    pass_overhead_s: float
    compute_slowdown: float = 1.0
    read_slowdown: float = 1.0
    layer: LayerTimes | None = None
    head_curve: ComputeCurve | None = None
    """arithmetic of the head, where it was measured apart"""
    first_pass_overhead_s: float | None = None
    """of the first pass beside its blocks (masks and positions of whole prompts); None: that of every pass"""
    row_s: float = 0.0
    """per distinct row of the embedding that is read from the checkpoint"""
    read_latency_s: float = 0.0
    """from asking a reader that stood still for a block until its bytes come, and from the last byte to the asker"""
    stall_penalty_s: float = 0.0
    """by how much a block takes longer for which the processor had to wait"""

    @classmethod
    def of(
        cls,
        machine: Machine,
        *,
        compute_dtype: str,
        stored_dtype: str,
        read_limit_bytes_per_s: float | None = None,
    ) -> Pace:
        """Take the machine's constants, the disk's rate bounded by the reader's own limit."""
        disk, arithmetic = machine.require_disk(), machine.processor.arithmetic
        read = disk.bytes_per_s.expected
        return cls(
            read_bytes_per_s=read if read_limit_bytes_per_s is None else min(read, read_limit_bytes_per_s),
            curve=machine.processor.curve(compute_dtype=compute_dtype, stored_dtype=stored_dtype),
            block_overhead_s=arithmetic.block_overhead_s.expected,
            pass_overhead_s=arithmetic.pass_overhead_s.expected,
            compute_slowdown=arithmetic.slowdown_while_reading.expected,
            read_slowdown=arithmetic.slowdown_of_reading.expected,
            read_latency_s=disk.latency_s.expected,
        )

    def block_seconds(self, block: Block, *, tokens: float, head_tokens: float) -> float:
        """Seconds to compute a block for a pass of `tokens` tokens, from the curve."""
        if block.head_rows is not None:
            curve = self.head_curve or self.curve
            return block.active_parameters * curve.seconds_per_parameter(head_tokens)
        # Converting touches every stored parameter; a mixture of experts computes only with the active ones.
        return self.block_overhead_s + block.active_parameters * self.curve.seconds_per_parameter(tokens)


class PassOverheads(NamedTuple):
    """Seconds of a pass beside its blocks, embedding rows included."""

    first_pass_s: float
    further_pass_s: float

    @classmethod
    def of(cls, model: StoredModel, work: Workload, pace: Pace, *, rows_from_disk: bool) -> PassOverheads:
        """Add the rows of the embedding that a pass looks up, where they are read one by one."""
        vocabulary = model.vocab_size
        first, further = (
            pace.row_s * distinct_rows(vocabulary, tokens) if rows_from_disk else 0.0
            for tokens in (work.sequences * work.prompt_tokens, work.sequences)
        )
        own = pace.pass_overhead_s if pace.first_pass_overhead_s is None else pace.first_pass_overhead_s
        return cls(own + first, pace.pass_overhead_s + further)


def distinct_rows(vocabulary: int, tokens: int) -> float:
    """How many distinct rows so many tokens look up, drawn evenly from the vocabulary; text needs fewer."""
    return vocabulary * -math.expm1(tokens * math.log1p(-1 / vocabulary)) if vocabulary > 1 else 1.0


def block_times(model: StoredModel, work: Workload, pace: Pace) -> tuple[BlockTimes, ...]:
    """Read, prefill and decode seconds of each block under this workload."""
    prefill_tokens, decode_tokens = work.sequences * work.prompt_tokens, work.sequences
    layers = [block for block in model.blocks if block.head_rows is None]
    mean_parameters = sum(block.active_parameters for block in layers) / len(layers)
    times = []
    for block in model.blocks:
        read_s = block.read_bytes / pace.read_bytes_per_s
        if pace.layer is not None and block.head_rows is None:
            share = block.active_parameters / mean_parameters
            times.append(BlockTimes(read_s, pace.layer.prefill_s * share, pace.layer.decode_s * share))
            continue
        times.append(
            BlockTimes(
                read_s,
                pace.block_seconds(block, tokens=prefill_tokens, head_tokens=decode_tokens),
                pace.block_seconds(block, tokens=decode_tokens, head_tokens=decode_tokens),
            )
        )
    return tuple(times)


def predict(model: StoredModel, plan: Plan, pace: Pace, *, decode_passes: int = DECODE_PASSES_SIMULATED) -> Prediction:
    """Simulate the plan's workload and say what binds."""
    times = block_times(model, plan.workload, pace)
    beside = PassOverheads.of(model, plan.workload, pace, rows_from_disk=plan.embedding is EmbeddingPlacement.ROWS)
    simulated = _simulate(plan, pace, times, beside, model, decode_passes)
    load_s = sum(t.read_s for t, stays in zip(times, plan.resident, strict=True) if not stays)
    compute_s = sum(t.decode_s for t in times) + beside.further_pass_s
    work = plan.workload
    decode_s = simulated.decode_s_per_pass
    total_s = simulated.prefill_s + (work.generate_tokens - 1) * decode_s
    return Prediction(
        prefill_s=simulated.prefill_s,
        decode_s_per_pass=decode_s,
        tokens_per_s=work.sequences / decode_s,
        total_s=total_s,
        binds=_binds(plan.strategy, load_s, compute_s),
        load_s_per_pass=load_s,
        compute_s_per_pass=compute_s,
        break_even_tokens_per_pass=break_even_tokens(model, plan, pace, load_s=load_s, compute_s=compute_s),
        possible_decode_s=max(load_s, compute_s),
        timeline=simulated.timeline,
    )


class TimeFloor(NamedTuple):
    """What no schedule of a strategy's plans is faster than; what sequential ones take exactly. Seconds.

    Rows of the embedding count nothing here, since whether they are read depends on the plan.
    """

    sequential: bool
    read_s: float
    """bringing all blocks, as the first pass does"""
    prefill_s: float
    decode_s: float
    begin_s: float
    """reading the first block, before anything is computed"""
    end_s: float
    """computing the last block, after everything is read"""
    further_passes: int
    on_demand_s: float
    """per block that is requested only when it is needed"""
    slowdowns: tuple[float, float]

    @classmethod
    def of(cls, strategy: Strategy, work: Workload, pace: Pace, times: Sequence[BlockTimes]) -> TimeFloor:
        """Sum up what does not depend on which blocks stay."""
        own = pace.pass_overhead_s
        beside = PassOverheads(own if pace.first_pass_overhead_s is None else pace.first_pass_overhead_s, own)
        return cls(
            sequential=strategy is Strategy.SEQUENTIAL,
            read_s=sum(t.read_s for t in times),
            prefill_s=sum(t.prefill_s for t in times) + beside.first_pass_s,
            decode_s=sum(t.decode_s for t in times) + beside.further_pass_s,
            begin_s=times[0].read_s,
            end_s=times[-1].prefill_s,
            further_passes=work.generate_tokens - 1,
            on_demand_s=pace.read_latency_s + pace.stall_penalty_s,
            slowdowns=(pace.read_slowdown, pace.compute_slowdown),
        )

    def total_s(self, times: Sequence[BlockTimes], resident: Sequence[bool]) -> float:
        """Seconds of the whole work with these residents, at least."""
        load_s = sum(t.read_s for t, stays in zip(times, resident, strict=True) if not stays)
        if self.sequential:
            first_s = len(resident) * self.on_demand_s + self.read_s + self.prefill_s
            streamed = len(resident) - sum(resident)
            return first_s + self.further_passes * (streamed * self.on_demand_s + load_s + self.decode_s)
        middle_s = least_s(self.read_s - self.begin_s, self.prefill_s - self.end_s, *self.slowdowns)
        pass_s = least_s(load_s, self.decode_s, *self.slowdowns)
        return self.begin_s + middle_s + self.end_s + self.further_passes * pass_s


def _simulate(
    plan: Plan, pace: Pace, times: tuple[BlockTimes, ...], beside: PassOverheads, model: StoredModel, decode_passes: int
) -> Simulated:
    schedule = PassSchedule(
        blocks=times,
        placements=plan.places,
        slots=plan.slots,
        overlap=plan.strategy is not Strategy.SEQUENTIAL,
        decode_passes=decode_passes,
        pass_overhead_s=beside.further_pass_s,
        first_pass_overhead_s=beside.first_pass_s,
        compute_slowdown=pace.compute_slowdown,
        read_slowdown=pace.read_slowdown,
        read_latency_s=pace.read_latency_s,
        stall_penalty_s=pace.stall_penalty_s,
    )
    return simulate(schedule, [block.name for block in model.blocks])


def _binds(strategy: Strategy, load_s: float, compute_s: float) -> str:
    if load_s == 0:
        return "compute"
    if strategy is Strategy.SEQUENTIAL:
        return "both"
    return "disk" if load_s > compute_s else "compute"


def break_even_tokens(model: StoredModel, plan: Plan, pace: Pace, *, load_s: float, compute_s: float) -> float:
    """Tokens per pass at which computing equals loading, by bisection on the curve; 0 where nothing is streamed.

    The curve is scaled so that it passes through the decode time that the prediction uses at the plan's own number
    of tokens. Below the result further tokens are free; above it more bandwidth is.
    """
    if load_s <= 0:
        return 0.0
    tokens = plan.workload.sequences
    kinds = {(block.active_parameters, block.head_rows is None): block for block in model.blocks}
    numbers = Counter((block.active_parameters, block.head_rows is None) for block in model.blocks)

    def seconds(count: float) -> float:
        return pace.pass_overhead_s + sum(
            numbers[kind] * pace.block_seconds(block, tokens=count, head_tokens=count) for kind, block in kinds.items()
        )

    factor = compute_s / seconds(tokens)
    if factor * seconds(1) >= load_s:
        return load_s / (factor * seconds(1))
    low, high = 1.0, 2.0
    while factor * seconds(high) < load_s:
        low, high = high, high * 2
        if high > 2**40:
            return high
    while high - low > low * 1e-7:  # curves may be steep
        middle = (low + high) / 2
        if factor * seconds(middle) < load_s:
            low = middle
        else:
            high = middle
    return high


def with_read_rate(pace: Pace, read_bytes_per_s: float) -> Pace:
    """The same pace over another link."""
    return replace(pace, read_bytes_per_s=read_bytes_per_s)
