"""The simulated accelerator obeys disk, link, slots and the order of blocks, and agrees with two other simulators.

With a link that takes no time it is the processor's pipeline (`simulator.py`); with one that takes time it is held
against the event core, where every piece is a task of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from headrace.planning.plan import TRAVELLING, Placement
from headrace.planning.simulation.event_core import Schedule
from headrace.planning.simulation.one_copy import TieredScenario, TieredTimes, simulate_tiers
from headrace.planning.simulation.simulator import BlockTimes, Scenario, Simulated, simulate
from headrace.planning.timeline import Event, Lane

DEVICE, HOST, DISK, PROCESSOR = Placement.DEVICE, Placement.HOST, Placement.DISK, Placement.CPU

anywhere = st.sampled_from(Placement)
seconds = st.floats(0.001, 10.0) | st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])


@st.composite
def scenarios(
    draw: st.DrawFn,
    *,
    places: st.SearchStrategy[Placement] = anywhere,
    overlap: bool = True,
    copies: st.SearchStrategy[float] = seconds,
    staged: bool = False,
) -> TieredScenario:
    count = draw(st.integers(1, 8))
    times = st.builds(
        TieredTimes,
        read_s=seconds,
        copy_s=copies,
        prefill_s=seconds,
        decode_s=seconds,
        store_s=st.sampled_from([0.0, 0.1, 1.0]),
        stage_s=st.sampled_from([0.0, 0.5, 2.0]) if staged else st.just(0.0),
        pieces=st.integers(1, 12),
    )
    return TieredScenario(
        blocks=tuple(draw(st.lists(times, min_size=count, max_size=count))),
        places=tuple(draw(st.lists(places, min_size=count, max_size=count))),
        slots=draw(st.integers(1, 4)),
        overlap=overlap,
        ring_pieces=draw(st.integers(2, 6)),
        decode_passes=draw(st.integers(0, 5)),
        pass_overhead_s=draw(st.sampled_from([0.0, 0.1])),
        first_pass_overhead_s=draw(st.sampled_from([None, 0.3])),
    )


def uniform(
    places: str, *, slots: int = 2, overlap: bool = True, decode_passes: int = 6, **times: Any
) -> TieredScenario:
    """Blocks that are all alike: v(ideo memory), h(ost), d(isk), p(rocessor)."""
    letters = {"v": DEVICE, "h": HOST, "d": DISK, "p": PROCESSOR}
    own = TieredTimes(**{"read_s": 1.0, "copy_s": 0.25, "prefill_s": 0.5, "decode_s": 0.125, **times})
    return TieredScenario(
        blocks=(own,) * len(places),
        places=tuple(letters[letter] for letter in places),
        slots=slots,
        overlap=overlap,
        decode_passes=decode_passes,
    )


patient = settings(deadline=None)


def close(expected: float | list[float]) -> Any:
    return pytest.approx(expected, rel=1e-9, abs=1e-7)


def events_of(simulated: Simulated, lane: Lane) -> dict[tuple[int, int], Event]:
    found = {(e.pass_index, e.block_index): e for e in simulated.timeline.events if e.lane is lane}
    assert len(found) == sum(event.lane is lane for event in simulated.timeline.events), "no event twice"
    return found


def pass_ends(simulated: Simulated) -> list[float]:
    computed = events_of(simulated, Lane.COMPUTE)
    passes = 1 + max(pass_index for pass_index, _ in computed)
    return [max(event.end_s for (own, _), event in computed.items() if own == index) for index in range(passes)]


def way_s(times: TieredTimes, place: Placement, *, first: bool = False) -> float:
    """Seconds from the request of a block until it is there, when nothing else is going on."""

    def piped(one: float, other: float) -> float:
        return max(one, other) + min(one, other) / times.pieces

    if first and place is PROCESSOR:
        return piped(times.read_s, times.store_s)
    if place is HOST:
        sent = piped(times.stage_s, times.copy_s) if times.stage_s else times.copy_s
        return sent + (piped(times.read_s, times.store_s) if first else 0.0)
    return piped(times.read_s, times.copy_s) if first or place is DISK else 0.0


def sums(scenario: TieredScenario) -> tuple[float, float, float]:
    """Return the seconds of readers, link and computing in a decode pass, counted once more."""
    placed = list(zip(scenario.blocks, scenario.places, strict=True))
    return (
        sum(t.read_s for t, place in placed if place is DISK) + sum(t.stage_s for t, place in placed if place is HOST),
        sum(t.copy_s for t, place in placed if place in TRAVELLING),
        scenario.pass_overhead_s + sum(t.decode_s for t, _ in placed),
    )


# -- against closed forms ----------------------------------------------------------------------------------------------


@given(scenarios(overlap=False, staged=True))
@patient
def test_sequential_is_the_sum_exactly(scenario: TieredScenario) -> None:
    simulated = simulate_tiers(scenario)
    placed = list(zip(scenario.blocks, scenario.places, strict=True))
    ways_s = sum(way_s(times, place, first=True) for times, place in placed)
    prefill_s = sum(times.prefill_s for times, _ in placed)
    assert simulated.prefill_s == close(ways_s + prefill_s + scenario.overhead_s(0))
    if scenario.decode_passes:
        ways_s = sum(way_s(times, place) for times, place in placed)
        assert simulated.decode_s_per_pass == close(ways_s + sums(scenario)[2])
    else:
        assert simulated.decode_s_per_pass == 0.0


@given(scenarios(staged=True))
@patient
def test_a_steady_pass_lies_between_the_maximum_and_the_sum(scenario: TieredScenario) -> None:
    """The link may have brought too early what is wanted in a pass after those looked at, if both lanes are used."""
    if scenario.decode_passes:
        steady = simulate_tiers(scenario).decode_s_per_pass
        assert max(sums(scenario)) * (1 - 1e-9) <= steady
        passes = 1 + scenario.decode_passes
        early_s = scenario.slots * max(times.copy_s for times in scenario.blocks) if HOST in scenario.places else 0.0
        looked_at = scenario.decode_passes - (passes // 2 if passes > 2 else 0)
        assert steady <= sum(sums(scenario)) * (1 + 1e-9) + early_s / looked_at + 1e-7


@given(scenarios())
@settings(max_examples=30, deadline=None)
def test_in_the_long_run_a_pass_takes_no_longer_than_the_sum(scenario: TieredScenario) -> None:
    ends = pass_ends(simulate_tiers(dataclasses.replace(scenario, decode_passes=60)))
    early_s = scenario.slots * max(times.copy_s for times in scenario.blocks)
    assert (ends[60] - ends[0]) / 60 <= sum(sums(scenario)) * (1 + 1e-9) + early_s / 60 + 1e-7


@given(scenarios())
@patient
def test_the_first_pass_lies_between_the_maximum_and_the_sum(scenario: TieredScenario) -> None:
    placed = list(zip(scenario.blocks, scenario.places, strict=True))
    reads_s = sum(times.read_s for times, _ in placed)
    copies_s = sum(times.copy_s for times, place in placed if place is not PROCESSOR)
    stores_s = sum(times.store_s for times, place in placed if place in (HOST, PROCESSOR))
    compute_s = scenario.overhead_s(0) + sum(times.prefill_s for times, _ in placed)
    prefill_s = simulate_tiers(scenario).prefill_s
    first_way_s = way_s(scenario.blocks[0], scenario.places[0], first=True)
    least_s = max(reads_s + scenario.blocks[-1].prefill_s, copies_s, first_way_s + compute_s)
    assert least_s * (1 - 1e-9) - 1e-7 <= prefill_s
    ahead_s = scenario.slots * sum(sums(scenario)[:2])  # what is brought for the next passes takes some of the link
    assert prefill_s <= (reads_s + copies_s + stores_s + compute_s + ahead_s) * (1 + 1e-9) + 1e-7


@given(scenarios())
@settings(max_examples=50, deadline=None)
def test_the_steady_pass_is_that_of_a_long_run(scenario: TieredScenario) -> None:
    """In the few passes looked at, disk and link may get ahead, or fall behind, by what the slots hold."""
    passes = 60
    short = simulate_tiers(dataclasses.replace(scenario, decode_passes=5)).decode_s_per_pass
    ends = pass_ends(simulate_tiers(dataclasses.replace(scenario, decode_passes=passes)))
    lead_s = scenario.slots * max(times.read_s + times.copy_s for times in scenario.blocks)
    assert (ends[passes] - ends[0]) / passes == pytest.approx(short, abs=lead_s / 2 + 2 * lead_s / passes + 1e-6)


@pytest.mark.parametrize(
    ("scenario", "expected_s"),
    [
        (uniform("dddd"), 4.0),  # the disk binds
        (uniform("hhhh"), 1.0),  # the link
        (uniform("hhhh", decode_s=0.5), 2.0),  # the device
        (uniform("hhhh", slots=1), 1.5),  # a single slot is either filled or used
        (uniform("dddd", slots=1, pieces=4), 4 * (1.0 + 0.25 / 4 + 0.125)),
        (uniform("vhvh"), 0.5),  # half of them stay
        (uniform("phph"), 0.5),  # the processor's travel as little
        (uniform("vvpp"), 0.5),
        (uniform("hdhd", slots=3), 2.0),  # the link brings others while the disk brings one
        (uniform("hdhd"), 2 * (1.0 + 0.25 / 8 + 0.125)),  # but with two slots the disk waits for its own
        (uniform("dddd", read_s=0.25, copy_s=1.0), 4.0),  # a slow link
        (uniform("hhhh", stage_s=0.5), 2.0),  # stores that are not page-locked: the readers bind
        (uniform("hdhd", slots=3, stage_s=0.5), 3.0),  # who also have to read
    ],
)
def test_uniform_blocks_in_closed_form(scenario: TieredScenario, expected_s: float) -> None:
    assert simulate_tiers(scenario).decode_s_per_pass == close(expected_s)


@pytest.mark.parametrize("decode_passes", [1, 2, 4])
def test_a_lead_won_during_prefill_does_not_count(decode_passes: int) -> None:
    """With all blocks in slots when decoding begins, the first passes compute what was read before."""
    scenario = uniform("dddd", slots=4, prefill_s=4.0, decode_s=0.9, copy_s=0.0, decode_passes=decode_passes)
    simulated = simulate_tiers(scenario)
    ends = pass_ends(simulated)
    assert ends[1] - ends[0] < 0.99 * 4.0
    assert simulated.decode_s_per_pass == close(4.0)


def test_fewer_blocks_than_slots_wait_for_their_stores() -> None:
    """The second visit's slot is free at once, but there is nothing to copy yet."""
    copies = events_of(simulate_tiers(uniform("h", slots=2, decode_passes=1)), Lane.COPY)
    assert [copies[index, 0].start_s for index in (0, 1)] == close([1.0, 1.25])


