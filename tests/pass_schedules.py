"""Schedules of one copy of a model, with a link and without one, and what their tests ask of a simulated run."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st

from headrace.planning.block_times import BlockTimes
from headrace.planning.plan import TRAVELLING, Placement
from headrace.planning.simulation.one_copy import PassSchedule, Simulated
from headrace.planning.timeline import Event, Lane

DEVICE, HOST, DISK, CPU = Placement.DEVICE, Placement.HOST, Placement.DISK, Placement.CPU
LETTERS = {"v": DEVICE, "h": HOST, "d": DISK, "c": CPU}
NO_HOST = st.sampled_from([DEVICE, DISK, CPU])

seconds = st.floats(0.001, 10.0) | st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])
times_without_link = st.tuples(seconds, seconds, seconds).map(lambda own: BlockTimes(*own))
with_and_without_link = pytest.mark.parametrize("link", [False, True], ids=["without link", "with link"])


@st.composite
def schedules(
    draw: st.DrawFn,
    *,
    link: bool,
    overlap: bool = True,
    slowdowns: bool = False,
    placements: st.SearchStrategy[Placement] | None = None,
    copies: st.SearchStrategy[float] = seconds,
    staged: bool = False,
) -> PassSchedule:
    """Draw one. Without a link all blocks are read to where they are computed."""
    count = draw(st.integers(1, 8 if link else 9))
    times = times_without_link
    if link:
        times = st.builds(
            BlockTimes,
            read_s=seconds,
            copy_s=copies,
            prefill_s=seconds,
            decode_s=seconds,
            store_s=st.sampled_from([0.0, 0.1, 1.0]),
            stage_s=st.sampled_from([0.0, 0.5, 2.0]) if staged else st.just(0.0),
            pieces=st.integers(1, 12),
        )
    if placements is None or not link:
        placements = st.sampled_from(Placement if link else [DEVICE, DISK])
    slowdown = st.floats(1.0, 2.0) if slowdowns else st.just(1.0)
    return PassSchedule(
        blocks=tuple(draw(st.lists(times, min_size=count, max_size=count))),
        placements=tuple(draw(st.lists(placements, min_size=count, max_size=count))),
        slots=draw(st.integers(1, 4)),
        overlap=overlap,
        ring_pieces=draw(st.integers(2, 6)) if link else 4,
        decode_passes=draw(st.integers(0, 5 if link else 6)),
        pass_overhead_s=draw(st.sampled_from([0.0, 0.1])),
        first_pass_overhead_s=draw(st.sampled_from([None, 0.3])) if link else None,
        compute_slowdown=draw(slowdown),
        read_slowdown=draw(slowdown),
    )


def uniform(letters: str, times: BlockTimes | None = None, /, **fields: Any) -> PassSchedule:
    """Blocks that are all alike: v(ideo memory, or the CPU's own), h(ost), d(isk), c(omputed by the CPU).

    Fields are those of the schedule, and where no times are given also those of the blocks.
    """
    own = {name: fields.pop(name) for name in BlockTimes._fields if name in fields}
    if times is None:
        times = BlockTimes(**{"read_s": 1.0, "copy_s": 0.25, "prefill_s": 0.5, "decode_s": 0.125, **own})
    return PassSchedule(
        blocks=(times,) * len(letters),
        placements=tuple(LETTERS[letter] for letter in letters),
        **{"slots": 2, "overlap": True, "decode_passes": 6, **fields},
    )


def noise_s(*, link: bool) -> float:
    """What rounding may add up to; a block that is read in no time takes a nanosecond through the ring."""
    return 1e-7 if link else 1e-9


def close(expected: float | list[float], *, link: bool) -> Any:
    """Equal but for rounding."""
    return pytest.approx(expected, rel=1e-9, abs=noise_s(link=link))


def events_of(simulated: Simulated, lane: Lane) -> dict[tuple[int, int], Event]:
    """Find what happened in one lane, by pass and block."""
    found = {(e.pass_index, e.block_index): e for e in simulated.timeline.events if e.lane is lane}
    assert len(found) == sum(event.lane is lane for event in simulated.timeline.events), "no event twice"
    return found


def pass_ends(simulated: Simulated) -> list[float]:
    """When each pass has been computed."""
    computed = events_of(simulated, Lane.COMPUTE)
    passes = 1 + max(pass_index for pass_index, _ in computed)
    return [max(event.end_s for (own, _), event in computed.items() if own == index) for index in range(passes)]


def way_s(times: BlockTimes, placement: Placement, *, first: bool = False) -> float:
    """Seconds from the request of a block until it is there, when nothing else is going on."""

    def piped(one: float, other: float) -> float:
        return max(one, other) + min(one, other) / times.pieces

    if first and placement is CPU:
        return piped(times.read_s, times.store_s)
    if placement is HOST:
        sent = piped(times.stage_s, times.copy_s) if times.stage_s else times.copy_s
        return sent + (piped(times.read_s, times.store_s) if first else 0.0)
    return piped(times.read_s, times.copy_s) if first or placement is DISK else 0.0


def ways_s(schedule: PassSchedule, *, first: bool = False) -> float:
    """Seconds of all blocks' ways, one after the other."""
    return sum(way_s(*placed, first=first) for placed in zip(schedule.blocks, schedule.placements, strict=True))


def sums(schedule: PassSchedule) -> tuple[float, float, float]:
    """Return the seconds of readers, link and computing in a decode pass, counted once more."""
    placed = list(zip(schedule.blocks, schedule.placements, strict=True))
    return (
        sum(t.read_s for t, place in placed if place is DISK) + sum(t.stage_s for t, place in placed if place is HOST),
        sum(t.copy_s for t, place in placed if place in TRAVELLING),
        schedule.pass_overhead_s + sum(t.decode_s for t, _ in placed),
    )


def prefill_work_s(schedule: PassSchedule) -> float:
    """Seconds of computing in the first pass."""
    return schedule.overhead_s(0) + sum(times.prefill_s for times in schedule.blocks)
