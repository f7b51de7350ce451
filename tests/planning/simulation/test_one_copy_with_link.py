"""Over a link a run obeys the ring and the shares of the link, and agrees with one without a link and the event core.

On the event core every piece is a task of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from headrace.planning.block_times import BlockTimes
from headrace.planning.plan import TRAVELLING, Placement
from headrace.planning.simulation.event_core import Schedule
from headrace.planning.simulation.one_copy import PassSchedule, simulate
from headrace.planning.timeline import Lane
from pass_schedules import (
    CPU,
    DEVICE,
    DISK,
    HOST,
    events_of,
    pass_ends,
    prefill_work_s,
    schedules,
    sums,
    uniform,
    way_s,
)
from pass_schedules import close as close_to

patient = settings(deadline=None)
over_link = schedules(link=True)


def close(expected: float | list[float]) -> Any:
    return close_to(expected, link=True)


# -- against closed forms ----------------------------------------------------------------------------------------------


@given(over_link)
@settings(max_examples=30, deadline=None)
def test_in_the_long_run_a_pass_takes_no_longer_than_the_sum(schedule: PassSchedule) -> None:
    ends = pass_ends(simulate(dataclasses.replace(schedule, decode_passes=60)))
    early_s = schedule.slots * max(times.copy_s for times in schedule.blocks)
    assert (ends[60] - ends[0]) / 60 <= sum(sums(schedule)) * (1 + 1e-9) + early_s / 60 + 1e-7


@given(over_link)
@patient
def test_the_first_pass_lies_between_the_maximum_and_the_sum(schedule: PassSchedule) -> None:
    placed = list(zip(schedule.blocks, schedule.placements, strict=True))
    reads_s = sum(times.read_s for times, _ in placed)
    copies_s = sum(times.copy_s for times, place in placed if place is not CPU)
    stores_s = sum(times.store_s for times, place in placed if place in (HOST, CPU))
    compute_s = prefill_work_s(schedule)
    prefill_s = simulate(schedule).prefill_s
    first_way_s = way_s(schedule.blocks[0], schedule.placements[0], first=True)
    least_s = max(reads_s + schedule.blocks[-1].prefill_s, copies_s, first_way_s + compute_s)
    assert least_s * (1 - 1e-9) - 1e-7 <= prefill_s
    ahead_s = schedule.slots * sum(sums(schedule)[:2])  # what is brought for the next passes takes some of the link
    assert prefill_s <= (reads_s + copies_s + stores_s + compute_s + ahead_s) * (1 + 1e-9) + 1e-7


@pytest.mark.parametrize(
    ("schedule", "expected_s"),
    [
        (uniform("dddd"), 4.0),  # the disk binds
        (uniform("hhhh"), 1.0),  # the link
        (uniform("hhhh", decode_s=0.5), 2.0),  # the device
        (uniform("hhhh", slots=1), 1.5),  # a single slot is either filled or used
        (uniform("dddd", slots=1, pieces=4), 4 * (1.0 + 0.25 / 4 + 0.125)),
        (uniform("vhvh"), 0.5),  # half of them stay
        (uniform("chch"), 0.5),  # the CPU's travel as little
        (uniform("vvcc"), 0.5),
        (uniform("hdhd", slots=3), 2.0),  # the link brings others while the disk brings one
        (uniform("hdhd"), 2 * (1.0 + 0.25 / 8 + 0.125)),  # but with two slots the disk waits for its own
        (uniform("dddd", read_s=0.25, copy_s=1.0), 4.0),  # a slow link
        (uniform("hhhh", stage_s=0.5), 2.0),  # stores that are not page-locked: the readers bind
        (uniform("hdhd", slots=3, stage_s=0.5), 3.0),  # who also have to read
    ],
)
def test_uniform_blocks_in_closed_form(schedule: PassSchedule, expected_s: float) -> None:
    assert simulate(schedule).decode_s_per_pass == close(expected_s)


@pytest.mark.parametrize("decode_passes", [1, 2, 4])
def test_a_lead_won_during_prefill_does_not_count(decode_passes: int) -> None:
    """With all blocks in slots when decoding begins, the first passes compute what was read before."""
    schedule = uniform("dddd", slots=4, prefill_s=4.0, decode_s=0.9, copy_s=0.125, decode_passes=decode_passes)
    simulated = simulate(schedule)
    ends = pass_ends(simulated)
    assert ends[1] - ends[0] < 0.99 * 4.0
    assert simulated.decode_s_per_pass == close(4.0)


def test_fewer_blocks_than_slots_wait_for_their_stores() -> None:
    """The second visit's slot is free at once, but there is nothing to copy yet."""
    copies = events_of(simulate(uniform("h", slots=2, decode_passes=1)), Lane.COPY)
    assert [copies[index, 0].start_s for index in (0, 1)] == close([1.0, 1.25])