# -- against the processor's pipeline ----------------------------------------------------------------------------------


def without_link(scenario: TieredScenario) -> Scenario:
    return Scenario(
        blocks=tuple(BlockTimes(t.read_s, t.prefill_s, t.decode_s) for t in scenario.blocks),
        resident=tuple(place is DEVICE for place in scenario.places),
        slots=scenario.slots,
        overlap=scenario.overlap,
        decode_passes=scenario.decode_passes,
        pass_overhead_s=scenario.pass_overhead_s,
        first_pass_overhead_s=scenario.first_pass_overhead_s,
        read_latency_s=scenario.read_latency_s,
        stall_penalty_s=scenario.stall_penalty_s,
    )


disk_only = st.sampled_from([DEVICE, DISK])


@given(st.booleans().flatmap(lambda o: scenarios(places=disk_only, overlap=o, copies=st.just(0.0))))
@patient
def test_with_a_link_that_takes_no_time_it_is_the_processors_pipeline(scenario: TieredScenario) -> None:
    own, other = simulate_tiers(scenario), simulate(without_link(scenario))
    assert pass_ends(own) == close(pass_ends(other))
    assert own.decode_s_per_pass == close(other.decode_s_per_pass)
    for lane in (Lane.READ, Lane.COMPUTE):
        ours, theirs = events_of(own, lane), events_of(other, lane)
        for key in ours.keys() & theirs.keys():
            assert ours[key].start_s == close(theirs[key].start_s)
            assert ours[key].end_s == close(theirs[key].end_s)


