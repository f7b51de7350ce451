"""A simulated run obeys readers, link, slots and the order of blocks, with a link and without one."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.planning.plan import TRAVELLING
from headrace.planning.simulation.one_copy import PassSchedule, simulate
from headrace.planning.timeline import Event, Lane
from pass_schedules import (
    CPU,
    DEVICE,
    DISK,
    HOST,
    NO_HOST,
    close,
    events_of,
    noise_s,
    pass_ends,
    prefill_work_s,
    schedules,
    sums,
    uniform,
    ways_s,
    with_and_without_link,
)

patient = settings(deadline=None)

# -- against closed forms ----------------------------------------------------------------------------------------------


@with_and_without_link
@given(data=st.data())
@patient
def test_sequential_is_the_sum_exactly(data: st.DataObject, link: bool) -> None:
    schedule = data.draw(schedules(link=link, overlap=False, slowdowns=True, staged=True))
    simulated = simulate(schedule)
    assert simulated.prefill_s == close(ways_s(schedule, first=True) + prefill_work_s(schedule), link=link)
    if schedule.decode_passes:
        assert simulated.decode_s_per_pass == close(ways_s(schedule) + sums(schedule)[2], link=link)
    else:
        assert simulated.decode_s_per_pass == 0.0


@with_and_without_link
@given(data=st.data())
@patient
def test_a_steady_pass_lies_between_the_maximum_and_the_sum(data: st.DataObject, link: bool) -> None:
    """The link may have brought too early what is wanted in a pass after those looked at, if both lanes are used."""
    schedule = data.draw(schedules(link=link, staged=True))
    if schedule.decode_passes:
        steady = simulate(schedule).decode_s_per_pass
        assert max(sums(schedule)) * (1 - 1e-9) <= steady
        passes = 1 + schedule.decode_passes
        early_s = schedule.slots * max(t.copy_s for t in schedule.blocks) if HOST in schedule.placements else 0.0
        looked_at = schedule.decode_passes - (passes // 2 if passes > 2 else 0)
        assert steady <= sum(sums(schedule)) * (1 + 1e-9) + early_s / looked_at + noise_s(link=link)


@with_and_without_link
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_the_steady_pass_is_near_that_of_a_long_run(data: st.DataObject, link: bool) -> None:
    """In the few passes looked at, disk and link may get ahead, or fall behind, by what the slots hold."""
    schedule = data.draw(schedules(link=link, slowdowns=not link))
    passes = 60 if link else 100
    short = simulate(dataclasses.replace(schedule, decode_passes=5)).decode_s_per_pass
    ends = pass_ends(simulate(dataclasses.replace(schedule, decode_passes=passes)))
    lead_s = schedule.slots * max(times.read_s + times.copy_s for times in schedule.blocks)
    slack_s = lead_s / 2 + 2 * lead_s / passes + 10 * noise_s(link=link)
    assert (ends[passes] - ends[0]) / passes == pytest.approx(short, abs=slack_s)


# -- what more memory does ---------------------------------------------------------------------------------------------


@with_and_without_link
@given(data=st.data())
@patient
def test_more_slots_are_never_slower(data: st.DataObject, link: bool) -> None:
    schedule = data.draw(schedules(link=link, placements=NO_HOST))
    more = simulate(dataclasses.replace(schedule, slots=schedule.slots + 1))
    fewer = simulate(schedule)
    for later, earlier in zip(pass_ends(fewer), pass_ends(more), strict=True):
        assert earlier <= later * (1 + 1e-9) + noise_s(link=link)
    if not link:
        assert more.decode_s_per_pass <= fewer.decode_s_per_pass * (1 + 1e-9) + 1e-9


@with_and_without_link
@given(data=st.data())
@patient
def test_one_more_resident_is_never_slower(data: st.DataObject, link: bool) -> None:
    schedule = data.draw(schedules(link=link, placements=NO_HOST))
    block = data.draw(st.integers(0, len(schedule.blocks) - 1))
    placements = list(schedule.placements)
    assume(placements[block] is not CPU)
    placements[block] = DEVICE
    more = simulate(dataclasses.replace(schedule, placements=tuple(placements)))
    for later, earlier in zip(pass_ends(simulate(schedule)), pass_ends(more), strict=True):
        assert earlier <= later * (1 + 1e-9) + noise_s(link=link)


@with_and_without_link
@given(data=st.data())
@patient
def test_overlap_is_never_slower_than_sequential(data: st.DataObject, link: bool) -> None:
    """But for the reading that goes on at the end, for a pass that does not come, where that slows computing down."""
    schedule = data.draw(schedules(link=link, slowdowns=not link, placements=NO_HOST))
    sequential_s = pass_ends(simulate(dataclasses.replace(schedule, overlap=False)))[-1]
    in_vain_s = schedule.slots * max(times.read_s for times in schedule.blocks)
    if schedule.compute_slowdown == 1.0 or DISK not in schedule.placements:
        in_vain_s = 0.0
    assert pass_ends(simulate(schedule))[-1] <= (sequential_s + in_vain_s) * (1 + 1e-9) + noise_s(link=link)


@with_and_without_link
@given(data=st.data(), overlap=st.booleans())
@patient
def test_with_all_in_memory_only_computing_counts(data: st.DataObject, link: bool, overlap: bool) -> None:
    schedule = data.draw(schedules(link=link, slowdowns=True, overlap=overlap))
    simulated = simulate(dataclasses.replace(schedule, placements=(DEVICE,) * len(schedule.blocks)))
    if schedule.decode_passes:
        assert simulated.decode_s_per_pass == close(sums(schedule)[2], link=link)
    assert {p for p, _ in events_of(simulated, Lane.READ)} == {0}


# -- what the timeline must obey ---------------------------------------------------------------------------------------


def any_schedule(data: st.DataObject, *, link: bool) -> PassSchedule:
    return data.draw(schedules(link=link, slowdowns=True, overlap=data.draw(st.booleans()), staged=True))


@with_and_without_link
@given(data=st.data())
@patient
def test_every_block_is_there_before_it_is_computed(data: st.DataObject, link: bool) -> None:
    schedule = any_schedule(data, link=link)
    simulated = simulate(schedule)
    reads, copies = events_of(simulated, Lane.READ), events_of(simulated, Lane.COPY)
    computes = events_of(simulated, Lane.COMPUTE)
    count = len(schedule.blocks)
    assert computes.keys() == set(itertools.product(range(1 + schedule.decode_passes), range(count)))
    for (pass_index, block), compute in computes.items():
        times, placement = schedule.blocks[block], schedule.placements[block]
        before = computes.get((pass_index, block - 1) if block else (pass_index - 1, count - 1))
        asked_s = before.end_s if before is not None and not schedule.overlap else 0.0
        if pass_index == 0 or placement is DISK:
            read = reads[pass_index, block]
            assert asked_s <= read.start_s <= read.end_s <= compute.start_s, "nothing is read before its turn"
        if times.copy_s and (placement in TRAVELLING or (pass_index == 0 and placement is DEVICE)):
            copy = copies[pass_index, block]
            assert asked_s <= copy.start_s <= copy.end_s <= compute.start_s
            if placement is HOST:
                assert reads[0, block].end_s <= copy.start_s, "a store is sent when it is whole"


@with_and_without_link
@given(data=st.data())
@patient
def test_each_block_is_read_and_copied_as_often_as_its_placement_says(data: st.DataObject, link: bool) -> None:
    schedule = any_schedule(data, link=link)
    simulated = simulate(schedule)
    for pass_index, block in events_of(simulated, Lane.READ):
        assert pass_index == 0 or schedule.placements[block] is DISK
    for pass_index, block in events_of(simulated, Lane.COPY):
        assert link
        assert schedule.placements[block] in TRAVELLING or (pass_index == 0 and schedule.placements[block] is DEVICE)


@with_and_without_link
@given(data=st.data())
@patient
def test_never_more_slots_are_held_than_there_are(data: st.DataObject, link: bool) -> None:
    schedule = any_schedule(data, link=link)
    simulated = simulate(schedule)
    computes = events_of(simulated, Lane.COMPUTE)
    begun: dict[tuple[int, int], float] = {}
    for lane in (Lane.COPY, Lane.READ):
        for key, event in events_of(simulated, lane).items():
            if schedule.placements[key[1]] in TRAVELLING:
                begun[key] = min(event.start_s, begun.get(key, math.inf))
    changes: list[tuple[float, int]] = []
    for key, start_s in begun.items():
        used_until = computes[key].end_s if key in computes else math.inf
        assert used_until >= start_s
        changes += [(start_s, 1), (used_until, -1)]
    held = most = 0
    for _, change in sorted(changes):  # at one moment a slot is given back before it is taken
        held += change
        most = max(most, held)
    assert most <= schedule.slots


@with_and_without_link
@given(data=st.data())
@patient
def test_lanes_do_one_thing_at_a_time(data: st.DataObject, link: bool) -> None:
    """The link two: a copy out of a store while another one comes through the ring."""
    schedule = any_schedule(data, link=link)
    events = simulate(schedule).timeline.events
    through_ring = {
        block
        for block, (times, place) in enumerate(zip(schedule.blocks, schedule.placements, strict=True))
        if place is not HOST or times.stage_s
    }
    copies = [event for event in events if event.lane is Lane.COPY]
    lanes: list[list[Event]] = [
        [event for event in events if event.lane is Lane.READ],
        [event for event in events if event.lane in (Lane.COMPUTE, Lane.STALL)],
        [event for event in copies if event.block_index in through_ring],
        [event for event in copies if event.block_index not in through_ring],
    ]
    for lane in lanes:
        reached = 0.0
        for event in lane:
            assert reached <= event.start_s <= event.end_s
            reached = event.end_s


@with_and_without_link
@given(data=st.data())
@patient
def test_an_event_takes_as_long_as_its_work(data: st.DataObject, link: bool) -> None:
    """Or longer: by a slowdown; reading also where the ring is full, copying where the link is shared."""
    schedule = any_schedule(data, link=link)
    simulated, noise = simulate(schedule), noise_s(link=link)
    for (_, block), read in events_of(simulated, Lane.READ).items():
        alone_s = schedule.blocks[block].read_s
        assert read.duration_s >= alone_s - noise
        assert link or read.duration_s <= alone_s * schedule.read_slowdown + noise
    for (pass_index, block), compute in events_of(simulated, Lane.COMPUTE).items():
        times = schedule.blocks[block]
        alone_s = times.decode_s if pass_index else times.prefill_s
        alone_s += schedule.overhead_s(pass_index) if block == 0 else 0.0
        assert alone_s - noise <= compute.duration_s <= alone_s * schedule.compute_slowdown + noise
    for (_, block), copy in events_of(simulated, Lane.COPY).items():
        # Pieces that lag by a piece's reading may come to an end together with the block before.
        assert copy.duration_s >= schedule.blocks[block].copy_s - max(t.read_s for t in schedule.blocks) - noise


@with_and_without_link
@given(data=st.data())
@patient
def test_computing_and_stalling_fill_the_run(data: st.DataObject, link: bool) -> None:
    simulated = simulate(any_schedule(data, link=link))
    timeline = simulated.timeline
    busy_s = timeline.busy_s(Lane.COMPUTE) + timeline.busy_s(Lane.STALL)
    assert busy_s == close(pass_ends(simulated)[-1], link=link)


def test_names_are_those_given() -> None:
    assert simulate(uniform("dh")).timeline.block_names == ("block 0", "block 1")
    assert simulate(uniform("dh"), ["first", "second"]).timeline.block_names == ("first", "second")


@pytest.mark.parametrize(("letter", "copy_s"), [("d", 0.0), ("d", 0.25), ("h", 0.25)])
def test_no_slot_for_a_travelling_block_is_an_error_not_a_hang(letter: str, copy_s: float) -> None:
    with pytest.raises(AssertionError, match="cannot go on"):
        simulate(uniform(letter, slots=0, copy_s=copy_s))


@with_and_without_link
def test_the_first_pass_may_take_longer_apart_from_its_blocks(link: bool) -> None:
    copy_s = 0.25 if link else 0.0
    schedule = uniform("vv", copy_s=copy_s, slots=0, pass_overhead_s=0.25, first_pass_overhead_s=3.0)
    simulated = simulate(schedule)
    there_s = 1.0 + copy_s / 8
    assert simulated.prefill_s == close(there_s + 3.0 + 2 * 0.5, link=link)
    assert simulated.decode_s_per_pass == close(0.25 + 2 * 0.125, link=link)
    same = simulate(dataclasses.replace(schedule, first_pass_overhead_s=None))
    assert same.prefill_s == close(2.0 + copy_s / 8 + 0.5, link=link)