# -- against a run without a link --------------------------------------------------------------------------------------


@given(schedules(link=True, placements=st.sampled_from([DEVICE, DISK]), copies=st.floats(0.0, 1e-3)))
@patient
def test_a_fast_link_hardly_counts(schedule: PassSchedule) -> None:
    blocks = tuple(times._replace(read_s=max(times.read_s, 0.01)) for times in schedule.blocks)
    schedule = dataclasses.replace(schedule, blocks=blocks)
    without = dataclasses.replace(schedule, blocks=tuple(times._replace(copy_s=0.0) for times in blocks))
    copied = len(schedule.blocks) * (1 + schedule.decode_passes)
    for ours, theirs in zip(pass_ends(simulate(schedule)), pass_ends(simulate(without)), strict=True):
        assert theirs - 1e-7 <= ours <= theirs + copied * 1e-3 + 1e-9


@given(schedules(link=True, placements=st.sampled_from([HOST, CPU, DEVICE])))
@patient
def test_with_nothing_on_the_disk_the_link_takes_the_disks_part(schedule: PassSchedule) -> None:
    """In the steady state: the first pass reads everything."""
    if not schedule.decode_passes:
        return
    own = simulate(dataclasses.replace(schedule, decode_passes=40)).decode_s_per_pass
    linked = PassSchedule(
        blocks=tuple(BlockTimes(t.copy_s, t.prefill_s, t.decode_s) for t in schedule.blocks),
        placements=tuple(DISK if place is HOST else DEVICE for place in schedule.placements),
        slots=schedule.slots,
        overlap=True,
        decode_passes=40,
        pass_overhead_s=schedule.pass_overhead_s,
    )
    lead_s = schedule.slots * max(times.copy_s for times in schedule.blocks)
    assert own == pytest.approx(simulate(linked).decode_s_per_pass, abs=lead_s / 18 + 1e-6)


# -- against the event core: every piece a task ------------------------------------------------------------------------


@st.composite
def sized_schedules(draw: st.DrawFn) -> tuple[PassSchedule, float]:
    """Blocks of some pieces of one size, all over the same disk and link; and the seconds of a piece on both."""
    read_s, copy_s = draw(st.sampled_from([(0.1, 0.02), (0.1, 0.05), (0.1, 0.08), (0.05, 0.1), (0.1, 0.1)]))
    count = draw(st.integers(1, 7))
    blocks = []
    for _ in range(count):
        pieces = draw(st.sampled_from([4, 8, 12, 16]))
        compute = draw(st.sampled_from([0.01, 0.3, 1.0]))
        blocks.append(BlockTimes(pieces * read_s, 2 * compute, compute, pieces * copy_s, pieces=pieces))
    schedule = PassSchedule(
        blocks=tuple(blocks),
        placements=tuple(draw(st.lists(st.sampled_from(Placement), min_size=count, max_size=count))),
        slots=draw(st.integers(1, 4)),
        overlap=draw(st.booleans()),
        decode_passes=draw(st.integers(0, 5)),
        pass_overhead_s=0.1,
    )
    return schedule, read_s + copy_s


