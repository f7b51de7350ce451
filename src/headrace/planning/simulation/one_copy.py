"""Play the passes of one copy of a model: readers, link, and the device or CPU that computes; k slots.

The runtime's order, exactly: blocks travel in cyclic order, over the end of a pass into the next one. One that travels
(from host memory or from the disk) is requested when a slot is free, that is when the block in it has been computed.
Readers take what is requested in that order. In the first pass they read every block: what the device shall hold or is
to compute now goes on over the link piece by piece as it is read, what shall stay on the host is written into its
store, and a block that travels from there is copied when its store is whole. Copies out of stores are one lane, copies
of what comes through the ring another; each is first in, first out. Device and CPU take turns in the order of blocks
and never compute at once, but while the CPU does, disk and link go on into free slots. A run on the CPU alone is the
case without a link: what is read is there.

Reading and computing may slow each other; while both go on, each runs at its reduced speed. A stage that had to wait
starts late: an idle reader brings its first bytes after `read_latency_s`, and the block that computing waited for takes
`stall_penalty_s` longer.

What is approximate: bytes flow instead of coming in pieces, so a block arrives the shorter of one piece's reading and
copying after it would flow; two lanes that both want the link get half of it each, and what one does not need the other
takes (max-min fair, as `event_core`, against which a test holds this); the ring is full when all its pieces but the one
that is being read wait to be copied; a reader asks for a slot that the device has left, while the runtime's may fill
the ring a moment earlier.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headrace.planning.block_times import BlockTimes, PassDemand
from headrace.planning.pass_times import least_s
from headrace.planning.plan import TRAVELLING, Placement
from headrace.planning.timeline import Event, Lane, Timeline

_DONE = 1e-12
"""seconds of work left that count as none"""

_AT_ONCE = 1e-9
"""seconds that reading into the ring takes at least, so that what it brings comes at some rate"""


@dataclass(frozen=True, kw_only=True)
class PassSchedule:
    """Everything the simulation depends on. In a run on the CPU alone each block is at DEVICE, its memory, or DISK."""

    blocks: tuple[BlockTimes, ...]
    placements: tuple[Placement, ...]
    slots: int
    overlap: bool
    """False: a block is requested only when its turn to compute has come, and dropped afterwards"""
    ring_pieces: int = 4
    """pieces that may be read and not yet copied, with the one that is being read; at least 2"""
    decode_passes: int = 4
    pass_overhead_s: float = 0.0
    first_pass_overhead_s: float | None = None
    """of the first pass; None: as every pass"""
    read_latency_s: float = 0.0
    """extra seconds of a read that finds the readers idle, and of every one that is asked on demand"""
    stall_penalty_s: float = 0.0
    """extra seconds of computing a block that computing had to wait for"""
    compute_slowdown: float = 1.0
    """factor on the seconds of computing while anything is read"""
    read_slowdown: float = 1.0
    """factor on the seconds of reading while anything is computed"""

    def overhead_s(self, pass_index: int) -> float:
        """Seconds of a pass apart from its blocks."""
        first = self.first_pass_overhead_s
        return first if pass_index == 0 and first is not None else self.pass_overhead_s

    @property
    def demand(self) -> PassDemand:
        """What a decode pass takes of each resource."""
        return PassDemand.of(self.blocks, self.placements, overhead_s=self.pass_overhead_s)

    @property
    def least_decode_s(self) -> float:
        """Seconds of a decode pass that no order goes below."""
        read_s, copy_s, compute_s = self.demand
        return max(copy_s, least_s(read_s, compute_s, self.read_slowdown, self.compute_slowdown))


class PassSeconds(NamedTuple):
    """The first pass, which also brings the residents, and a steady decode pass.

    The steady pass is the one of a long run: a lead that the readers won during prefill does not count in it.
    """

    prefill_s: float
    decode_s_per_pass: float


class Simulated(NamedTuple):
    """Outcome: seconds as in `PassSeconds`, and all events."""

    prefill_s: float
    decode_s_per_pass: float
    timeline: Timeline


def pass_seconds(schedule: PassSchedule) -> PassSeconds:
    """Run prefill and `decode_passes` decode passes; O(passes x blocks)."""
    return _played(schedule, None)


def simulate(schedule: PassSchedule, block_names: Sequence[str] | None = None) -> Simulated:
    """The same run with everything that happens in it, which takes longer to write down."""
    events: list[Event] = []
    seconds = _played(schedule, events)
    names = tuple(block_names or (f"block {index}" for index in range(len(schedule.blocks))))
    return Simulated(*seconds, Timeline(tuple(events), names))


def _played(schedule: PassSchedule, events: list[Event] | None) -> PassSeconds:
    run = _Run(schedule, events)
    run.play()
    ends, passes, steady_s = run.pass_ends, 1 + schedule.decode_passes, 0.0
    if schedule.decode_passes:
        half = passes // 2 if passes > 2 else 0
        steady_s = max((ends[-1] - ends[half]) / (passes - 1 - half), schedule.least_decode_s)
    return PassSeconds(ends[0], steady_s)


class _Journey(NamedTuple):
    """One block's way from where it lies, or a part of it."""

    number: int
    """of the block through all passes: `pass_index * count + block_index`"""
    takes_slot: bool
    read_s: float
    """of a reader; 0 where it is copied from page-locked memory"""
    copy_s: float
    """over the link: behind the reader, or out of its store"""
    from_disk: bool
    by_reader: bool
    """False: the link alone, from page-locked memory"""
    lag_s: float
    """by how much the last piece is there later than if bytes flowed"""
    ring_s: float
    """of copying, that the ring holds back at most"""
    onward: _Journey | None = None
    """where it goes when its store is whole"""


