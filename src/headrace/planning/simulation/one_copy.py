"""Play an accelerator's plan through: disk, link, device and processor; blocks from four places; k slots.

The runtime's order, exactly: blocks travel in cyclic order, over the end of a pass into the next one. One that travels
(from host memory or from the disk) is requested when a slot is free, that is when the device has computed the block in
it. Readers take what is requested in that order. In the first pass they read every block: what the device shall hold or
is to compute now goes on over the link piece by piece as it is read, what shall stay on the host is written into its
store, and a block that travels from there is copied when its store is whole. Copies out of stores are one lane, copies
of what comes through the ring another; each is first in, first out. Whoever computes takes the blocks in order: device
and processor never compute at once, but while the processor does, disk and link go on into free slots.

What is approximate: bytes flow instead of coming in pieces, so a block arrives the shorter of one piece's reading and
copying after it would flow; two lanes that both want the link get half of it each, and what one does not need the other
takes (max-min fair, as `event_core`, against which a test holds this); the ring is full when all its pieces but the one
that is being read wait to be copied; a reader asks for a slot that the device has left, while the runtime's may fill
the ring a moment earlier. Nothing slows anything else down but by sharing the link.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headrace.planning.plan import TRAVELLING, Placement
from headrace.planning.simulation.simulator import Simulated
from headrace.planning.timeline import Event, Lane, Timeline

_DONE = 1e-12
"""seconds of work left that count as none"""

_AT_ONCE = 1e-9
"""seconds that reading takes at least, so that what it brings comes at some rate"""


class TieredTimes(NamedTuple):
    """Seconds that a block takes of each resource, alone."""

    read_s: float
    """of the disk"""
    copy_s: float
    """of the link, from host memory to the device; the processor's blocks need none"""
    prefill_s: float
    decode_s: float
    """of whoever computes it in a prefill and in a decode pass, the processor's own with the way of the activations"""
    store_s: float = 0.0
    """of a reader, to write it into its store in host memory once, beside reading (HOST, PROCESSOR)"""
    stage_s: float = 0.0
    """of a reader, to bring it from a store that could not be page-locked into the ring (HOST); 0: it is page-locked"""
    pieces: int = 8
    """in which it is read and copied"""

    @property
    def first_read_s(self) -> float:
        """Reading into a store: one reader reads a piece while another one writes the piece before."""
        return max(self.read_s, self.store_s) + min(self.read_s, self.store_s) / self.pieces


@dataclass(frozen=True, kw_only=True)
class TieredScenario:
    """Everything the simulation depends on."""

    blocks: tuple[TieredTimes, ...]
    places: tuple[Placement, ...]
    slots: int
    overlap: bool
    """False: a block is requested only when its turn to compute has come, and dropped afterwards"""
    ring_pieces: int = 4
    """pieces that may be read and not yet copied, with the one that is being read; at least 2"""
    decode_passes: int = 4
    pass_overhead_s: float = 0.0
    first_pass_overhead_s: float | None = None
    """of the first pass beside its blocks; None: that of every pass"""
    read_latency_s: float = 0.0
    """by how much a read takes longer before which the readers stood still, and every one that is asked on demand"""
    stall_penalty_s: float = 0.0
    """by how much computing a block takes longer for which one had to wait"""

    def overhead_s(self, pass_index: int) -> float:
        """Seconds of a pass beside its blocks."""
        first = self.first_pass_overhead_s
        return first if pass_index == 0 and first is not None else self.pass_overhead_s

    @property
    def demand(self) -> Demand:
        """What a decode pass takes of each resource."""
        return Demand.of(self.blocks, self.places, beside_s=self.pass_overhead_s)


class Demand(NamedTuple):
    """Seconds of each resource that a decode pass needs, whatever the order."""

    read_s: float
    """of the readers: from the disk, and out of stores that could not be page-locked"""
    copy_s: float
    compute_s: float
    """of the device and of the processor, which take turns, with what a pass takes beside its blocks"""

    @classmethod
    def of(cls, blocks: Sequence[TieredTimes], places: Sequence[Placement], *, beside_s: float) -> Demand:
        """Sum up."""
        read_s = copy_s = 0.0
        compute_s = beside_s
        for times, place in zip(blocks, places, strict=True):
            compute_s += times.decode_s
            if place is Placement.DISK:
                read_s += times.read_s
                copy_s += times.copy_s
            elif place is Placement.HOST:
                read_s += times.stage_s
                copy_s += times.copy_s
        return cls(read_s, copy_s, compute_s)