def on_event_core(schedule: PassSchedule) -> list[float]:
    """Return the ends of the passes when readers, two lanes of copies, ring and slots are put as tasks."""
    tasks = Schedule(capacities={"link": 1.0}, slots={"slot": schedule.slots, "ring": schedule.ring_pieces})
    computed: list[int] = []

    def bring(pass_index: int, block: int) -> int:
        times, place = schedule.blocks[block], schedule.placements[block]
        asked = tasks.add(
            "requests",
            after=[] if schedule.overlap else computed[-1:],
            takes="slot" if place in TRAVELLING else None,
        )
        if place in (HOST, CPU):
            if pass_index == 0:
                asked = tasks.add("readers", times.read_s, after=[asked])
            if place is CPU:
                return asked
            return tasks.add("stores", size_bytes=times.copy_s, path=["link"], after=[asked])
        copied = asked
        for _ in range(times.pieces):
            read = tasks.add("readers", times.read_s / times.pieces, after=[asked], takes="ring")
            size = times.copy_s / times.pieces
            copied = tasks.add("ring", size_bytes=size, path=["link"], after=[read], gives="ring")
        return copied

    ends = []
    for pass_index in range(1 + schedule.decode_passes):
        for block, (times, place) in enumerate(zip(schedule.blocks, schedule.placements, strict=True)):
            there = [bring(pass_index, block)] if pass_index == 0 or place in TRAVELLING else []
            work_s = times.decode_s if pass_index else times.prefill_s
            work_s += schedule.pass_overhead_s if block == 0 else 0.0
            gives = "slot" if place in TRAVELLING else None
            computed.append(tasks.add("compute", work_s, after=[*there, *computed[-1:]], gives=gives))
        ends.append(computed[-1])
    if schedule.overlap:  # readers go on into a pass that does not come
        travelling = [block for block, place in enumerate(schedule.placements) if place in TRAVELLING]
        for block in travelling[: schedule.slots]:
            bring(1 + schedule.decode_passes, block)
    outcome = tasks.run()
    return [outcome.ends[number] for number in ends]


@given(sized_schedules())
@settings(max_examples=60, deadline=None)
def test_flowing_bytes_agree_with_pieces_on_the_event_core(case: tuple[PassSchedule, float]) -> None:
    """To within some pieces in each pass."""
    schedule, piece_s = case
    simulated = simulate(schedule)
    assume(schedule.slots <= max(1, sum(place in TRAVELLING for place in schedule.placements)))
    # On the core a copy of the next pass cannot get ahead of one of the first pass, whose store is not whole yet.
    sent = [e for e in simulated.timeline.events if e.lane is Lane.COPY and schedule.placements[e.block_index] is HOST]
    assume(sent == sorted(sent, key=lambda event: (event.pass_index, event.block_index)))
    for number, (ours, theirs) in enumerate(zip(pass_ends(simulated), on_event_core(schedule), strict=True), start=1):
        assert ours == pytest.approx(theirs, abs=(2 + number) * piece_s, rel=0.01)


# -- what more memory does ---------------------------------------------------------------------------------------------


@given(over_link)
@patient
def test_more_slots_lose_no_more_than_they_bring_too_early(schedule: PassSchedule) -> None:
    """Two lanes share the link, so that what is wanted later may take it from what is wanted now."""
    more = simulate(dataclasses.replace(schedule, slots=schedule.slots + 1))
    fewer = simulate(schedule)
    early_s = (schedule.slots + 1) * max(times.copy_s for times in schedule.blocks)
    for later, earlier in zip(pass_ends(fewer), pass_ends(more), strict=True):
        assert earlier <= later + early_s + 1e-7


