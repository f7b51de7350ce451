"""The runtime's simulation, put as tasks on the event core, happens moment for moment as it does in its own loop."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.planning.simulation.event_core import Mark, Outcome, Schedule
from headrace.planning.simulation.simulator import BlockTimes, Scenario, fetch_order, simulate
from headrace.planning.timeline import Event, Lane, Timeline

SECONDS = st.floats(0.001, 10.0) | st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])
NOISE_S = 1e-9


def close(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9, abs=NOISE_S)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Scenarios without hand-over times: the core's tasks take no longer for having waited."""
    count = draw(st.integers(1, 9))
    times = st.builds(BlockTimes, SECONDS, SECONDS, SECONDS)
    slowdown = st.just(1.0) | st.floats(1.0, 3.0)
    return Scenario(
        blocks=tuple(draw(st.lists(times, min_size=count, max_size=count))),
        resident=tuple(draw(st.lists(st.booleans(), min_size=count, max_size=count))),
        slots=draw(st.integers(1, 4)),
        overlap=draw(st.booleans()),
        decode_passes=draw(st.integers(0, 5)),
        pass_overhead_s=draw(st.sampled_from([0.0, 0.1])),
        compute_slowdown=draw(slowdown),
        read_slowdown=draw(slowdown),
    )


def on_event_core(scenario: Scenario) -> Outcome:
    """Two lanes and a ring. Reads go on into a pass that does not come, as far as there are slots for it."""
    passes, count = 1 + scenario.decode_passes, len(scenario.blocks)
    schedule = Schedule(
        slots={"slot": scenario.slots},
        slowdowns={
            ("compute", "read"): scenario.compute_slowdown,
            ("read", "compute"): scenario.read_slowdown,
        },
    )

    def read(pass_index: int, block: int, after: tuple[int, ...] = ()) -> int:
        return schedule.add(
            "read",
            scenario.blocks[block].read_s,
            after=after,
            takes=None if scenario.resident[block] else "slot",
            mark=Mark(Lane.READ, block, pass_index),
        )

    computed: tuple[int, ...] = ()
    for pass_index in range(passes):
        for block in range(count):
            streamed = not scenario.resident[block]
            ready = computed
            if streamed or pass_index == 0:
                ready = (*computed, read(pass_index, block, () if scenario.overlap else computed))
            times = scenario.blocks[block]
            compute_s = times.decode_s if pass_index else times.prefill_s
            compute_s += scenario.pass_overhead_s if block == 0 else 0.0
            gives = "slot" if streamed else None
            mark = Mark(Lane.COMPUTE, block, pass_index)
            computed = (schedule.add("compute", compute_s, after=ready, gives=gives, mark=mark),)
    if scenario.overlap:
        beyond = [fetch for fetch in fetch_order(scenario.resident, passes + 1) if fetch.pass_index == passes]
        for fetch in beyond[: scenario.slots]:
            read(passes, fetch.block_index)
    return schedule.run()


def by_block(timeline: Timeline, lane: Lane) -> dict[tuple[int, int], Event]:
    return {(event.pass_index, event.block_index): event for event in timeline.events if event.lane is lane}


@given(scenarios())
@example(Scenario(blocks=(BlockTimes(1.0, 0.5, 0.25),) * 5, resident=(False,) * 5, slots=2, overlap=True))
@settings(deadline=None, max_examples=300)
def test_every_read_computation_and_stall_is_the_same(scenario: Scenario) -> None:
    passes = 1 + scenario.decode_passes
    simulated = simulate(scenario)
    played = on_event_core(scenario).timeline([f"block {index}" for index in range(len(scenario.blocks))])
    for lane in (Lane.READ, Lane.COMPUTE, Lane.STALL):
        ours, theirs = by_block(played, lane), by_block(simulated.timeline, lane)
        for key in ours.keys() | theirs.keys():
            if key not in ours or key not in theirs:
                # a wait as short as a rounding error, or a read that the last computation did not wait for
                alone = ours.get(key) or theirs[key]
                assert (lane is Lane.STALL and alone.duration_s <= NOISE_S) or (lane is Lane.READ and key[0] == passes)
                continue
            assert (ours[key].start_s, ours[key].end_s) == close((theirs[key].start_s, theirs[key].end_s)), (lane, key)
    assert max(e.end_s for k, e in by_block(played, Lane.COMPUTE).items() if k[0] == 0) == close(simulated.prefill_s)
