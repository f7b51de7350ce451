"""The runtime's simulation, put as tasks on the event core, happens moment for moment as it does in its own loop."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.planning.block_times import BlockTimes
from headrace.planning.plan import Placement
from headrace.planning.simulation.event_core import Execution, Schedule
from headrace.planning.simulation.one_copy import PassSchedule, simulate
from headrace.planning.timeline import Event, Lane, Timeline
from pass_schedules import close as close_to
from pass_schedules import times_without_link, uniform

NOISE_S = 1e-9
ON_CPU = [Placement.DEVICE, Placement.DISK]


def close(value: float | list[float]) -> Any:
    return close_to(value, link=False)


@st.composite
def schedules(draw: st.DrawFn) -> PassSchedule:
    """Draw one without a link, and where waiting costs nothing: the core's tasks take no longer for having waited."""
    count = draw(st.integers(1, 9))
    slowdown = st.just(1.0) | st.floats(1.0, 3.0)
    return PassSchedule(
        blocks=tuple(draw(st.lists(times_without_link, min_size=count, max_size=count))),
        placements=tuple(draw(st.lists(st.sampled_from(ON_CPU), min_size=count, max_size=count))),
        slots=draw(st.integers(1, 4)),
        overlap=draw(st.booleans()),
        decode_passes=draw(st.integers(0, 5)),
        pass_overhead_s=draw(st.sampled_from([0.0, 0.1])),
        compute_slowdown=draw(slowdown),
        read_slowdown=draw(slowdown),
    )


def on_event_core(schedule: PassSchedule) -> Execution:
    """Two lanes and a ring. Reads go on into passes that do not come, as far as there are slots for them."""
    passes, count = 1 + schedule.decode_passes, len(schedule.blocks)
    streamed = [placement is Placement.DISK for placement in schedule.placements]
    tasks = Schedule(
        slots={"slot": schedule.slots},
        slowdowns={
            ("compute", "read"): schedule.compute_slowdown,
            ("read", "compute"): schedule.read_slowdown,
        },
    )

    def read(pass_index: int, block: int, after: tuple[int, ...] = ()) -> int:
        return tasks.add(
            "read",
            schedule.blocks[block].read_s,
            after=after,
            takes="slot" if streamed[block] else None,
            mark=(Lane.READ, block, pass_index),
        )

    computed: tuple[int, ...] = ()
    for pass_index in range(passes):
        for block in range(count):
            ready = computed
            if streamed[block] or pass_index == 0:
                ready = (*computed, read(pass_index, block, () if schedule.overlap else computed))
            times = schedule.blocks[block]
            compute_s = times.decode_s if pass_index else times.prefill_s
            compute_s += schedule.pass_overhead_s if block == 0 else 0.0
            gives = "slot" if streamed[block] else None
            mark = (Lane.COMPUTE, block, pass_index)
            computed = (tasks.add("compute", compute_s, after=ready, gives=gives, mark=mark),)
    if schedule.overlap and any(streamed):
        travelling = [block for block in range(count) if streamed[block]]
        for number in range(schedule.slots):
            beyond, index = divmod(number, len(travelling))
            read(passes + beyond, travelling[index])
    return tasks.run()


def by_block(timeline: Timeline, lane: Lane) -> dict[tuple[int, int], Event]:
    return {(event.pass_index, event.block_index): event for event in timeline.events if event.lane is lane}


@given(schedules())
@example(uniform("ddddd", BlockTimes(1.0, 0.5, 0.25), decode_passes=4))
@settings(deadline=None, max_examples=300)
def test_every_read_computation_and_stall_is_the_same(schedule: PassSchedule) -> None:
    passes = 1 + schedule.decode_passes
    simulated = simulate(schedule)
    played = on_event_core(schedule).timeline([f"block {index}" for index in range(len(schedule.blocks))])
    for lane in (Lane.READ, Lane.COMPUTE, Lane.STALL):
        ours, theirs = by_block(played, lane), by_block(simulated.timeline, lane)
        for key in ours.keys() | theirs.keys():
            if key not in ours or key not in theirs:
                # a wait as short as a rounding error, or a read that the last computation did not wait for
                alone = ours.get(key) or theirs[key]
                assert (lane is Lane.STALL and alone.duration_s <= NOISE_S) or (lane is Lane.READ and key[0] >= passes)
                continue
            assert [ours[key].start_s, ours[key].end_s] == close([theirs[key].start_s, theirs[key].end_s]), (lane, key)
    assert max(e.end_s for k, e in by_block(played, Lane.COMPUTE).items() if k[0] == 0) == close(simulated.prefill_s)
