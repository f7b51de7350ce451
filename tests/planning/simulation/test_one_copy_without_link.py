"""Without a link the simulated passes equal an independent recursion, and closed forms of slowing and waiting."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.planning.block_times import BlockTimes
from headrace.planning.simulation.one_copy import PassSchedule, simulate
from headrace.planning.timeline import Lane
from pass_schedules import DISK, events_of, pass_ends, prefill_work_s, schedules, sums, uniform, ways_s
from pass_schedules import close as close_to

on_cpu = schedules(link=False)
slowed = schedules(link=False, slowdowns=True)


def close(expected: float | list[float]) -> Any:
    return close_to(expected, link=False)


# -- against the recursion and the closed forms ------------------------------------------------------------------------


def recursion(schedule: PassSchedule) -> list[float]:
    """Return the ends of the passes by `start_j(i) = max(end_j(i-1), end_{j-1}(i), slot_free)`, without events.

    Stage one reads, stage two computes; both take the blocks in order. The slot of the n-th streamed block is free when
    the block that is `slots` places before it has been computed. A read pays the latency when its slot came free after
    the read before had ended, a computation pays the penalty when its block came after the computation before.
    """
    ends: list[float] = []
    read_end = compute_end = 0.0
    computed: list[float] = []  # ends of the streamed blocks' computations, in order
    for pass_index in range(1 + schedule.decode_passes):
        for block, (times, placement) in enumerate(zip(schedule.blocks, schedule.placements, strict=True)):
            arrived, streamed = 0.0, placement is DISK
            if pass_index == 0 or streamed:
                slot_free = computed[-schedule.slots] if streamed and len(computed) >= schedule.slots else 0.0
                latency_s = schedule.read_latency_s if slot_free > read_end else 0.0
                read_end = arrived = max(read_end, slot_free) + latency_s + times.read_s
            work_s = times.decode_s if pass_index else times.prefill_s
            work_s += schedule.stall_penalty_s if arrived > compute_end else 0.0
            compute_end = max(compute_end, arrived) + work_s + (schedule.pass_overhead_s if block == 0 else 0.0)
            if streamed:
                computed.append(compute_end)
        ends.append(compute_end)
    return ends


@given(on_cpu)
@example(uniform("ddddd", BlockTimes(1.0, 0.5, 0.25)))
def test_the_simulation_equals_the_recursion(schedule: PassSchedule) -> None:
    simulated = simulate(schedule)
    ends = recursion(schedule)
    assert pass_ends(simulated) == close(ends)
    assert simulated.prefill_s == close(ends[0])


@given(slowed)
def test_overlapped_time_lies_between_the_maximum_and_the_sum(schedule: PassSchedule) -> None:
    """With slowdowns of two at most: then doing both at once is no slower than one after the other."""
    simulated = simulate(schedule)
    all_reads_s, work_s = ways_s(schedule, first=True), prefill_work_s(schedule)
    reads_s, _, compute_s = sums(schedule)
    begin_s, end_s = schedule.blocks[0].read_s, schedule.blocks[-1].prefill_s
    slack = 1 + 1e-9
    assert max(all_reads_s + end_s, begin_s + work_s) <= simulated.prefill_s * slack + 1e-9
    ahead_s = 0.0
    if schedule.compute_slowdown > 1.0 or schedule.read_slowdown > 1.0:
        # What is read ahead meanwhile, until all slots are full, may slow the first pass down.
        ahead_s = reads_s * -(-schedule.slots // max(1, schedule.placements.count(DISK)))
    assert simulated.prefill_s <= (all_reads_s + ahead_s + work_s) * slack + 1e-9
    if schedule.decode_passes:
        assert max(reads_s, compute_s) <= simulated.decode_s_per_pass * slack + 1e-9


@given(on_cpu)
def test_the_steady_pass_is_that_of_a_long_run(schedule: PassSchedule) -> None:
    """Five passes say what four hundred do, whatever lead the reader won during prefill."""
    short = simulate(dataclasses.replace(schedule, decode_passes=5)).decode_s_per_pass
    ends = recursion(dataclasses.replace(schedule, decode_passes=400))
    long = (ends[400] - ends[0]) / 400
    lead_s = schedule.slots * max(times.read_s for times in schedule.blocks)
    assert long - lead_s / 400 - 1e-9 <= short <= long + lead_s / 400 + 1e-9


@pytest.mark.parametrize(
    ("decode_s", "letters", "slots", "expected"), [((1.0, 1.0, 1.0), "ddv", 1, 4.5), ((1.0, 0.25), "dd", 2, 2.5)]
)
def test_the_last_pass_too_is_slowed_by_the_reading_that_goes_on(
    decode_s: tuple[float, ...], letters: str, slots: int, expected: float
) -> None:
    schedule = dataclasses.replace(
        uniform(letters, slots=slots, decode_passes=12, compute_slowdown=2.0),
        blocks=tuple(BlockTimes(1.0, 1.0, own_s) for own_s in decode_s),
    )
    ends = pass_ends(simulate(schedule))
    assert [later - earlier for earlier, later in itertools.pairwise(ends[2:])] == close([expected] * 10)
    assert simulate(dataclasses.replace(schedule, decode_passes=5)).decode_s_per_pass == close(expected)


@pytest.mark.parametrize(
    ("decode_s", "overhead_s", "read_slowdown", "compute_slowdown", "expected"),
    [
        (0.9, 0.0, 1.0, 1.0, 4.0),
        (0.9, 0.0, 1.1, 1.05, 4 + 3.78 / 11),
        (0.95, 0.0, 1.1, 1.1, 4.38),
        (0.85, 0.4, 1.1, 1.1, 4.38),
    ],
)
@pytest.mark.parametrize("decode_passes", [1, 2, 4])
def test_a_lead_won_during_prefill_does_not_count(
    decode_s: float,
    overhead_s: float,
    read_slowdown: float,
    compute_slowdown: float,
    expected: float,
    decode_passes: int,
) -> None:
    """With all blocks in slots when decoding begins, the first passes compute what was read before."""
    schedule = uniform(
        "dddd",
        BlockTimes(1.0, 4.0, decode_s),
        slots=4,
        decode_passes=decode_passes,
        pass_overhead_s=overhead_s,
        read_slowdown=read_slowdown,
        compute_slowdown=compute_slowdown,
    )
    simulated = simulate(schedule)
    ends = pass_ends(simulated)
    assert ends[1] - ends[0] < 0.99 * expected
    assert simulated.decode_s_per_pass == close(expected)
    ends = pass_ends(simulate(dataclasses.replace(schedule, decode_passes=40)))
    assert ends[40] - ends[39] == close(expected)


@pytest.mark.parametrize(
    ("read_s", "decode_s", "slots", "expected"),
    [
        (1.0, 0.25, 2, 4.0),  # reading binds: four reads
        (0.25, 1.0, 2, 4.0),  # computing binds
        (1.0, 1.0, 2, 4.0),  # both go on all the time
        (1.0, 1.0, 1, 8.0),  # a single slot is either filled or used
        (0.5, 1.0, 1, 6.0),
    ],
)
def test_uniform_blocks_in_closed_form(read_s: float, decode_s: float, slots: int, expected: float) -> None:
    schedule = uniform("dddd", BlockTimes(read_s, 0.0, decode_s), slots=slots, decode_passes=4)
    assert simulate(schedule).decode_s_per_pass == close(expected)


def test_reading_and_computing_slow_one_another() -> None:
    """Computing takes 1 s alone and 1.5 s while anything is read; reading 2 s alone, 4 s while anything is computed."""
    schedule = uniform("dd", BlockTimes(2.0, 1.0, 1.0), decode_passes=0, compute_slowdown=1.5, read_slowdown=2.0)
    simulated = simulate(schedule)
    # 0 to 2 read the first; 2 to 3.5 compute it, while 0.75 s of the second read are done; 1.25 s more; then compute it
    # while the next pass's first block is being read.
    reads, computes = events_of(simulated, Lane.READ), events_of(simulated, Lane.COMPUTE)
    assert computes[0, 0].end_s == close(3.5)
    assert reads[0, 1].end_s == close(4.75)
    assert simulated.prefill_s == close(6.25)


def test_reads_are_in_cyclic_order() -> None:
    schedule = uniform("dvd", BlockTimes(1.0, 1.5, 1.5), decode_passes=2)
    order = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 2)]
    assert list(events_of(simulate(schedule), Lane.READ)) == [*order, (3, 0)], "and on into the next pass"


# -- what waiting costs ------------------------------------------------------------------------------------------------


@given(schedules(link=False, overlap=False), st.floats(0.001, 0.5), st.floats(0.0, 0.5))
def test_a_sequential_run_pays_for_every_block_that_it_asks_for(
    schedule: PassSchedule, read_latency_s: float, stall_penalty_s: float
) -> None:
    each_s = read_latency_s + stall_penalty_s
    simulated = simulate(dataclasses.replace(schedule, read_latency_s=read_latency_s, stall_penalty_s=stall_penalty_s))
    first_s = ways_s(schedule, first=True) + prefill_work_s(schedule)
    assert simulated.prefill_s == close(first_s + len(schedule.blocks) * each_s)
    if schedule.decode_passes:
        pass_s = ways_s(schedule) + sums(schedule)[2]
        assert simulated.decode_s_per_pass == close(pass_s + schedule.placements.count(DISK) * each_s)


@given(on_cpu, st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_with_waiting_the_simulation_equals_the_recursion(
    schedule: PassSchedule, read_latency_s: float, stall_penalty_s: float
) -> None:
    schedule = dataclasses.replace(schedule, read_latency_s=read_latency_s, stall_penalty_s=stall_penalty_s)
    # Where two moments fall together but for rounding, either may count as the later one.
    if not _moments_coincide(schedule):
        assert pass_ends(simulate(schedule)) == close(recursion(schedule))


def _moments_coincide(schedule: PassSchedule) -> bool:
    """Whether the outcome changes by more than it should when all times change by almost nothing."""
    ends = []
    for factor in (1 - 1e-7, 1 + 1e-7):
        blocks = tuple(times._replace(read_s=times.read_s * factor) for times in schedule.blocks)
        ends.append(pass_ends(simulate(dataclasses.replace(schedule, blocks=blocks))))
    return any(abs(a - b) > 1e-4 * max(1e-3, a) for a, b in zip(*ends, strict=True))


def test_an_overlapped_run_that_never_waits_pays_nothing() -> None:
    """Reading is always the slower: it never stands still, and computing waits for every block."""
    schedule = uniform("dddd", BlockTimes(1.0, 0.5, 0.25), decode_passes=4)
    steady_s = simulate(schedule).decode_s_per_pass
    assert simulate(dataclasses.replace(schedule, read_latency_s=0.1)).decode_s_per_pass == close(steady_s)
    waited = simulate(dataclasses.replace(schedule, stall_penalty_s=0.1))
    assert waited.decode_s_per_pass == close(steady_s)
    spans = [e.duration_s for e in waited.timeline.events if e.lane is Lane.COMPUTE and e.pass_index == 2]
    assert spans == close([0.35] * 4)