def _journeys(schedule: PassSchedule) -> Iterator[_Journey]:
    """What is requested, in order: every block in the first pass, then those that travel, round and round for ever."""
    again: list[_Journey] = []
    for block, (times, placement) in enumerate(zip(schedule.blocks, schedule.placements, strict=True)):
        from_disk = placement is not Placement.HOST
        read_s = times.read_s if from_disk else times.stage_s
        way = _Journey(
            number=block,
            takes_slot=placement in TRAVELLING,
            read_s=read_s,
            copy_s=times.copy_s,
            from_disk=from_disk,
            by_reader=from_disk or read_s > 0.0,
            lag_s=min(read_s, times.copy_s) / times.pieces,
            ring_s=times.copy_s * (schedule.ring_pieces - 1) / times.pieces,
        )
        if way.takes_slot:
            again.append(way)
        if placement in (Placement.HOST, Placement.CPU):
            onward = None if from_disk else way._replace(takes_slot=False)
            way = way._replace(read_s=times.first_read_s, copy_s=0.0, from_disk=True, by_reader=True, onward=onward)
        yield way
    for start in itertools.count(len(schedule.blocks), len(schedule.blocks)) if again else ():
        for way in again:
            yield _Journey(start + way.number, *way[1:])


class _Ring:
    """The way over the ring: bytes flow in as they are read, out over the link. Counted in seconds of all the link."""

    def __init__(self) -> None:
        self.blocks: deque[_Journey] = deque()  # read or being read, not copied to the end
        self.left = 0.0  # of the first of them to copy
        self.start = self.end = 0.0  # when copying the first of them began, and the one before was there
        self.first_is_read = False
        self.behind = 0.0  # read and not copied
        self.flow = 0.0  # comes with a second of reading
        self.rate = self.growth = 0.0  # copied in a second, and added to what is behind
        self.arriving: deque[tuple[float, int]] = deque()  # moments and numbers of copied blocks whose last piece lags

    def enter(self, journey: _Journey, read_s: float, now: float) -> None:
        """Take up a block that begins to be read."""
        if self.blocks:
            self.first_is_read = True
        else:
            self.left, self.start = journey.copy_s, now
        self.blocks.append(journey)
        self.flow = journey.copy_s / read_s

    def read_to_its_end(self) -> None:
        """Note that the last block is read."""
        self.flow, self.first_is_read = 0.0, True

    def share(self, now: float, read_rate: float, *, alone: bool) -> tuple[float, float]:
        """Take of the link what is wanted, or half of it if another copy wants it too.

        Returns the rate of reading, and the seconds until a block is copied, a last piece is there, or the ring is full
        or empty.
        """
        inflow, most = self.flow * read_rate, 1.0 if alone else 0.5
        self.rate = most if self.first_is_read or self.behind > _DONE else min(inflow, most)
        self.growth = inflow - self.rate
        step = self.left / self.rate if self.first_is_read else math.inf
        if self.arriving:
            step = min(step, self.arriving[0][0] - now)
        if self.growth > 0.0:
            room_s = self.blocks[-1].ring_s - self.behind
            if room_s <= _DONE:
                self.growth, read_rate = 0.0, self.rate / self.flow
            else:
                step = min(step, room_s / self.growth)
        elif self.flow and self.growth < 0.0 and self.behind > _DONE:
            step = min(step, self.behind / -self.growth)
        return read_rate, step

    def advance(self, step: float) -> None:
        """Let `step` seconds pass."""
        self.left -= step * self.rate
        self.behind = max(0.0, self.behind + step * self.growth)

    def leave(self, now: float) -> tuple[int, float, float]:
        """Let go of the first block, copied: its number, when copying it began, when its last piece is there."""
        copied = self.blocks.popleft()
        start, self.end = max(self.end, self.start + copied.lag_s), max(self.end, now + copied.lag_s)
        self.arriving.append((self.end, copied.number))
        self.start = now
        if self.blocks:
            self.left = self.blocks[0].copy_s
        else:
            self.behind = 0.0
        self.first_is_read = len(self.blocks) > 1 or (len(self.blocks) == 1 and not self.flow)
        return copied.number, start, self.end