@given(scenarios(places=disk_only, copies=st.just(0.0)), st.floats(0.01, 0.5), st.floats(0.0, 0.5))
@patient
def test_waiting_costs_what_it_costs_the_processor(
    scenario: TieredScenario, read_latency_s: float, stall_penalty_s: float
) -> None:
    scenario = dataclasses.replace(scenario, read_latency_s=read_latency_s, stall_penalty_s=stall_penalty_s)
    expected = pass_ends(simulate(without_link(scenario)))
    # Where two moments fall together but for rounding, either may count as the later one.
    for factor in (1 - 1e-7, 1 + 1e-7):
        blocks = tuple(times._replace(read_s=times.read_s * factor) for times in scenario.blocks)
        moved = pass_ends(simulate(without_link(dataclasses.replace(scenario, blocks=blocks))))
        assume(all(abs(a - b) < 1e-4 * max(1e-3, a) for a, b in zip(moved, expected, strict=True)))
    assert pass_ends(simulate_tiers(scenario)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(scenarios(places=disk_only, copies=st.floats(0.0, 1e-3)))
@patient
def test_with_a_fast_link_it_is_nearly_that(scenario: TieredScenario) -> None:
    blocks = tuple(times._replace(read_s=max(times.read_s, 0.01)) for times in scenario.blocks)
    scenario = dataclasses.replace(scenario, blocks=blocks)
    own, other = simulate_tiers(scenario), simulate(without_link(scenario))
    copied = len(scenario.blocks) * (1 + scenario.decode_passes)
    for ours, theirs in zip(pass_ends(own), pass_ends(other), strict=True):
        assert theirs - 1e-7 <= ours <= theirs + copied * 1e-3


@given(scenarios(places=st.sampled_from([HOST, PROCESSOR, DEVICE])))
@patient
def test_with_nothing_on_the_disk_the_link_takes_the_disks_part(scenario: TieredScenario) -> None:
    """In the steady state: the first pass reads everything."""
    if not scenario.decode_passes:
        return
    own = simulate_tiers(dataclasses.replace(scenario, decode_passes=40)).decode_s_per_pass
    linked = Scenario(
        blocks=tuple(BlockTimes(t.copy_s, t.prefill_s, t.decode_s) for t in scenario.blocks),
        resident=tuple(place is not HOST for place in scenario.places),
        slots=scenario.slots,
        overlap=True,
        decode_passes=40,
        pass_overhead_s=scenario.pass_overhead_s,
    )
    lead_s = scenario.slots * max(times.copy_s for times in scenario.blocks)
    assert own == pytest.approx(simulate(linked).decode_s_per_pass, abs=lead_s / 18 + 1e-6)


# -- against the event core: every piece a task ------------------------------------------------------------------------


@st.composite
def sized_scenarios(draw: st.DrawFn) -> tuple[TieredScenario, float]:
    """Blocks of some pieces of one size, all over the same disk and link; and the seconds of a piece on both."""
    read_s, copy_s = draw(st.sampled_from([(0.1, 0.02), (0.1, 0.05), (0.1, 0.08), (0.05, 0.1), (0.1, 0.1)]))
    count = draw(st.integers(1, 7))
    blocks = []
    for _ in range(count):
        pieces = draw(st.sampled_from([4, 8, 12, 16]))
        compute = draw(st.sampled_from([0.01, 0.3, 1.0]))
        blocks.append(TieredTimes(pieces * read_s, pieces * copy_s, 2 * compute, compute, pieces=pieces))
    scenario = TieredScenario(
        blocks=tuple(blocks),
        places=tuple(draw(st.lists(st.sampled_from(Placement), min_size=count, max_size=count))),
        slots=draw(st.integers(1, 4)),
        overlap=draw(st.booleans()),
        decode_passes=draw(st.integers(0, 5)),
        pass_overhead_s=0.1,
    )
    return scenario, read_s + copy_s


def on_event_core(scenario: TieredScenario) -> list[float]:
    """Return the ends of the passes when readers, two lanes of copies, ring and slots are put as tasks."""
    schedule = Schedule(capacities={"link": 1.0}, slots={"slot": scenario.slots, "ring": scenario.ring_pieces})
    computed: list[int] = []

    def bring(pass_index: int, block: int) -> int:
        times, place = scenario.blocks[block], scenario.places[block]
        asked = schedule.add(
            "requests",
            after=[] if scenario.overlap else computed[-1:],
            takes="slot" if place in TRAVELLING else None,
        )
        if place in (HOST, PROCESSOR):
            if pass_index == 0:
                asked = schedule.add("readers", times.read_s, after=[asked])
            if place is PROCESSOR:
                return asked
            return schedule.add("stores", size_bytes=times.copy_s, path=["link"], after=[asked])
        copied = asked
        for _ in range(times.pieces):
            read = schedule.add("readers", times.read_s / times.pieces, after=[asked], takes="ring")
            size = times.copy_s / times.pieces
            copied = schedule.add("ring", size_bytes=size, path=["link"], after=[read], gives="ring")
        return copied

    ends = []
    for pass_index in range(1 + scenario.decode_passes):
        for block, (times, place) in enumerate(zip(scenario.blocks, scenario.places, strict=True)):
            there = [bring(pass_index, block)] if pass_index == 0 or place in TRAVELLING else []
            work_s = times.decode_s if pass_index else times.prefill_s
            work_s += scenario.pass_overhead_s if block == 0 else 0.0
            gives = "slot" if place in TRAVELLING else None
            computed.append(schedule.add("compute", work_s, after=[*there, *computed[-1:]], gives=gives))
        ends.append(computed[-1])
    if scenario.overlap:  # readers go on into a pass that does not come
        travelling = [block for block, place in enumerate(scenario.places) if place in TRAVELLING]
        for block in travelling[: scenario.slots]:
            bring(1 + scenario.decode_passes, block)
    outcome = schedule.run()
    return [outcome.ends[number] for number in ends]


@given(sized_scenarios())
@settings(max_examples=60, deadline=None)
def test_flowing_bytes_agree_with_pieces_on_the_event_core(case: tuple[TieredScenario, float]) -> None:
    """To within some pieces in each pass."""
    scenario, piece_s = case
    simulated = simulate_tiers(scenario)
    assume(scenario.slots <= max(1, sum(place in TRAVELLING for place in scenario.places)))
    # On the core a copy of the next pass cannot get ahead of one of the first pass, whose store is not whole yet.
    sent = [e for e in simulated.timeline.events if e.lane is Lane.COPY and scenario.places[e.block_index] is HOST]
    assume(sent == sorted(sent, key=lambda event: (event.pass_index, event.block_index)))
    for number, (ours, theirs) in enumerate(zip(pass_ends(simulated), on_event_core(scenario), strict=True), start=1):
        assert ours == pytest.approx(theirs, abs=(2 + number) * piece_s, rel=0.01)


# -- what more memory does ---------------------------------------------------------------------------------------------


@given(scenarios(places=st.sampled_from([DEVICE, DISK, PROCESSOR])))
@patient
def test_more_slots_are_never_slower(scenario: TieredScenario) -> None:
    more = simulate_tiers(dataclasses.replace(scenario, slots=scenario.slots + 1))
    fewer = simulate_tiers(scenario)
    for later, earlier in zip(pass_ends(fewer), pass_ends(more), strict=True):
        assert earlier <= later * (1 + 1e-9) + 1e-7


@given(scenarios())
@patient
def test_more_slots_lose_no_more_than_they_bring_too_early(scenario: TieredScenario) -> None:
    """Two lanes share the link, so that what is wanted later may take it from what is wanted now."""
    more = simulate_tiers(dataclasses.replace(scenario, slots=scenario.slots + 1))
    fewer = simulate_tiers(scenario)
    early_s = (scenario.slots + 1) * max(times.copy_s for times in scenario.blocks)
    for later, earlier in zip(pass_ends(fewer), pass_ends(more), strict=True):
        assert earlier <= later + early_s + 1e-7


@given(scenarios(places=st.sampled_from([DEVICE, DISK, PROCESSOR])), st.integers(0, 7))
@patient
def test_one_more_resident_is_never_slower(scenario: TieredScenario, block: int) -> None:
    places = list(scenario.places)
    assume(places[block % len(places)] is not PROCESSOR)
    places[block % len(places)] = DEVICE
    more = simulate_tiers(dataclasses.replace(scenario, places=tuple(places)))
    for later, earlier in zip(pass_ends(simulate_tiers(scenario)), pass_ends(more), strict=True):
        assert earlier <= later * (1 + 1e-9) + 1e-7


@given(scenarios(places=st.sampled_from([DEVICE, DISK, PROCESSOR])))
@patient
def test_overlap_is_never_slower_than_sequential(scenario: TieredScenario) -> None:
    plain = pass_ends(simulate_tiers(dataclasses.replace(scenario, overlap=False)))
    assert pass_ends(simulate_tiers(scenario))[-1] <= plain[-1] * (1 + 1e-9) + 1e-7


# -- what the timeline must obey ---------------------------------------------------------------------------------------

either_way = st.booleans().flatmap(lambda overlap: scenarios(overlap=overlap, staged=True))


@given(either_way)
@patient
def test_every_block_is_there_before_it_is_computed(scenario: TieredScenario) -> None:
    simulated = simulate_tiers(scenario)
    reads, copies = events_of(simulated, Lane.READ), events_of(simulated, Lane.COPY)
    computes = events_of(simulated, Lane.COMPUTE)
    count = len(scenario.blocks)
    assert computes.keys() == set(itertools.product(range(1 + scenario.decode_passes), range(count)))
    for (pass_index, block), compute in computes.items():
        place = scenario.places[block]
        before = computes.get((pass_index, block - 1) if block else (pass_index - 1, count - 1))
        asked_s = before.end_s if before is not None and not scenario.overlap else 0.0
        if pass_index == 0 or place is DISK:
            assert asked_s <= reads[pass_index, block].start_s <= reads[pass_index, block].end_s <= compute.start_s
        if place in TRAVELLING or (pass_index == 0 and place is DEVICE):
            copy = copies[pass_index, block]
            assert asked_s - 1e-7 <= copy.start_s <= copy.end_s <= compute.start_s
            if place is HOST:
                assert reads[0, block].end_s <= copy.start_s + 1e-7, "a store is sent when it is whole"


@given(either_way)
@patient
def test_each_block_is_read_and_copied_as_often_as_its_place_says(scenario: TieredScenario) -> None:
    simulated = simulate_tiers(scenario)
    for pass_index, block in events_of(simulated, Lane.READ):
        assert pass_index == 0 or scenario.places[block] is DISK
    for pass_index, block in events_of(simulated, Lane.COPY):
        assert scenario.places[block] in TRAVELLING or (pass_index == 0 and scenario.places[block] is DEVICE)


@given(either_way)
@patient
def test_never_more_slots_are_held_than_there_are(scenario: TieredScenario) -> None:
    simulated = simulate_tiers(scenario)
    reads, copies = events_of(simulated, Lane.READ), events_of(simulated, Lane.COPY)
    computes = events_of(simulated, Lane.COMPUTE)
    begun: dict[tuple[int, int], float] = {}
    for key, event in [*copies.items(), *reads.items()]:
        if scenario.places[key[1]] in TRAVELLING:
            begun[key] = min(event.start_s, begun.get(key, math.inf))
    changes: list[tuple[float, int]] = []
    for key, start_s in begun.items():
        used_until = computes[key].end_s if key in computes else math.inf
        changes += [(start_s, 1), (max(start_s, used_until), -1)]
    held = most = 0
    for _, change in sorted(changes):  # at one moment a slot is given back before it is taken
        held += change
        most = max(most, held)
    assert most <= scenario.slots


@given(either_way)
@patient
def test_lanes_do_one_thing_at_a_time(scenario: TieredScenario) -> None:
    """The link two: a copy out of a store beside one of what comes through the ring."""
    events = simulate_tiers(scenario).timeline.events
    through_ring = {
        block
        for block, (times, place) in enumerate(zip(scenario.blocks, scenario.places, strict=True))
        if place is not HOST or times.stage_s
    }
    copies = [event for event in events if event.lane is Lane.COPY]
    for lane in (
        [event for event in events if event.lane is Lane.READ],
        [event for event in events if event.lane in (Lane.COMPUTE, Lane.STALL)],
        [event for event in copies if event.block_index in through_ring],
        [event for event in copies if event.block_index not in through_ring],
    ):
        reached = 0.0
        for event in lane:
            assert reached <= event.start_s + 1e-9
            assert event.start_s <= event.end_s
            reached = event.end_s


@given(either_way)
@patient
def test_no_event_is_shorter_than_its_work(scenario: TieredScenario) -> None:
    simulated = simulate_tiers(scenario)
    for (_, block), read in events_of(simulated, Lane.READ).items():
        assert read.duration_s >= scenario.blocks[block].read_s - 1e-7
    for (pass_index, block), compute in events_of(simulated, Lane.COMPUTE).items():
        times = scenario.blocks[block]
        work_s = (times.decode_s if pass_index else times.prefill_s) + (
            scenario.overhead_s(pass_index) if block == 0 else 0.0
        )
        assert compute.duration_s == close(work_s)
    for (_, block), copy in events_of(simulated, Lane.COPY).items():
        # Pieces that lag by a piece's reading may come to an end together with the block before.
        assert copy.duration_s >= scenario.blocks[block].copy_s - max(t.read_s for t in scenario.blocks) - 1e-7


@given(either_way)
@patient
def test_computing_and_stalling_fill_the_run(scenario: TieredScenario) -> None:
    simulated = simulate_tiers(scenario)
    timeline = simulated.timeline
    assert timeline.busy_s(Lane.COMPUTE) + timeline.busy_s(Lane.STALL) == close(pass_ends(simulated)[-1])


def test_the_first_pass_reads_everything_in_order_and_further_ones_only_what_is_on_the_disk() -> None:
    scenario = uniform("vhdp", slots=2, decode_passes=2)
    reads = events_of(simulate_tiers(scenario), Lane.READ)
    assert [key for key in reads if key[0] == 0] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert [key for key in reads if 0 < key[0] < 3] == [(1, 2), (2, 2)]


def test_names_are_those_given() -> None:
    assert simulate_tiers(uniform("dh")).timeline.block_names == ("block 0", "block 1")
    assert simulate_tiers(uniform("dh"), ["first", "second"]).timeline.block_names == ("first", "second")


@pytest.mark.parametrize("place", ["d", "h"])
def test_no_slot_for_a_travelling_block_is_an_error_not_a_hang(place: str) -> None:
    with pytest.raises(AssertionError, match="cannot go on"):
        simulate_tiers(uniform(place, slots=0))


# -- pieces, ring, link ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pieces", "there_s"), [(1, 5.0), (2, 4.5), (4, 4.25), (8, 4.125)])
@pytest.mark.parametrize(("read_s", "copy_s"), [(4.0, 1.0), (1.0, 4.0)])
def test_a_block_is_copied_piece_by_piece_while_it_is_read(
    pieces: int, there_s: float, read_s: float, copy_s: float
) -> None:
    scenario = uniform("d", read_s=read_s, copy_s=copy_s, pieces=pieces, decode_passes=0)
    assert simulate_tiers(scenario).prefill_s == close(there_s + 0.5)


@pytest.mark.parametrize(("ring_pieces", "read_until_s"), [(2, 3.5), (3, 3.0), (5, 2.0), (16, 1.0)])
def test_the_disk_gets_ahead_of_a_slow_link_by_what_the_ring_holds(ring_pieces: int, read_until_s: float) -> None:
    """Reading takes 1 s alone and copying 4 s, half a second each piece; all but one piece may wait in the ring."""
    scenario = uniform("d", read_s=1.0, copy_s=4.0, pieces=8, decode_passes=0)
    simulated = simulate_tiers(dataclasses.replace(scenario, ring_pieces=ring_pieces))
    assert events_of(simulated, Lane.READ)[0, 0].end_s == close(read_until_s)
    assert simulated.prefill_s == close(4.0 + 1 / 8 + 0.5)


def test_what_the_ring_holds_of_one_block_keeps_the_next_one_waiting() -> None:
    """Two blocks of 4 s of copying: the second is read when the first leaves room in the ring."""
    scenario = uniform("dd", read_s=1.0, copy_s=4.0, pieces=8, decode_passes=0)
    reads = events_of(simulate_tiers(dataclasses.replace(scenario, ring_pieces=3)), Lane.READ)
    assert reads[0, 1].start_s == close(3.0)
    assert reads[0, 1].end_s == close(7.0)


def test_a_store_and_the_ring_share_the_link_fairly() -> None:
    """The ring needs a quarter of the link and gets it; the store gets the rest: 3 s of copying take 4 s."""
    store = TieredTimes(read_s=0.0, copy_s=3.0, prefill_s=0.0, decode_s=0.0)
    disk = TieredTimes(read_s=8.0, copy_s=2.0, prefill_s=0.0, decode_s=0.0)
    scenario = TieredScenario(blocks=(store, disk), places=(HOST, DISK), slots=2, overlap=True, decode_passes=0)
    copies = events_of(simulate_tiers(scenario), Lane.COPY)
    assert copies[0, 0].end_s == close(4.0)
    assert copies[0, 1].end_s == close(8.0 + 2.0 / 8)


def test_two_that_want_all_of_the_link_get_half_of_it_each() -> None:
    """The 2 s of the store's copying take 4 s, and so do those of its next one, which follows at once."""
    store = TieredTimes(read_s=0.0, copy_s=2.0, prefill_s=0.0, decode_s=0.0)
    disk = TieredTimes(read_s=1.0, copy_s=4.0, prefill_s=0.0, decode_s=0.0)
    scenario = TieredScenario(blocks=(store, disk), places=(HOST, DISK), slots=2, overlap=True, decode_passes=0)
    copies = events_of(simulate_tiers(scenario), Lane.COPY)
    assert copies[0, 0].end_s == close(4.0)
    assert copies[0, 1].end_s == close(8.0 + 1.0 / 8)


def test_while_the_processor_computes_disk_and_link_go_on_into_free_slots() -> None:
    """It takes 4 s for its layer, in which the link fills both slots: nobody waits for them."""
    processor = TieredTimes(read_s=1.0, copy_s=0.0, prefill_s=4.0, decode_s=4.0)
    other = TieredTimes(read_s=1.0, copy_s=1.5, prefill_s=0.5, decode_s=0.5)
    scenario = TieredScenario(
        blocks=(processor, other, other), places=(PROCESSOR, HOST, HOST), slots=2, overlap=True, decode_passes=4
    )
    simulated = simulate_tiers(scenario)
    assert simulated.decode_s_per_pass == close(5.0)
    assert not [key for key in events_of(simulated, Lane.STALL) if key[0] > 0]


def test_a_block_that_stays_takes_no_slot() -> None:
    """The one slot is for the last block: the others are read and copied before it is free."""
    scenario = uniform("hvvp", slots=1, prefill_s=100.0, decode_passes=0)
    assert events_of(simulate_tiers(scenario), Lane.READ)[0, 3].end_s == close(4.0)


def test_a_block_from_host_memory_takes_its_slot_when_it_is_requested() -> None:
    """So in the first pass it is not even read before the only slot is free."""
    scenario = uniform("hh", slots=1, prefill_s=100.0, decode_passes=0)
    reads, computes = (events_of(simulate_tiers(scenario), lane) for lane in (Lane.READ, Lane.COMPUTE))
    assert reads[0, 1].start_s == close(computes[0, 0].end_s)


def test_stores_are_filled_by_the_readers() -> None:
    """While one writes a piece into the store another one reads the next: the slower of both counts."""
    scenario = uniform("pp", read_s=1.0, store_s=2.0, pieces=4, decode_passes=0)
    assert simulate_tiers(scenario).prefill_s == close(2 * (2.0 + 1.0 / 4) + 0.5)
    on_disk = uniform("dd", read_s=1.0, store_s=2.0, copy_s=0.0, pieces=4, decode_passes=0)
    assert simulate_tiers(on_disk).prefill_s == close(2 * 1.0 + 0.5), "nothing is stored"


def test_what_is_not_page_locked_goes_through_the_ring_with_the_readers() -> None:
    """Not beside what they read: 1 s of reading and 2 s of staging a pass, though the link needs only half a second."""
    scenario = uniform("hd", stage_s=2.0, decode_passes=6)
    simulated = simulate_tiers(scenario)
    assert simulated.decode_s_per_pass == close(3.0)
    locked = simulate_tiers(uniform("hd", decode_passes=6))
    assert locked.decode_s_per_pass == close(1.0 + 0.25 / 8 + 0.125), "one slot each: the disk waits for its own"


# -- what waiting costs ------------------------------------------------------------------------------------------------


@given(scenarios(overlap=False), st.floats(0.001, 0.5), st.floats(0.001, 0.5))
@example(uniform("hdvp", overlap=False), 0.25, 0.125)
@patient
def test_a_sequential_run_pays_for_every_block_that_it_asks_for(
    scenario: TieredScenario, read_latency_s: float, stall_penalty_s: float
) -> None:
    """The readers' hand-over where they read, the waking of whoever waited."""
    blocks = tuple(times._replace(copy_s=max(0.01, times.copy_s)) for times in scenario.blocks)
    scenario = dataclasses.replace(scenario, blocks=blocks)
    paid = simulate_tiers(dataclasses.replace(scenario, read_latency_s=read_latency_s, stall_penalty_s=stall_penalty_s))
    free = simulate_tiers(scenario)
    count, places = len(scenario.blocks), scenario.places
    if all(times.read_s >= times.copy_s for times in blocks):  # else copying goes on while the reader is woken
        assert paid.prefill_s == close(free.prefill_s + count * (read_latency_s + stall_penalty_s))
        if scenario.decode_passes:
            each_s = places.count(DISK) * (read_latency_s + stall_penalty_s) + places.count(HOST) * stall_penalty_s
            assert paid.decode_s_per_pass == close(free.decode_s_per_pass + each_s)


def test_the_first_pass_may_take_longer_beside_its_blocks() -> None:
    scenario = dataclasses.replace(uniform("vv"), pass_overhead_s=0.25, first_pass_overhead_s=3.0)
    simulated = simulate_tiers(scenario)
    there_s = 1.0 + 0.25 / 8
    assert simulated.prefill_s == close(there_s + 3.0 + 2 * 0.5)
    assert simulated.decode_s_per_pass == close(0.25 + 2 * 0.125)
    same = simulate_tiers(dataclasses.replace(scenario, first_pass_overhead_s=None))
    assert same.prefill_s == close(2.0 + 0.25 / 8 + 0.5)