def test_the_first_pass_reads_everything_in_order_and_further_ones_only_what_is_on_the_disk() -> None:
    schedule = uniform("vhdc", slots=2, decode_passes=2)
    reads = events_of(simulate(schedule), Lane.READ)
    assert [key for key in reads if key[0] == 0] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert [key for key in reads if 0 < key[0] < 3] == [(1, 2), (2, 2)]


# -- pieces, ring, link ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pieces", "there_s"), [(1, 5.0), (2, 4.5), (4, 4.25), (8, 4.125)])
@pytest.mark.parametrize(("read_s", "copy_s"), [(4.0, 1.0), (1.0, 4.0)])
def test_a_block_is_copied_piece_by_piece_while_it_is_read(
    pieces: int, there_s: float, read_s: float, copy_s: float
) -> None:
    schedule = uniform("d", read_s=read_s, copy_s=copy_s, pieces=pieces, decode_passes=0)
    assert simulate(schedule).prefill_s == close(there_s + 0.5)


@pytest.mark.parametrize(("ring_pieces", "read_until_s"), [(2, 3.5), (3, 3.0), (5, 2.0), (16, 1.0)])
def test_the_disk_gets_ahead_of_a_slow_link_by_what_the_ring_holds(ring_pieces: int, read_until_s: float) -> None:
    """Reading takes 1 s alone and copying 4 s, half a second each piece; all but one piece may wait in the ring."""
    schedule = uniform("d", read_s=1.0, copy_s=4.0, pieces=8, decode_passes=0)
    simulated = simulate(dataclasses.replace(schedule, ring_pieces=ring_pieces))
    assert events_of(simulated, Lane.READ)[0, 0].end_s == close(read_until_s)
    assert simulated.prefill_s == close(4.0 + 1 / 8 + 0.5)


def test_what_the_ring_holds_of_one_block_keeps_the_next_one_waiting() -> None:
    """Two blocks of 4 s of copying: the second is read when the first leaves room in the ring."""
    schedule = uniform("dd", read_s=1.0, copy_s=4.0, pieces=8, decode_passes=0)
    reads = events_of(simulate(dataclasses.replace(schedule, ring_pieces=3)), Lane.READ)
    assert reads[0, 1].start_s == close(3.0)
    assert reads[0, 1].end_s == close(7.0)


def test_a_store_and_the_ring_share_the_link_fairly() -> None:
    """The ring needs a quarter of the link and gets it; the store gets the rest: 3 s of copying take 4 s."""
    store = BlockTimes(read_s=0.0, copy_s=3.0, prefill_s=0.0, decode_s=0.0)
    disk = BlockTimes(read_s=8.0, copy_s=2.0, prefill_s=0.0, decode_s=0.0)
    schedule = PassSchedule(blocks=(store, disk), placements=(HOST, DISK), slots=2, overlap=True, decode_passes=0)
    copies = events_of(simulate(schedule), Lane.COPY)
    assert copies[0, 0].end_s == close(4.0)
    assert copies[0, 1].end_s == close(8.0 + 2.0 / 8)


def test_two_that_want_all_of_the_link_get_half_of_it_each() -> None:
    """The 2 s of the store's copying take 4 s, and so do those of its next one, which follows at once."""
    store = BlockTimes(read_s=0.0, copy_s=2.0, prefill_s=0.0, decode_s=0.0)
    disk = BlockTimes(read_s=1.0, copy_s=4.0, prefill_s=0.0, decode_s=0.0)
    schedule = PassSchedule(blocks=(store, disk), placements=(HOST, DISK), slots=2, overlap=True, decode_passes=0)
    copies = events_of(simulate(schedule), Lane.COPY)
    assert copies[0, 0].end_s == close(4.0)
    assert copies[0, 1].end_s == close(8.0 + 1.0 / 8)