class _Run:
    """One run, from event to event; what is mutable lives here."""

    def __init__(self, schedule: PassSchedule, events: list[Event] | None) -> None:
        self.schedule = schedule
        self.events = events
        self.count = len(schedule.blocks)
        self.rates_together = 1 / schedule.read_slowdown, 1 / schedule.compute_slowdown
        self.travels = [placement in TRAVELLING for placement in schedule.placements]
        self.journeys = _journeys(schedule)
        self.coming = next(self.journeys, None)
        self.slots_free = schedule.slots
        self.stored: set[int] = set()  # blocks whose store is whole
        self.there: set[int] = set()  # numbers that may be computed
        self.to_read: deque[_Journey] = deque()
        self.to_send: deque[_Journey] = deque()  # out of page-locked stores
        self.reading: _Journey | None = None
        self.sending: _Journey | None = None
        self.ring = _Ring()
        self.due = 0  # number that is computed now or next
        self.computing = False
        self.now = self.read_start = self.read_end = self.send_start = self.compute_start = self.compute_end = 0.0
        self.read_left = self.send_left = self.compute_left = 0.0  # seconds of each alone
        self.pass_ends: list[float] = []

    def play(self) -> None:
        """Compute all passes. Readers go on into passes that do not come."""
        total = self.count * (1 + self.schedule.decode_passes)
        self._request()
        while self.due < total:
            self._begin()
            self._advance()
            self._finish()

    def _request(self) -> None:
        """Queue what there is a slot for; asked again when a block is computed, and when a store is whole."""
        while (journey := self.coming) is not None:
            if journey.takes_slot and not self.slots_free:
                return
            if not self.schedule.overlap and (self.computing or self.due != journey.number):
                return
            if not journey.from_disk and journey.number % self.count not in self.stored:
                return  # fewer blocks than slots: its store is not whole yet
            self.slots_free -= journey.takes_slot
            (self.to_read if journey.by_reader else self.to_send).append(journey)
            self.coming = next(self.journeys, None)

    def _begin(self) -> None:
        """Let readers, link, and device or CPU take up their next block where they are idle."""
        if self.reading is None and self.to_read:
            self.reading, self.read_start = self.to_read.popleft(), self.now
            self.read_left = self.reading.read_s
            if self.now > self.read_end or not self.schedule.overlap:
                self.read_left += self.schedule.read_latency_s
            if self.reading.copy_s:
                self.read_left = max(self.read_left, _AT_ONCE)
                self.ring.enter(self.reading, self.read_left, self.now)
        if self.sending is None and self.to_send:
            self.sending, self.send_start = self.to_send.popleft(), self.now
            self.send_left = self.sending.copy_s
        if not self.computing and self.due in self.there:
            self._begin_to_compute()

    def _begin_to_compute(self) -> None:
        pass_index, block = divmod(self.due, self.count)
        times = self.schedule.blocks[block]
        self.compute_left = times.decode_s if pass_index else times.prefill_s
        if block == 0:
            self.compute_left += self.schedule.overhead_s(pass_index)
        if self.now > self.compute_end:
            self._record(Lane.STALL, self.due, self.compute_end, self.now)
            self.compute_left += self.schedule.stall_penalty_s
        self.computing, self.compute_start = True, self.now

    def _advance(self) -> None:
        """Let time pass until something ends or a rate changes; in between everything goes on at constant rates."""
        ring, reading, sending, computing = self.ring, self.reading, self.sending, self.computing
        read_rate = compute_rate = send_rate = 1.0
        step = math.inf
        if reading and computing:
            read_rate, compute_rate = self.rates_together
        in_ring = ring.blocks or ring.arriving
        if in_ring:
            read_rate, step = ring.share(self.now, read_rate, alone=sending is None)
            send_rate -= ring.rate
        # Not min(): this is where the time of planning goes.
        if computing and self.compute_left < step * compute_rate:
            step = self.compute_left / compute_rate
        if reading and self.read_left < step * read_rate:
            step = self.read_left / read_rate
        if sending and self.send_left < step * send_rate:
            step = self.send_left / send_rate
        if step == math.inf:
            raise AssertionError("the simulated passes cannot go on: no slot for the block that is due")
        self.now += step
        self.compute_left -= step * compute_rate
        self.read_left -= step * read_rate
        self.send_left -= step * send_rate
        if in_ring:
            ring.advance(step)

    def _finish(self) -> None:
        """Hand on what has come to its end."""
        if self.reading is not None and self.read_left <= _DONE:
            self._finish_reading(self.reading)
        if self.sending is not None and self.send_left <= _DONE:
            self._record(Lane.COPY, self.sending.number, self.send_start, self.now)
            self.there.add(self.sending.number)
            self.sending = None
        ring = self.ring
        while ring.first_is_read and ring.left <= _DONE:
            self._record(Lane.COPY, *ring.leave(self.now))
        while ring.arriving and ring.arriving[0][0] <= self.now:
            self.there.add(ring.arriving.popleft()[1])
        if self.computing and self.compute_left <= _DONE:
            self._finish_computing()

    def _finish_reading(self, journey: _Journey) -> None:
        if journey.from_disk:
            self._record(Lane.READ, journey.number, self.read_start, self.now)
        if journey.onward is not None:
            self.stored.add(journey.number)
            (self.to_read if journey.onward.by_reader else self.to_send).append(journey.onward)
            self._request()
        elif journey.copy_s:
            self.ring.read_to_its_end()
        else:
            self.there.add(journey.number)
        self.reading, self.read_end = None, self.now

    def _finish_computing(self) -> None:
        self._record(Lane.COMPUTE, self.due, self.compute_start, self.now)
        block = self.due % self.count
        if self.travels[block]:
            self.slots_free += 1
        else:
            self.there.add(self.due + self.count)
        if block == self.count - 1:
            self.pass_ends.append(self.now)
        self.due += 1
        self.computing, self.compute_end = False, self.now
        self._request()

    def _record(self, lane: Lane, number: int, start: float, end: float) -> None:
        if self.events is None:
            return
        pass_index, block = divmod(number, self.count)
        self.events.append(Event(lane, block, pass_index, start, end))
