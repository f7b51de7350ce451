"""Work that flows over resources, played through in continuous time: what every simulated strategy is executed on.

A task is seconds of work in a lane, or bytes over a path of links. It starts when all tasks it comes after have ended,
when its turn in its lane has come (a lane does one task at a time, in the order they were added: a processor, a copy
engine, a reader) and when the slot that it takes is free (slots are given back by the end of some other task: a ring).
Bytes that travel at once over a link share it max-min fairly: none can have more without taking from one that has less.
Lanes may slow one another while both are busy. Between events everything goes on at constant rates, so the times are
exact but for rounding; equal inputs give equal results.

The runtime's planner keeps a loop of its own (`one_copy.py`): it tries many plans before each run, and
knowing that there is one reader, one link and one ring makes it several times as fast. It is held against this core by
tests, without a link event by event; what it knows beyond (the cost of having waited) is not here.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headrace.planning.timeline import Event, Lane, Timeline

_SAME_MOMENT = 1e-12
"""share of the time passed within which ends count as one moment"""


Mark = tuple[Lane, int, int]
"""how a task is drawn: lane, block, pass"""


class _Task(NamedTuple):
    lane: str | None
    seconds: float
    size_bytes: float
    path: tuple[str, ...]
    after: tuple[int, ...]
    takes: str | None
    gives: str | None
    mark: Mark | None


@dataclass(frozen=True)
class Execution:
    """Start and end of every task, in seconds, by the number that `Schedule.add` returned."""

    starts: tuple[float, ...]
    ends: tuple[float, ...]
    marks: tuple[Mark | None, ...]

    def timeline(self, block_names: Sequence[str]) -> Timeline:
        """The marked tasks as events, and where computing waits for its next block as stalls.

        Several processors marked as computing are drawn in one row; a stall is then when none of them computes.
        """
        events = [
            Event(*mark, start, end)
            for mark, start, end in zip(self.marks, self.starts, self.ends, strict=True)
            if mark is not None
        ]
        events.sort(key=lambda event: (event.start_s, event.end_s))
        reached, stalls = 0.0, []
        for event in events:
            if event.lane is not Lane.COMPUTE:
                continue
            if event.start_s > reached * (1 + _SAME_MOMENT):
                stalls.append(Event(Lane.STALL, event.block_index, event.pass_index, reached, event.start_s))
            reached = max(reached, event.end_s)
        return Timeline((*events, *stalls), tuple(block_names))


class Schedule:
    """Tasks to be run; `capacities` are bytes per second by link, `slots` how many of each kind there are.

    `slowdowns` maps (lane, other lane) to the factor by which the first takes longer while the other is busy. What a
    slowed transfer leaves of a shared link is not handed to others.
    """

    def __init__(
        self,
        *,
        capacities: Mapping[str, float] | None = None,
        slots: Mapping[str, int] | None = None,
        slowdowns: Mapping[tuple[str, str], float] | None = None,
    ) -> None:
        self._capacities = dict(capacities or {})
        self._slots = dict(slots or {})
        self._slowed_by: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for (lane, other), factor in (slowdowns or {}).items():
            if factor < 1 or lane == other:
                raise ValueError(f"{lane} cannot be slowed by {other} by a factor of {factor}")
            self._slowed_by[lane].append((other, factor))
        for link, capacity in self._capacities.items():
            if not capacity > 0:
                raise ValueError(f"the link {link} carries {capacity} bytes per second")
        self._tasks: list[_Task] = []

    def add(
        self,
        lane: str | None = None,
        seconds: float = 0.0,
        *,
        size_bytes: float = 0.0,
        path: Sequence[str] = (),
        after: Iterable[int] = (),
        takes: str | None = None,
        gives: str | None = None,
        mark: Mark | None = None,
    ) -> int:
        """Add a task of `seconds` at full speed, or of `size_bytes` over the links of `path`; return its number.

        `after` names tasks added before. `takes` is a kind of slot held from the start on, `gives` one that is free
        again at the end. Without a lane a task waits for no turn.
        """
        after = tuple(after)
        if not 0 <= seconds < math.inf or not 0 <= size_bytes < math.inf or (seconds and path):
            raise ValueError(f"a task of {seconds} s and {size_bytes} bytes over {path or 'no link'} cannot be run")
        if size_bytes and not path:
            raise ValueError(f"{size_bytes} bytes need a path to travel")
        for link in path:
            if link not in self._capacities:
                raise ValueError(f"no capacity is known of the link {link}")
        for kind in (takes, gives):
            if kind is not None and kind not in self._slots:
                raise ValueError(f"there are no slots called {kind}")
        if any(not 0 <= number < len(self._tasks) for number in after):
            raise ValueError(f"a task can come only after tasks added before it: {after}")
        self._tasks.append(_Task(lane, seconds, size_bytes, tuple(path), after, takes, gives, mark))
        return len(self._tasks) - 1

    def run(self) -> Execution:
        """Play everything through. Raises RuntimeError, naming what waits, where nothing can go on."""
        return _Run(self._tasks, self._capacities, self._slots, self._slowed_by).outcome()


def fair_rates(paths: Mapping[int, Sequence[str]], capacities: Mapping[str, float]) -> dict[int, float]:
    """Max-min fair bytes per second of each flow: the tightest link is divided equally, then the next tightest."""
    left = {link: capacities[link] for path in paths.values() for link in path}
    users: dict[str, set[int]] = defaultdict(set)
    for flow, path in paths.items():
        for link in path:
            users[link].add(flow)
    rates: dict[int, float] = {}
    while len(rates) < len(paths):
        shares = {link: max(0.0, left[link]) / len(flows) for link, flows in users.items() if flows}
        least = min(shares.values())
        tight = [link for link, share in shares.items() if share <= least * (1 + _SAME_MOMENT)]
        for flow in sorted(set().union(*(users[link] for link in tight))):
            rates[flow] = least
            for link in paths[flow]:
                users[link].discard(flow)
                left[link] -= least
    return rates


class _Run:
    """One execution; what is mutable lives here."""

    def __init__(
        self,
        tasks: Sequence[_Task],
        capacities: Mapping[str, float],
        slots: Mapping[str, int],
        slowed_by: Mapping[str, Sequence[tuple[str, float]]],
    ) -> None:
        self.tasks, self.capacities = tasks, capacities
        self.free = dict(slots)
        self.slowed_by = slowed_by
        self.slows: dict[str, list[str]] = defaultdict(list)
        for lane, others in slowed_by.items():
            for other, _ in others:
                self.slows[other].append(lane)
        self.now = 0.0
        self.starts, self.ends = [math.nan] * len(tasks), [math.nan] * len(tasks)
        self.waits_for = [len(task.after) for task in tasks]
        self.followers: list[list[int]] = [[] for _ in tasks]
        self.queues: dict[str, list[int]] = defaultdict(list)
        self.wanting: dict[str, list[int]] = {kind: [] for kind in slots}
        for number, task in enumerate(tasks):
            for before in task.after:
                self.followers[before].append(number)
            if task.lane is not None:
                self.queues[task.lane].append(number)
        self.turn = dict.fromkeys(self.queues, 0)
        self.busy: dict[str, int] = {}  # by lane, what it does
        self.left: dict[int, float] = {}  # of running tasks: seconds or bytes still to do, as of `since`
        self.since: dict[int, float] = {}
        self.rate: dict[int, float] = {}
        self.flows: dict[int, tuple[str, ...]] = {}  # of running tasks those that share a link
        self.alarms: list[tuple[float, int, float]] = []
        self.private = self._private_links()

    def outcome(self) -> Execution:
        """Run to the end."""
        self._go_on(sorted(number for number, count in enumerate(self.waits_for) if count == 0))
        while self.alarms:
            moment, number, rate = heapq.heappop(self.alarms)
            if self.rate.get(number) != rate or self._due(number) > moment * (1 + _SAME_MOMENT):
                continue
            self.now = max(self.now, moment)
            finished = {number}
            soon = self.now * (1 + _SAME_MOMENT)
            while self.alarms and self.alarms[0][0] <= soon:
                _, other, rate = heapq.heappop(self.alarms)
                if self.rate.get(other) == rate and self._due(other) <= soon:
                    finished.add(other)
            self._go_on([], sorted(finished))
        if any(math.isnan(end) for end in self.ends):
            raise RuntimeError(self._what_waits())
        return Execution(tuple(self.starts), tuple(self.ends), tuple(task.mark for task in self.tasks))

    def _private_links(self) -> set[str]:
        """Links that one lane alone uses: what travels there never shares, so its time is known at the start."""
        users: dict[str, set[str | None]] = defaultdict(set)
        for task in self.tasks:
            for link in task.path:
                users[link].add(task.lane)
        return {link for link, lanes in users.items() if len(lanes) == 1 and None not in lanes}

    def _due(self, number: int) -> float:
        return self.since[number] + self.left[number] / self.rate[number]

    def _go_on(self, candidates: list[int], finished: Sequence[int] = ()) -> None:
        """End tasks, start all that can start now (in the order of their numbers), then set the rates anew."""
        shared = False
        lanes: set[str] = set()
        ended = list(finished)
        heapq.heapify(candidates)
        while ended or candidates:
            if ended:
                number = ended.pop(0)
                shared |= self._end(number, candidates, lanes)
                continue
            number = heapq.heappop(candidates)
            if not self._can_start(number):
                continue
            task = self.tasks[number]
            if task.takes is not None:
                self.free[task.takes] -= 1
            self.starts[number] = self.now
            if task.lane is not None:
                self.busy[task.lane] = number
                lanes.add(task.lane)
            work, path = self._work(task)
            if work <= 0:
                ended.append(number)
                continue
            self.left[number], self.since[number], self.rate[number] = work, self.now, 0.0
            if path:
                self.flows[number] = path
                shared = True
            else:
                self._set_rate(number)
        slowed = sorted({slow for lane in lanes for slow in self.slows.get(lane, ())} & self.busy.keys())
        if shared or any(self.busy[lane] in self.flows for lane in slowed):
            for number, rate in fair_rates(self.flows, self.capacities).items():
                self._set_rate(number, rate)
        for lane in slowed:
            if self.busy[lane] not in self.flows:
                self._set_rate(self.busy[lane])

    def _end(self, number: int, candidates: list[int], lanes: set[str]) -> bool:
        """End a task now; push what may start. Return whether it shared a link."""
        task = self.tasks[number]
        self.ends[number] = self.now
        for state in (self.left, self.since, self.rate):
            state.pop(number, None)
        if task.gives is not None:
            self.free[task.gives] += 1
            for waiting in self.wanting[task.gives]:
                heapq.heappush(candidates, waiting)
            self.wanting[task.gives].clear()
        for follower in self.followers[number]:
            self.waits_for[follower] -= 1
            if not self.waits_for[follower]:
                heapq.heappush(candidates, follower)
        if task.lane is not None:
            del self.busy[task.lane]
            lanes.add(task.lane)
            self.turn[task.lane] += 1
            queue = self.queues[task.lane]
            if self.turn[task.lane] < len(queue):
                heapq.heappush(candidates, queue[self.turn[task.lane]])
        return self.flows.pop(number, None) is not None

    def _can_start(self, number: int) -> bool:
        task = self.tasks[number]
        if self.waits_for[number] or not math.isnan(self.starts[number]):
            return False
        if task.lane is not None and (task.lane in self.busy or self.queues[task.lane][self.turn[task.lane]] != number):
            return False
        if task.takes is not None and self.free[task.takes] < 1:
            self.wanting[task.takes].append(number)
            return False
        return True

    def _work(self, task: _Task) -> tuple[float, tuple[str, ...]]:
        """Return the seconds of a task that shares no link, or its bytes and the path that it shares."""
        path = tuple(link for link in task.path if self.capacities[link] < math.inf)
        if not path or not task.size_bytes:
            return task.seconds, ()
        if all(link in self.private for link in path):
            return task.size_bytes / min(self.capacities[link] for link in path), ()
        return task.size_bytes, path

    def _set_rate(self, number: int, rate: float = 1.0) -> None:
        """Let a running task go on at this rate, less what busy lanes slow it by; set its alarm."""
        lane = self.tasks[number].lane
        for other, factor in self.slowed_by.get(lane, ()) if lane is not None else ():
            if other in self.busy:
                rate /= factor
        if rate == self.rate[number]:
            return
        self.left[number] -= (self.now - self.since[number]) * self.rate[number]
        self.since[number], self.rate[number] = self.now, rate
        heapq.heappush(self.alarms, (self._due(number), number, rate))

    def _what_waits(self) -> str:
        lines = []
        heads = [queue[self.turn[lane]] for lane, queue in self.queues.items() if self.turn[lane] < len(queue)]
        loose = [n for n, task in enumerate(self.tasks) if task.lane is None and math.isnan(self.ends[n])]
        for number in sorted(heads + loose)[:8]:
            task = self.tasks[number]
            before = [str(other) for other in task.after if math.isnan(self.ends[other])]
            why = f"a slot of {task.takes!r}" if not before else f"task {', '.join(before)}"
            lines.append(f"task {number} ({task.lane or 'no lane'}) waits for {why}")
        return "the simulated work cannot go on: " + "; ".join(lines)