def simulate_tiers(scenario: TieredScenario, block_names: Sequence[str] | None = None) -> Simulated:
    """Run prefill and `decode_passes` decode passes; O(passes x blocks). The steady pass is that of a long run.

    A block is numbered through all passes: `pass_index * count + block_index`.
    """
    count = len(scenario.blocks)
    passes = 1 + scenario.decode_passes
    computation = _Computation(scenario)
    events = _transport(scenario, computation)
    ends = computation.pass_ends
    steady = 0.0
    if scenario.decode_passes:
        half = passes // 2 if passes > 2 else 0
        steady = max((ends[-1] - ends[half]) / (passes - 1 - half), *scenario.demand)
    names = tuple(block_names) if block_names is not None else tuple(f"block {i}" for i in range(count))
    return Simulated(ends[0], steady, Timeline((*events, *computation.events), names))


class _Computation:
    """Device and processor, one after the other: each block as soon as it is there and the one before is done."""

    def __init__(self, scenario: TieredScenario) -> None:
        self._scenario = scenario
        self._total = len(scenario.blocks) * (1 + scenario.decode_passes)
        self._travels = [place in TRAVELLING for place in scenario.places]
        stays = [math.inf if travels else 0.0 for travels in self._travels]
        self._arrivals = [math.inf] * len(stays) + stays * (_passes_played(scenario) - 1)
        self.due = 0
        """number of the block that is computed next"""
        self.end_s = 0.0
        """when the one before it has been computed"""
        self.freed: list[float] = []
        """when the n-th travelling block has left its slot"""
        self.pass_ends: list[float] = []
        self.events: list[Event] = []

    @property
    def done(self) -> bool:
        return self.due == self._total

    def arrive(self, number: int, moment_s: float) -> None:
        """Note that a block is there from that moment on, and compute as far as that allows."""
        arrivals, scenario, travels = self._arrivals, self._scenario, self._travels
        arrivals[number] = moment_s
        count = len(scenario.blocks)
        while self.due < self._total and arrivals[self.due] < math.inf:
            pass_index, block = divmod(self.due, count)
            times, start_s, ready_s = scenario.blocks[block], self.end_s, arrivals[self.due]
            seconds = times.decode_s if pass_index else times.prefill_s
            if block == 0:
                seconds += scenario.overhead_s(pass_index)
            if ready_s > start_s:
                self.events.append(Event(Lane.STALL, block, pass_index, start_s, ready_s))
                start_s = ready_s
                seconds += scenario.stall_penalty_s
            self.end_s = start_s + seconds
            self.events.append(Event(Lane.COMPUTE, block, pass_index, start_s, self.end_s))
            self.due += 1
            if travels[block]:
                self.freed.append(self.end_s)
            if block == count - 1:
                self.pass_ends.append(self.end_s)


class _Journey(NamedTuple):
    """One block's way from where it lies, or a part of it."""

    number: int
    takes_slot: bool
    read_s: float
    """of a reader; 0 where it is copied from page-locked memory"""
    copy_s: float
    """over the link: behind the reader, or out of its store"""
    through_ring: bool
    """and on to the device, if a reader brings it at all"""
    lag_s: float
    """by how much the last piece is there later than if bytes flowed"""
    from_disk: bool
    ring_s: float
    """of copying, that the ring holds back at most"""
    onward: _Journey | None = None
    """where it goes when its store is whole"""


def _journeys(scenario: TieredScenario) -> list[_Journey]:
    """What is requested in a run, in order: every block in the first pass, then those that travel, round and round."""
    first: list[_Journey] = []
    again: list[_Journey] = []
    for block, (times, place) in enumerate(zip(scenario.blocks, scenario.places, strict=True)):
        read_s = times.stage_s if place is Placement.HOST else times.read_s
        way = _Journey(
            number=block,
            takes_slot=place in TRAVELLING,
            read_s=read_s,
            copy_s=times.copy_s,
            through_ring=True,
            lag_s=min(read_s, times.copy_s) / times.pieces,
            from_disk=place is not Placement.HOST,
            ring_s=times.copy_s * (scenario.ring_pieces - 1) / times.pieces,
        )
        if place in TRAVELLING:
            again.append(way)
        if place in (Placement.HOST, Placement.CPU):
            onward = way._replace(takes_slot=False) if place is Placement.HOST else None
            way = way._replace(
                read_s=times.first_read_s, copy_s=0.0, through_ring=False, lag_s=0.0, from_disk=True, onward=onward
            )
        first.append(way)
    count = len(scenario.blocks)
    later = range(1, _passes_played(scenario))
    return first + [_Journey(index * count + way.number, *way[1:]) for index in later for way in again]


