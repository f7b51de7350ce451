"""The simulated pipeline obeys the link, the processor and the slots, and equals an independent recursion."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.planning.simulation.simulator import BlockTimes, Scenario, Simulated, fetch_order, least_s, simulate
from headrace.planning.timeline import Event, Lane

seconds = st.floats(0.001, 10.0) | st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])


@st.composite
def scenarios(draw: st.DrawFn, *, overlap: bool = True, slowdowns: bool = False) -> Scenario:
    count = draw(st.integers(1, 9))
    times = st.builds(BlockTimes, seconds, seconds, seconds)
    slowdown = st.floats(1.0, 2.0) if slowdowns else st.just(1.0)
    return Scenario(
        blocks=tuple(draw(st.lists(times, min_size=count, max_size=count))),
        resident=tuple(draw(st.lists(st.booleans(), min_size=count, max_size=count))),
        slots=draw(st.integers(1, 4)),
        overlap=overlap,
        decode_passes=draw(st.integers(0, 6)),
        pass_overhead_s=draw(st.sampled_from([0.0, 0.1])),
        compute_slowdown=draw(slowdown),
        read_slowdown=draw(slowdown),
    )


def load_s(scenario: Scenario, *, first: bool = False) -> float:
    """Seconds of reading in a pass; the first pass also brings the residents."""
    return sum(t.read_s for t, stays in zip(scenario.blocks, scenario.resident, strict=True) if first or not stays)


def compute_s(scenario: Scenario, *, first: bool = False) -> float:
    return scenario.pass_overhead_s + sum(t.prefill_s if first else t.decode_s for t in scenario.blocks)


def events_of(simulated: Simulated, lane: Lane) -> dict[tuple[int, int], Event]:
    found = {(e.pass_index, e.block_index): e for e in simulated.timeline.events if e.lane is lane}
    assert len(found) == sum(event.lane is lane for event in simulated.timeline.events), "no event twice"
    return found


def pass_ends(simulated: Simulated) -> list[float]:
    computes = simulated.timeline.events
    last_pass = max(event.pass_index for event in computes if event.lane is Lane.COMPUTE)
    return [
        max(e.end_s for e in computes if e.lane is Lane.COMPUTE and e.pass_index == index)
        for index in range(last_pass + 1)
    ]


def recursion(scenario: Scenario) -> list[float]:
    """Return the ends of the passes by `start_j(i) = max(end_j(i-1), end_{j-1}(i), slot_free)`, without events.

    Stage one is the link, stage two the processor; both take the blocks in order. The slot of the n-th streamed block
    is free when the block that is `slots` places before it has been computed.
    """
    ends: list[float] = []
    link_end = processor_end = 0.0
    computed: list[float] = []  # ends of the streamed blocks' computations, in order
    for pass_index in range(1 + scenario.decode_passes):
        for block, (times, stays) in enumerate(zip(scenario.blocks, scenario.resident, strict=True)):
            arrived = 0.0
            if pass_index == 0 or not stays:
                slot_free = 0.0
                if not stays and len(computed) >= scenario.slots:
                    slot_free = computed[-scenario.slots]
                link_end = arrived = max(link_end, slot_free) + times.read_s
            work_s = times.decode_s if pass_index else times.prefill_s
            processor_end = max(processor_end, arrived) + work_s + (scenario.pass_overhead_s if block == 0 else 0.0)
            if not stays:
                computed.append(processor_end)
        ends.append(processor_end)
    return ends


def close(expected: float | list[float]) -> Any:
    return pytest.approx(expected, rel=1e-9, abs=1e-9)


# -- against the recursion and the closed forms ------------------------------------------------------------------------


@given(scenarios())
@example(
    Scenario(blocks=(BlockTimes(1.0, 0.5, 0.25),) * 5, resident=(False,) * 5, slots=2, overlap=True, decode_passes=6)
)
def test_the_event_simulation_equals_the_recursion(scenario: Scenario) -> None:
    simulated = simulate(scenario)
    ends = recursion(scenario)
    assert pass_ends(simulated) == close(ends)
    assert simulated.prefill_s == close(ends[0])


@given(scenarios(overlap=False, slowdowns=True))
def test_sequential_is_the_sum_exactly(scenario: Scenario) -> None:
    simulated = simulate(scenario)
    assert simulated.prefill_s == close(load_s(scenario, first=True) + compute_s(scenario, first=True))
    if scenario.decode_passes:
        assert simulated.decode_s_per_pass == close(load_s(scenario) + compute_s(scenario))
    else:
        assert simulated.decode_s_per_pass == 0.0


@given(scenarios(slowdowns=True))
def test_overlapped_time_lies_between_the_maximum_and_the_sum(scenario: Scenario) -> None:
    """With slowdowns of two at most: then doing both at once is no slower than one after the other."""
    simulated = simulate(scenario)
    first = scenario.blocks[0]
    reads, work = load_s(scenario, first=True), compute_s(scenario, first=True)
    fill_s = first.read_s
    slack = 1 + 1e-9
    assert max(reads + scenario.blocks[-1].prefill_s, fill_s + work) <= simulated.prefill_s * slack + 1e-9
    reads += load_s(scenario) * (
        scenario.decode_passes + 1
    )  # what is read ahead meanwhile may slow the first pass down
    assert simulated.prefill_s <= (reads + work) * slack + 1e-9
    if scenario.decode_passes:
        steady = simulated.decode_s_per_pass
        assert max(load_s(scenario), compute_s(scenario)) <= steady * slack + 1e-9
    if scenario.compute_slowdown == scenario.read_slowdown == 1.0:
        assert simulated.prefill_s <= (load_s(scenario, first=True) + work) * slack + 1e-9


@given(scenarios())
def test_a_steady_pass_lies_between_the_maximum_and_the_sum(scenario: Scenario) -> None:
    if scenario.decode_passes:
        steady = simulate(scenario).decode_s_per_pass
        reads, work = load_s(scenario), compute_s(scenario)
        assert max(reads, work) * (1 - 1e-9) <= steady <= (reads + work) * (1 + 1e-9) + 1e-9


@given(scenarios())
def test_the_steady_pass_is_that_of_a_long_run(scenario: Scenario) -> None:
    """Five passes say what four hundred do, whatever lead the reader won during prefill."""
    short = simulate(dataclasses.replace(scenario, decode_passes=5)).decode_s_per_pass
    ends = recursion(dataclasses.replace(scenario, decode_passes=400))
    long = (ends[400] - ends[0]) / 400
    lead_s = scenario.slots * max(times.read_s for times in scenario.blocks)
    assert long - lead_s / 400 - 1e-9 <= short <= long + lead_s / 400 + 1e-9


@given(scenarios(slowdowns=True))
@settings(max_examples=40, deadline=None)
def test_slowdowns_keep_the_steady_pass_near_that_of_a_long_run(scenario: Scenario) -> None:
    """In the two passes looked at the reader may get ahead, or fall behind, by what the slots hold."""
    passes = 100
    short = simulate(dataclasses.replace(scenario, decode_passes=5)).decode_s_per_pass
    ends = pass_ends(simulate(dataclasses.replace(scenario, decode_passes=passes)))
    lead_s = scenario.slots * max(times.read_s for times in scenario.blocks)
    assert (ends[passes] - ends[0]) / passes == pytest.approx(short, abs=lead_s / 2 + 2 * lead_s / passes + 1e-9)


@pytest.mark.parametrize(
    ("decode_s", "resident", "slots", "expected"),
    [((1.0, 1.0, 1.0), (False, False, True), 1, 4.5), ((1.0, 0.25), (False, False), 2, 2.5)],
)
def test_the_last_pass_too_is_slowed_by_the_reading_that_goes_on(
    decode_s: tuple[float, ...], resident: tuple[bool, ...], slots: int, expected: float
) -> None:
    blocks = tuple(BlockTimes(1.0, 1.0, seconds) for seconds in decode_s)
    scenario = Scenario(
        blocks=blocks, resident=resident, slots=slots, overlap=True, decode_passes=12, compute_slowdown=2.0
    )
    ends = pass_ends(simulate(scenario))
    assert [later - earlier for earlier, later in itertools.pairwise(ends[2:])] == close([expected] * 10)
    assert simulate(dataclasses.replace(scenario, decode_passes=5)).decode_s_per_pass == close(expected)


@pytest.mark.parametrize(
    ("decode_s", "overhead_s", "read_slowdown", "compute_slowdown", "expected"),
    [
        (0.9, 0.0, 1.0, 1.0, 4.0),
        (0.9, 0.0, 1.1, 1.05, 4 + 3.78 / 11),
        (0.95, 0.0, 1.1, 1.1, 4.38),
        (0.85, 0.4, 1.1, 1.1, 4.38),
    ],
)
def test_a_lead_won_during_prefill_does_not_count(
    decode_s: float, overhead_s: float, read_slowdown: float, compute_slowdown: float, expected: float
) -> None:
    """With all blocks in slots when decoding begins, the first passes compute what was read before."""
    scenario = Scenario(
        blocks=(BlockTimes(1.0, 4.0, decode_s),) * 4,
        resident=(False,) * 4,
        slots=4,
        overlap=True,
        pass_overhead_s=overhead_s,
        read_slowdown=read_slowdown,
        compute_slowdown=compute_slowdown,
    )
    simulated = simulate(scenario)
    ends = pass_ends(simulated)
    assert ends[1] - ends[0] < 0.99 * expected
    assert simulated.decode_s_per_pass == close(expected)
    ends = pass_ends(simulate(dataclasses.replace(scenario, decode_passes=40)))
    assert ends[40] - ends[39] == close(expected)


@pytest.mark.parametrize(
    ("read_s", "compute_s", "read_slowdown", "compute_slowdown", "expected"),
    [
        (3.0, 2.0, 1.0, 1.0, 3.0),
        (2.0, 3.0, 1.0, 1.0, 3.0),
        (3.0, 2.0, 2.0, 2.0, 5.0),
        (3.0, 2.0, 9.0, 9.0, 5.0),
        (10.0, 2.0, 1.0, 1.5, 10.0),  # computing 2 s takes 3 s while reading goes on at full speed
        (10.0, 2.0, 1.25, 1.0, 10.4),  # in the 2 s of computing 1.6 s of reading are done
        (2.0, 9.0, 1.0, 1.5, 9 + 2 / 3),  # in the 2 s of reading a third of computing is lost
        (0.0, 2.0, 1.5, 1.5, 2.0),
    ],
)
def test_the_least_time_of_doing_both(
    read_s: float, compute_s: float, read_slowdown: float, compute_slowdown: float, expected: float
) -> None:
    assert least_s(read_s, compute_s, read_slowdown, compute_slowdown) == pytest.approx(expected)


@given(scenarios(slowdowns=True))
def test_overlap_is_never_slower_than_sequential(scenario: Scenario) -> None:
    """But for the reading that goes on at the end, for a pass that does not come, where that slows computing down."""
    sequential_s = pass_ends(simulate(dataclasses.replace(scenario, overlap=False)))[-1]
    in_vain_s = scenario.slots * max(times.read_s for times in scenario.blocks)
    if scenario.compute_slowdown == 1.0 or all(scenario.resident):
        in_vain_s = 0.0
    assert pass_ends(simulate(scenario))[-1] <= (sequential_s + in_vain_s) * (1 + 1e-9) + 1e-9


@given(scenarios())
def test_more_slots_are_never_slower(scenario: Scenario) -> None:
    more = simulate(dataclasses.replace(scenario, slots=scenario.slots + 1))
    fewer = simulate(scenario)
    for later, earlier in zip(pass_ends(fewer), pass_ends(more), strict=True):
        assert earlier <= later * (1 + 1e-9) + 1e-9
    assert more.decode_s_per_pass <= fewer.decode_s_per_pass * (1 + 1e-9) + 1e-9


@given(scenarios(), st.integers(0, 8))
def test_one_more_resident_is_never_slower(scenario: Scenario, block: int) -> None:
    flags = list(scenario.resident)
    flags[block % len(flags)] = True
    more = simulate(dataclasses.replace(scenario, resident=tuple(flags)))
    for later, earlier in zip(pass_ends(simulate(scenario)), pass_ends(more), strict=True):
        assert earlier <= later * (1 + 1e-9) + 1e-9


@given(scenarios(slowdowns=True), st.booleans())
def test_without_streamed_bytes_only_computing_counts(scenario: Scenario, overlap: bool) -> None:
    everything = dataclasses.replace(scenario, resident=(True,) * len(scenario.blocks), overlap=overlap)
    simulated = simulate(everything)
    if everything.decode_passes:
        assert simulated.decode_s_per_pass == close(compute_s(everything))
    assert {p for p, _ in events_of(simulated, Lane.READ)} == {0}


@pytest.mark.parametrize(
    ("read_s", "decode_s", "slots", "expected"),
    [
        (1.0, 0.25, 2, 4.0),  # the link binds: four reads
        (0.25, 1.0, 2, 4.0),  # the processor binds
        (1.0, 1.0, 2, 4.0),  # both are busy all the time
        (1.0, 1.0, 1, 8.0),  # a single slot is either filled or used
        (0.5, 1.0, 1, 6.0),
    ],
)
def test_uniform_blocks_in_closed_form(read_s: float, decode_s: float, slots: int, expected: float) -> None:
    scenario = Scenario(
        blocks=(BlockTimes(read_s, 0.0, decode_s),) * 4, resident=(False,) * 4, slots=slots, overlap=True
    )
    assert simulate(scenario).decode_s_per_pass == pytest.approx(expected)


def test_reading_and_computing_slow_one_another() -> None:
    """Computing takes 1 s alone and 1.5 s while the link is busy; reading 2 s alone, 4 s while computing."""
    scenario = Scenario(
        blocks=(BlockTimes(2.0, 1.0, 1.0), BlockTimes(2.0, 1.0, 1.0)),
        resident=(False, False),
        slots=2,
        overlap=True,
        decode_passes=0,
        compute_slowdown=1.5,
        read_slowdown=2.0,
    )
    simulated = simulate(scenario)
    # 0 to 2 read the first; 2 to 3.5 compute it, while 0.75 s of the second read are done; 1.25 s more; then compute it
    # while the next pass's first block is being read.
    reads, computes = events_of(simulated, Lane.READ), events_of(simulated, Lane.COMPUTE)
    assert computes[0, 0].end_s == pytest.approx(3.5)
    assert reads[0, 1].end_s == pytest.approx(4.75)
    assert simulated.prefill_s == pytest.approx(6.25)


# -- what the timeline must obey ---------------------------------------------------------------------------------------


@given(scenarios(slowdowns=True), st.booleans())
def test_every_block_is_there_before_it_is_computed(scenario: Scenario, overlap: bool) -> None:
    simulated = simulate(dataclasses.replace(scenario, overlap=overlap))
    reads, computes = events_of(simulated, Lane.READ), events_of(simulated, Lane.COMPUTE)
    passes = range(1 + scenario.decode_passes)
    assert computes.keys() == {(index, block) for index in passes for block in range(len(scenario.blocks))}
    for (pass_index, block), compute in computes.items():
        read = reads[0 if scenario.resident[block] else pass_index, block]
        assert read.end_s <= compute.start_s
        if not overlap and (pass_index == 0 or not scenario.resident[block]):
            before = (pass_index, block - 1) if block else (pass_index - 1, len(scenario.blocks) - 1)
            if before in computes:
                assert read.start_s >= computes[before].end_s, "nothing is read before its turn"


@given(scenarios(slowdowns=True), st.booleans())
def test_never_more_slots_are_held_than_there_are(scenario: Scenario, overlap: bool) -> None:
    simulated = simulate(dataclasses.replace(scenario, overlap=overlap))
    computes = events_of(simulated, Lane.COMPUTE)
    changes: list[tuple[float, int]] = []
    for (pass_index, block), read in events_of(simulated, Lane.READ).items():
        if not scenario.resident[block]:
            used_until = computes[pass_index, block].end_s if (pass_index, block) in computes else math.inf
            assert used_until >= read.end_s
            changes += [(read.start_s, 1), (used_until, -1)]
    held = most = 0
    for _, change in sorted(changes):  # at one moment a slot is given back before it is taken
        held += change
        most = max(most, held)
    assert most <= scenario.slots


@given(scenarios(slowdowns=True), st.booleans())
def test_link_and_processor_do_one_thing_at_a_time(scenario: Scenario, overlap: bool) -> None:
    simulated = simulate(dataclasses.replace(scenario, overlap=overlap))
    for lanes in ((Lane.READ,), (Lane.COMPUTE, Lane.STALL)):
        reached = 0.0
        for event in (event for event in simulated.timeline.events if event.lane in lanes):
            assert reached <= event.start_s <= event.end_s
            reached = event.end_s
    for (pass_index, block), read in events_of(simulated, Lane.READ).items():
        alone_s = scenario.blocks[block].read_s
        assert alone_s - 1e-9 <= read.duration_s <= alone_s * scenario.read_slowdown + 1e-9, (pass_index, block)
    for (pass_index, block), compute in events_of(simulated, Lane.COMPUTE).items():
        times = scenario.blocks[block]
        alone_s = (times.decode_s if pass_index else times.prefill_s) + (scenario.pass_overhead_s if block == 0 else 0)
        assert alone_s - 1e-9 <= compute.duration_s <= alone_s * scenario.compute_slowdown + 1e-9


@given(scenarios(slowdowns=True), st.booleans())
def test_computing_and_stalling_fill_the_run(scenario: Scenario, overlap: bool) -> None:
    simulated = simulate(dataclasses.replace(scenario, overlap=overlap))
    timeline = simulated.timeline
    assert timeline.busy_s(Lane.COMPUTE) + timeline.busy_s(Lane.STALL) == close(pass_ends(simulated)[-1])


def test_names_are_those_given() -> None:
    scenario = Scenario(blocks=(BlockTimes(1, 1, 1),) * 2, resident=(False, False), slots=1, overlap=True)
    assert simulate(scenario).timeline.block_names == ("block 0", "block 1")
    assert simulate(scenario, ["first", "second"]).timeline.block_names == ("first", "second")


def test_reads_are_in_cyclic_order() -> None:
    order = [(fetch.pass_index, fetch.block_index) for fetch in fetch_order([False, True, False], 3)]
    assert order == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 2)]
    scenario = Scenario(
        blocks=(BlockTimes(1.0, 1.5, 1.5),) * 3, resident=(False, True, False), slots=2, overlap=True, decode_passes=2
    )
    assert list(events_of(simulate(scenario), Lane.READ)) == [*order, (3, 0)], "and on into the next pass"


def test_no_slot_for_a_streamed_block_is_an_error_not_a_hang() -> None:
    scenario = Scenario(blocks=(BlockTimes(1, 1, 1),), resident=(False,), slots=0, overlap=True)
    with pytest.raises(AssertionError, match="cannot go on"):
        simulate(scenario)


# -- what waiting costs ------------------------------------------------------------------------------------------------


def waiting(scenario: Scenario, *, read_latency_s: float, stall_penalty_s: float) -> Scenario:
    return dataclasses.replace(scenario, read_latency_s=read_latency_s, stall_penalty_s=stall_penalty_s)


@given(scenarios(overlap=False), st.floats(0.001, 0.5), st.floats(0.0, 0.5))
def test_a_sequential_run_pays_for_every_block_that_it_asks_for(
    scenario: Scenario, read_latency_s: float, stall_penalty_s: float
) -> None:
    simulated = simulate(waiting(scenario, read_latency_s=read_latency_s, stall_penalty_s=stall_penalty_s))
    each_s, streamed = read_latency_s + stall_penalty_s, scenario.resident.count(False)
    first_s = load_s(scenario, first=True) + compute_s(scenario, first=True)
    assert simulated.prefill_s == close(first_s + len(scenario.blocks) * each_s)
    if scenario.decode_passes:
        assert simulated.decode_s_per_pass == close(load_s(scenario) + compute_s(scenario) + streamed * each_s)


@given(scenarios(), st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_with_waiting_the_simulation_equals_the_recursion(
    scenario: Scenario, read_latency_s: float, stall_penalty_s: float
) -> None:
    """A read pays when its slot came free after the link did, a computation when its block came after the processor."""
    scenario = waiting(scenario, read_latency_s=read_latency_s, stall_penalty_s=stall_penalty_s)
    ends: list[float] = []
    link_end = processor_end = 0.0
    computed: list[float] = []
    for pass_index in range(1 + scenario.decode_passes):
        for block, (times, stays) in enumerate(zip(scenario.blocks, scenario.resident, strict=True)):
            arrived = 0.0
            if pass_index == 0 or not stays:
                slot_free = computed[-scenario.slots] if not stays and len(computed) >= scenario.slots else 0.0
                pays_s = read_latency_s if slot_free > link_end else 0.0
                link_end = arrived = max(link_end, slot_free) + pays_s + times.read_s
            work_s = (times.decode_s if pass_index else times.prefill_s) + (
                stall_penalty_s if arrived > processor_end else 0.0
            )
            processor_end = max(processor_end, arrived) + work_s + (scenario.pass_overhead_s if block == 0 else 0.0)
            if not stays:
                computed.append(processor_end)
        ends.append(processor_end)
    # Where two moments fall together but for rounding, either may count as the later one.
    if not _moments_coincide(scenario):
        assert pass_ends(simulate(scenario)) == close(ends)


def _moments_coincide(scenario: Scenario) -> bool:
    """Whether the outcome changes by more than it should when all times change by almost nothing."""
    ends = []
    for factor in (1 - 1e-7, 1 + 1e-7):
        blocks = tuple(BlockTimes(t.read_s * factor, t.prefill_s, t.decode_s) for t in scenario.blocks)
        ends.append(pass_ends(simulate(dataclasses.replace(scenario, blocks=blocks))))
    return any(abs(a - b) > 1e-4 * max(1e-3, a) for a, b in zip(*ends, strict=True))


def test_an_overlapped_run_that_never_waits_pays_nothing() -> None:
    """The link is always the slower: it never stands still, and the processor is woken for every block."""
    block = BlockTimes(1.0, 0.5, 0.25)
    scenario = Scenario(blocks=(block,) * 4, resident=(False,) * 4, slots=2, overlap=True, decode_passes=4)
    steady_s = simulate(scenario).decode_s_per_pass
    assert simulate(waiting(scenario, read_latency_s=0.1, stall_penalty_s=0.0)).decode_s_per_pass == close(steady_s)
    assert simulate(waiting(scenario, read_latency_s=0.0, stall_penalty_s=0.1)).decode_s_per_pass == close(steady_s)
    one = simulate(waiting(scenario, read_latency_s=0.0, stall_penalty_s=0.1))
    spans = {e.block_index: e.duration_s for e in one.timeline.events if e.lane is Lane.COMPUTE and e.pass_index == 2}
    assert list(spans.values()) == close([0.35] * 4)


def test_the_first_pass_may_take_longer_beside_its_blocks() -> None:
    scenario = Scenario(
        blocks=(BlockTimes(1.0, 2.0, 0.5),) * 2,
        resident=(True, True),
        slots=0,
        overlap=True,
        pass_overhead_s=0.25,
        first_pass_overhead_s=3.0,
    )
    simulated = simulate(scenario)
    assert simulated.prefill_s == close(1.0 + 3.0 + 4.0)
    assert simulated.decode_s_per_pass == close(1.25)
    same = simulate(dataclasses.replace(scenario, first_pass_overhead_s=None))
    assert same.prefill_s == close(1.0 + 0.25 + 4.0)