def test_while_the_cpu_computes_disk_and_link_go_on_into_free_slots() -> None:
    """It takes 4 s for its layer, in which the link fills both slots: nobody waits for them."""
    by_cpu = BlockTimes(read_s=1.0, copy_s=0.0, prefill_s=4.0, decode_s=4.0)
    other = BlockTimes(read_s=1.0, copy_s=1.5, prefill_s=0.5, decode_s=0.5)
    schedule = PassSchedule(
        blocks=(by_cpu, other, other), placements=(CPU, HOST, HOST), slots=2, overlap=True, decode_passes=4
    )
    simulated = simulate(schedule)
    assert simulated.decode_s_per_pass == close(5.0)
    assert not [key for key in events_of(simulated, Lane.STALL) if key[0] > 0]


def test_a_block_that_stays_takes_no_slot() -> None:
    """The one slot is for the last block: the others are read and copied before it is free."""
    schedule = uniform("hvvc", slots=1, prefill_s=100.0, decode_passes=0)
    assert events_of(simulate(schedule), Lane.READ)[0, 3].end_s == close(4.0)


def test_a_block_from_host_memory_takes_its_slot_when_it_is_requested() -> None:
    """So in the first pass it is not even read before the only slot is free."""
    schedule = uniform("hh", slots=1, prefill_s=100.0, decode_passes=0)
    reads, computes = (events_of(simulate(schedule), lane) for lane in (Lane.READ, Lane.COMPUTE))
    assert reads[0, 1].start_s == close(computes[0, 0].end_s)


def test_stores_are_filled_by_the_readers() -> None:
    """While one writes a piece into the store another one reads the next: the slower of both counts."""
    schedule = uniform("cc", read_s=1.0, store_s=2.0, pieces=4, decode_passes=0)
    assert simulate(schedule).prefill_s == close(2 * (2.0 + 1.0 / 4) + 0.5)
    on_disk = uniform("dd", read_s=1.0, store_s=2.0, copy_s=0.0, pieces=4, decode_passes=0)
    assert simulate(on_disk).prefill_s == close(2 * 1.0 + 0.5), "nothing is stored"


def test_what_is_not_page_locked_goes_through_the_ring_with_the_readers() -> None:
    """Not beside what they read: 1 s of reading and 2 s of staging a pass, though the link needs only half a second."""
    schedule = uniform("hd", stage_s=2.0, decode_passes=6)
    simulated = simulate(schedule)
    assert simulated.decode_s_per_pass == close(3.0)
    locked = simulate(uniform("hd", decode_passes=6))
    assert locked.decode_s_per_pass == close(1.0 + 0.25 / 8 + 0.125), "one slot each: the disk waits for its own"


# -- what waiting costs ------------------------------------------------------------------------------------------------


@given(schedules(link=True, overlap=False), st.floats(0.001, 0.5), st.floats(0.001, 0.5))
@example(uniform("hdvc", overlap=False), 0.25, 0.125)
@patient
def test_a_sequential_run_pays_for_every_block_that_it_asks_for(
    schedule: PassSchedule, read_latency_s: float, stall_penalty_s: float
) -> None:
    """The latency where readers read, the penalty where computing waited."""
    blocks = tuple(times._replace(copy_s=max(0.01, times.copy_s)) for times in schedule.blocks)
    schedule = dataclasses.replace(schedule, blocks=blocks)
    paid = simulate(dataclasses.replace(schedule, read_latency_s=read_latency_s, stall_penalty_s=stall_penalty_s))
    free = simulate(schedule)
    count, places = len(schedule.blocks), schedule.placements
    if all(times.read_s >= times.copy_s for times in blocks):  # else copying goes on in the latency
        assert paid.prefill_s == close(free.prefill_s + count * (read_latency_s + stall_penalty_s))
        if schedule.decode_passes:
            each_s = places.count(DISK) * (read_latency_s + stall_penalty_s) + places.count(HOST) * stall_penalty_s
            assert paid.decode_s_per_pass == close(free.decode_s_per_pass + each_s)