def _passes_played(scenario: TieredScenario) -> int:
    """Readers go on into passes that do not come."""
    travelling = sum(place in TRAVELLING for place in scenario.places)
    return 2 + scenario.decode_passes + (scenario.slots // travelling if travelling else 0)


def _transport(scenario: TieredScenario, computation: _Computation) -> list[Event]:
    """Bring block after block until all is computed; returns what was read and copied.

    Time goes from event to event; between two of them everything flows at constant rates. Copies are counted in
    seconds of the whole link.
    """
    count, slots, overlap, freed = len(scenario.blocks), scenario.slots, scenario.overlap, computation.freed
    events: list[Event] = []
    journeys, requested, slots_taken = _journeys(scenario), 0, 0
    stored: set[int] = set()  # blocks whose store is whole
    to_read: deque[_Journey] = deque()
    to_send: deque[_Journey] = deque()  # out of page-locked stores
    in_ring: deque[_Journey] = deque()  # read or being read, not copied to the end
    reading: _Journey | None = None
    sending: _Journey | None = None
    now = read_start = read_end = send_start = ring_start = ring_end = 0.0
    read_left = send_left = ring_left = 0.0  # ring_left: of the first block in the ring
    behind = 0.0  # seconds of copying that are read and not copied
    flow = 0.0  # seconds of copying that come with a second of reading

    while not computation.done:
        # Request what there is a slot for.
        due = math.inf
        while requested < len(journeys):
            journey = journeys[requested]
            if not overlap:
                due = computation.end_s if computation.due == journey.number else math.inf
            elif journey.takes_slot and slots_taken >= slots:
                waits_for = slots_taken - slots
                due = freed[waits_for] if waits_for < len(freed) else math.inf
            else:
                due = 0.0
            if not journey.from_disk and journey.number % count not in stored:
                due = math.inf  # fewer blocks than slots: its store is not whole yet
            if due > now:
                break
            due = math.inf
            requested += 1
            slots_taken += journey.takes_slot
            (to_read if journey.read_s or journey.from_disk else to_send).append(journey)
        # Begin to read and to send.
        if reading is None and to_read:
            reading, read_start = to_read.popleft(), now
            read_left = reading.read_s
            if now > read_end or not overlap:
                read_left += scenario.read_latency_s
            if reading.through_ring:
                if not in_ring:
                    ring_left, ring_start = reading.copy_s, now
                in_ring.append(reading)
                if reading.copy_s:
                    read_left = max(read_left, _AT_ONCE)
                    flow = reading.copy_s / read_left
        if sending is None and to_send:
            sending, send_start = to_send.popleft(), now
            send_left = sending.copy_s
        # How fast everything goes on.
        all_read = bool(in_ring) and in_ring[0] is not reading  # of the block that is copied now
        wanted = 1.0 if behind > _DONE or all_read else flow
        ring_rate = min(wanted, 1.0 if sending is None else 0.5)
        send_rate = 1.0 - ring_rate
        read_rate, ring_is_full = 1.0, False
        if reading is not None and flow > ring_rate and behind >= reading.ring_s - _DONE:
            read_rate, ring_is_full = ring_rate / flow, True
        # Until when.
        step = due - now
        if reading is not None:
            step = min(step, read_left / read_rate)
            if flow > ring_rate and not ring_is_full:
                step = min(step, (reading.ring_s - behind) / (flow - ring_rate))
            elif 0.0 < flow < ring_rate and behind > _DONE:
                step = min(step, behind / (ring_rate - flow))
        if sending is not None:
            step = min(step, send_left / send_rate)
        if all_read:
            step = min(step, ring_left / ring_rate)
        if step == math.inf:
            raise AssertionError("the simulated pipeline cannot go on: no slot for the block that is due")
        now = due if step == due - now else now + step
        read_left -= step * read_rate
        send_left -= step * send_rate
        ring_left -= step * ring_rate
        behind = max(0.0, behind + step * (flow * read_rate - ring_rate))
        # What has come to its end.
        if reading is not None and read_left <= _DONE:
            if reading.from_disk:
                events.append(Event(Lane.READ, reading.number % count, reading.number // count, read_start, now))
            if reading.onward is not None:
                stored.add(reading.number)
                (to_read if reading.onward.read_s else to_send).append(reading.onward)
            elif not reading.through_ring:
                computation.arrive(reading.number, now)
            reading, read_end, flow = None, now, 0.0
        if sending is not None and send_left <= _DONE:
            events.append(Event(Lane.COPY, sending.number % count, sending.number // count, send_start, now))
            computation.arrive(sending.number, now)
            sending = None
        while in_ring and in_ring[0] is not reading and ring_left <= _DONE:
            copied = in_ring.popleft()
            ring_start, ring_end = max(ring_end, ring_start + copied.lag_s), max(ring_end, now + copied.lag_s)
            events.append(Event(Lane.COPY, copied.number % count, copied.number // count, ring_start, ring_end))
            computation.arrive(copied.number, ring_end)
            ring_start = now
            if in_ring:
                ring_left = in_ring[0].copy_s
            else:
                behind = 0.0
    return events
