"""Play a plan through: one link, one processor, k slots; the order of reads is the order of blocks, round and round.

The exact form of the overlapped pipeline (formulas.md, section 3): a read starts when the link is free and its slot is
free, a block is computed when it has arrived and the processor is free. Reading and computing may slow one another;
within each stretch both then run at their reduced speed. Whoever had to wait starts late: a reader that stood still is
woken and gets its first bytes after `read_latency_s`, a processor that stood still computes the next block
`stall_penalty_s` slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headrace.planning.timeline import Event, Lane, Timeline


class BlockTimes(NamedTuple):
    """Seconds to read a block over the idle link, and to compute it in a prefill and in a decode pass."""

    read_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything the simulation depends on."""

    blocks: tuple[BlockTimes, ...]
    resident: tuple[bool, ...]
    slots: int
    overlap: bool
    """False: a block is requested only when its turn to compute has come, and dropped afterwards"""
    decode_passes: int = 4
    pass_overhead_s: float = 0.0
    compute_slowdown: float = 1.0
    read_slowdown: float = 1.0
    first_pass_overhead_s: float | None = None
    """of the first pass beside its blocks; None: that of every pass"""
    read_latency_s: float = 0.0
    """by how much a read takes longer before which the link stood still, and every read that is requested on demand"""
    stall_penalty_s: float = 0.0
    """by how much computing a block takes longer for which the processor waited"""

    def overhead_s(self, pass_index: int) -> float:
        """Seconds of a pass beside its blocks."""
        first = self.first_pass_overhead_s
        return first if pass_index == 0 and first is not None else self.pass_overhead_s


class Simulated(NamedTuple):
    """Outcome: the first pass (which also brings the residents), a steady decode pass, and all events.

    The steady pass is the one of a long run: a lead that the reader won during prefill does not count in it.
    """

    prefill_s: float
    decode_s_per_pass: float
    timeline: Timeline


class _Fetch(NamedTuple):
    pass_index: int
    block_index: int
    streamed: bool


def fetch_order(resident: Sequence[bool], passes: int) -> list[_Fetch]:
    """The reads of a run: all blocks in the first pass, then the streamed ones in cyclic order."""
    order = [_Fetch(0, index, not stays) for index, stays in enumerate(resident)]
    streamed = [index for index, stays in enumerate(resident) if not stays]
    for pass_index in range(1, passes):
        order += [_Fetch(pass_index, index, streamed=True) for index in streamed]
    return order


def least_s(read_s: float, compute_s: float, read_slowdown: float, compute_slowdown: float) -> float:
    """Seconds that no schedule of this reading and computing goes below: as much as can be is done at once.

    A second of both at once does 1/read_slowdown of the one and 1/compute_slowdown of the other. Without slowdowns
    this is the longer of the two, with great ones their sum.
    """
    both_s = min(read_s * read_slowdown, compute_s * compute_slowdown)
    saved_share = max(0.0, 1 / read_slowdown + 1 / compute_slowdown - 1)
    return read_s + compute_s - both_s * saved_share


def simulate(scenario: Scenario, block_names: Sequence[str] | None = None) -> Simulated:
    """Run prefill and `decode_passes` decode passes; O(passes x blocks)."""
    count = len(scenario.blocks)
    passes = 1 + scenario.decode_passes
    fetches = fetch_order(scenario.resident, passes + 1)  # readers go on into a pass that does not come
    computes = [(pass_index, block) for pass_index in range(passes) for block in range(count)]
    arrived: set[tuple[int, int]] = set()
    events: list[Event] = []
    pass_ends = [0.0] * passes
    now, next_fetch, next_compute, slots_held = 0.0, 0, 0, 0
    read_left = compute_left = math.inf
    read_start = compute_start = waiting_since = read_ended = 0.0
    read_speed, compute_speed = 1 / scenario.read_slowdown, 1 / scenario.compute_slowdown

    while next_compute < len(computes):
        pass_index, block = computes[next_compute]
        if math.isinf(read_left) and next_fetch < len(fetches):
            fetch = fetches[next_fetch]
            slot_free = not fetch.streamed or slots_held < scenario.slots
            its_turn = scenario.overlap or (fetch.pass_index, fetch.block_index) == (pass_index, block)
            if slot_free and its_turn:
                slots_held += fetch.streamed
                read_left, read_start = scenario.blocks[fetch.block_index].read_s, now
                if now > read_ended or not scenario.overlap:
                    read_left += scenario.read_latency_s
        ready = (pass_index, block) in arrived or (pass_index > 0 and scenario.resident[block])
        if math.isinf(compute_left) and ready:
            times = scenario.blocks[block]
            compute_left = times.decode_s if pass_index else times.prefill_s
            if block == 0:
                compute_left += scenario.overhead_s(pass_index)
            if now > waiting_since:
                compute_left += scenario.stall_penalty_s
                events.append(Event(Lane.STALL, block, pass_index, waiting_since, now))
            compute_start = now
        reading, computing = not math.isinf(read_left), not math.isinf(compute_left)
        if not reading and not computing:
            raise AssertionError("the simulated pipeline cannot go on: no slot for the block that is due")
        read_rate = read_speed if computing else 1.0
        compute_rate = compute_speed if reading else 1.0
        step = min(read_left / read_rate, compute_left / compute_rate)
        now += step
        if reading:
            read_left -= step * read_rate
        if computing:
            compute_left -= step * compute_rate
        if reading and read_left <= 1e-12:
            fetch = fetches[next_fetch]
            events.append(Event(Lane.READ, fetch.block_index, fetch.pass_index, read_start, now))
            arrived.add((fetch.pass_index, fetch.block_index))
            next_fetch += 1
            read_left, read_ended = math.inf, now
        if computing and compute_left <= 1e-12:
            events.append(Event(Lane.COMPUTE, block, pass_index, compute_start, now))
            slots_held -= not scenario.resident[block]
            pass_ends[pass_index] = waiting_since = now
            next_compute += 1
            compute_left = math.inf

    names = tuple(block_names) if block_names is not None else tuple(f"block {i}" for i in range(count))
    steady = (pass_ends[-1] - pass_ends[passes // 2]) / (passes - 1 - passes // 2) if passes > 2 else _span(pass_ends)
    if scenario.decode_passes:
        load_s = sum(t.read_s for t, stays in zip(scenario.blocks, scenario.resident, strict=True) if not stays)
        compute_s = scenario.pass_overhead_s + sum(times.decode_s for times in scenario.blocks)
        steady = max(steady, least_s(load_s, compute_s, scenario.read_slowdown, scenario.compute_slowdown))
    return Simulated(pass_ends[0], steady, Timeline(tuple(events), names))


def _span(pass_ends: Sequence[float]) -> float:
    return pass_ends[-1] - pass_ends[-2] if len(pass_ends) > 1 else 0.0
