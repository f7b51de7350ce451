"""Tasks on the event core keep to their lanes, links, slots and order; it is the runtime's simulation too."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.planning.simulation.event_core import Execution, Schedule, fair_rates
from headrace.planning.timeline import Lane

CAPACITIES = {"own 0": 4.0, "own 1": 3.0, "own 2": 5.0, "uplink": 6.0, "root": 8.0}
PATHS = (("own 0",), ("own 0", "uplink"), ("own 1", "uplink"), ("own 2", "uplink", "root"), ("root",))
SECONDS = st.floats(0.01, 5.0) | st.sampled_from([0.0, 1.0, 2.0])


def close(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-9)


@dataclass
class Drawn:
    """One task as drawn: what the properties compare with."""

    lane: str | None
    seconds: float
    size_bytes: float
    path: tuple[str, ...]
    after: list[int] = field(default_factory=list)


@st.composite
def drawn_tasks(draw: st.DrawFn) -> list[Drawn]:
    tasks: list[Drawn] = []
    for number in range(draw(st.integers(1, 14))):
        lane = draw(st.sampled_from(["reader", "copier", "processor", None]))
        path = draw(st.sampled_from(PATHS)) if draw(st.booleans()) else ()
        amount = draw(SECONDS)
        after = draw(st.lists(st.integers(0, number - 1), max_size=3, unique=True)) if number else []
        tasks.append(Drawn(lane, 0.0 if path else amount, amount if path else 0.0, path, after))
    return tasks


def played(tasks: list[Drawn], **settings: Any) -> Execution:
    schedule = Schedule(capacities=CAPACITIES, **settings)
    for task in tasks:
        schedule.add(task.lane, task.seconds, size_bytes=task.size_bytes, path=task.path, after=task.after)
    return schedule.run()


def alone_s(task: Drawn) -> float:
    return task.seconds or max((task.size_bytes / CAPACITIES[link] for link in task.path), default=0.0)


@given(drawn_tasks())
def test_nothing_starts_before_what_it_comes_after_and_lanes_are_serial(tasks: list[Drawn]) -> None:
    outcome = played(tasks)
    last: dict[str, float] = defaultdict(float)
    for number, task in enumerate(tasks):
        start, end = outcome.starts[number], outcome.ends[number]
        ready = max((outcome.ends[other] for other in task.after), default=0.0)
        if task.lane is not None:
            ready = max(ready, last[task.lane])
            last[task.lane] = end
        assert start == ready, "started at once, and no sooner"
        assert end - start >= alone_s(task) * (1 - 1e-9) - 1e-9
        if not task.path:
            assert end - start == close(task.seconds)


@given(drawn_tasks())
def test_the_makespan_lies_between_its_bounds(tasks: list[Drawn]) -> None:
    outcome = played(tasks)
    chain: list[float] = []
    for task in tasks:
        chain.append(alone_s(task) + max((chain[other] for other in task.after), default=0.0))
    lanes: dict[str | None, float] = defaultdict(float)
    links: dict[str, float] = defaultdict(float)
    for task in tasks:
        lanes[task.lane] += alone_s(task)
        for link in task.path:
            links[link] += task.size_bytes / CAPACITIES[link]
    lanes.pop(None, None)
    least = max([*chain, *lanes.values(), *links.values()])
    assert least * (1 - 1e-9) <= max(outcome.ends) <= sum(map(alone_s, tasks)) * (1 + 1e-9) + 1e-9


@given(drawn_tasks())
def test_no_link_carries_more_than_it_can(tasks: list[Drawn]) -> None:
    """Between any two moments: what travelled wholly within them fits."""
    outcome = played(tasks)
    for link, capacity in CAPACITIES.items():
        spans = [
            (outcome.starts[n], outcome.ends[n], task.size_bytes) for n, task in enumerate(tasks) if link in task.path
        ]
        for first, last in itertools.product([s for s, _, _ in spans], [e for _, e, _ in spans]):
            inside = sum(size for start, end, size in spans if start >= first and end <= last)
            assert inside <= max(0.0, last - first) * capacity * (1 + 1e-9) + 1e-9


@given(st.dictionaries(st.integers(0, 9), st.sampled_from(PATHS), min_size=1))
def test_fair_rates_fill_a_link_of_every_flow_and_favour_nobody(paths: dict[int, tuple[str, ...]]) -> None:
    rates = fair_rates(paths, CAPACITIES)
    carried: dict[str, float] = defaultdict(float)
    for flow, path in paths.items():
        for link in path:
            carried[link] += rates[flow]
    assert all(total <= CAPACITIES[link] * (1 + 1e-9) for link, total in carried.items())
    for flow, path in paths.items():
        # some link of its path is full, and nobody on that link has more than this flow has
        assert any(
            carried[link] >= CAPACITIES[link] * (1 - 1e-9)
            and all(rates[other] <= rates[flow] * (1 + 1e-9) for other, way in paths.items() if link in way)
            for link in path
        )


def test_flows_that_share_an_uplink_take_from_one_another() -> None:
    schedule = Schedule(capacities={"a": 10.0, "b": 2.0, "up": 8.0})
    first = schedule.add("first", size_bytes=60.0, path=("a", "up"))
    second = schedule.add("second", size_bytes=4.0, path=("b", "up"))
    outcome = schedule.run()
    # 6 + 2 at first; when the second is through after 2 s, 48 bytes remain and all of the uplink is free: 6 s
    assert outcome.ends[second] == close(2.0)
    assert outcome.ends[first] == close(8.0)


def test_a_link_of_one_lane_is_its_own() -> None:
    schedule = Schedule(capacities={"a": 10.0, "b": math.inf})
    schedule.add("reader", size_bytes=20.0, path=("a", "b"))
    schedule.add("reader", size_bytes=20.0, path=("b",))
    assert schedule.run().ends == (2.0, 2.0)


def test_lanes_slow_one_another_only_while_both_are_busy() -> None:
    schedule = Schedule(
        capacities={"a": 1.0, "up": 1.0}, slowdowns={("compute", "read"): 1.5, ("read", "compute"): 2.0}
    )
    read = schedule.add("read", size_bytes=2.0, path=("a", "up"))
    schedule.add("compute", 1.0)
    other = schedule.add(None, 0.5)
    after = schedule.add(None, size_bytes=1.0, path=("up",), after=[read])
    outcome = schedule.run()
    assert outcome.ends[1] == close(1.5)
    assert outcome.ends[read] == close(1.5 + 1.25)
    assert outcome.ends[other] == 0.5
    assert outcome.ends[after] == close(3.75)


def test_a_ring_of_slots_holds_back_the_reader() -> None:
    schedule = Schedule(slots={"slot": 2})
    reads, computes = [], []
    for block in range(4):
        reads.append(schedule.add("read", 1.0, takes="slot", mark=(Lane.READ, block, 0)))
        computes.append(schedule.add("compute", 3.0, after=[reads[-1]], gives="slot", mark=(Lane.COMPUTE, block, 0)))
    outcome = schedule.run()
    assert [outcome.starts[n] for n in reads] == close([0, 1, 4, 7])
    assert [outcome.ends[n] for n in computes] == close([4, 7, 10, 13])
    timeline = outcome.timeline([f"block {n}" for n in range(4)])
    assert timeline.busy_s(Lane.COMPUTE) == close(12)
    assert timeline.busy_s(Lane.STALL) == close(1)
    assert timeline.pass_span(0) == close((0.0, 13.0))


def test_a_deadlock_names_what_waits_and_for_what() -> None:
    schedule = Schedule(slots={"ring": 1})
    schedule.add("read", 1.0, takes="ring")
    blocked = schedule.add("read", 1.0, takes="ring")
    schedule.add("compute", 1.0, after=[blocked], gives="ring")
    with pytest.raises(RuntimeError, match=r"task 1 \(read\) waits for a slot of 'ring'; task 2 .* waits for task 1"):
        schedule.run()


@pytest.mark.parametrize(
    "bad",
    [
        {"seconds": -1.0},
        {"seconds": math.inf},
        {"size_bytes": 5.0},
        {"size_bytes": 5.0, "path": ("nowhere",)},
        {"takes": "nothing"},
        {"gives": "nothing"},
        {"after": [3]},
        {"after": [-1]},
    ],
)
def test_tasks_that_cannot_be_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Schedule(capacities={"a": 1.0}).add("lane", **bad)


def test_links_without_capacity_and_slowdowns_that_speed_up_are_refused() -> None:
    with pytest.raises(ValueError, match="carries 0"):
        Schedule(capacities={"a": 0.0})
    with pytest.raises(ValueError, match="slowed"):
        Schedule(slowdowns={("a", "b"): 0.5})


@given(drawn_tasks())
@settings(max_examples=30)
def test_the_same_tasks_run_the_same_way(tasks: list[Drawn]) -> None:
    slowdowns = {("reader", "processor"): 1.3, ("processor", "reader"): 1.2}
    assert played(tasks, slowdowns=slowdowns) == played(tasks, slowdowns=slowdowns)


def test_sixteen_devices_on_one_uplink_are_simulated_in_well_under_a_second() -> None:
    """100 layers x 5 passes x 16 devices; sizes differ so that no two transfers end together."""
    capacities = {f"own {d}": 12e9 for d in range(16)} | {"up": 48e9}
    schedule = Schedule(capacities=capacities, slots={f"slot {d}": 2 for d in range(16)})
    for layer in range(500):
        for device in range(16):
            size = 1e8 * (1 + 0.01 * device + 0.003 * (layer % 7))
            pulled = schedule.add(
                f"link {device}", size_bytes=size, path=(f"own {device}", "up"), takes=f"slot {device}"
            )
            schedule.add(f"device {device}", 1e-3, after=[pulled], gives=f"slot {device}")
    begun = time.process_time()
    outcome = schedule.run()
    assert time.process_time() - begun < 3.0  # measured: 0.5 s; the bound allows for a busy computer
    total = sum(1e8 * (1 + 0.01 * d + 0.003 * (layer % 7)) for layer in range(500) for d in range(16))
    assert total / 48e9 <= max(outcome.ends) <= total / 48e9 * 1.15
