"""What happened, on the host's clock and on the device's: events of the device become times once it has passed them."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from headrace.planning.timeline import Event, Lane, Timeline
from headrace.streaming.device import DeviceEvent

EVENTS_KEPT = 24_000
"""the newest ones, some 3 MB: a long run must not grow beyond its budget by remembering it"""
SHORTEST_STALL_S = 20e-6
"""Less is not waiting but the cost of asking."""


class _Pending(NamedTuple):
    lane: Lane
    block_index: int
    pass_index: int
    begin: DeviceEvent
    end: DeviceEvent


class EventLog:
    """Events of one stream, in seconds since `origin_s`. Not locked: its owner is."""

    def __init__(self, origin_s: float) -> None:
        self._origin_s = origin_s
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._pending: deque[_Pending] = deque(maxlen=EVENTS_KEPT)
        self.stall_s = 0.0
        """computing waited for bytes so long, all in all"""

    def add(self, lane: Lane, block_index: int, pass_index: int, start_s: float, end_s: float) -> None:
        """Something that the host saw begin and end. Stalls too short to be any are left out."""
        if lane is Lane.STALL:
            if end_s - start_s <= SHORTEST_STALL_S:
                return
            self.stall_s += end_s - start_s
        self._events.append(Event(lane, block_index, pass_index, start_s - self._origin_s, end_s - self._origin_s))

    def add_pending(self, lane: Lane, block_index: int, pass_index: int, begin: DeviceEvent, end: DeviceEvent) -> None:
        """Something that the device will have begun and ended."""
        self._pending.append(_Pending(lane, block_index, pass_index, begin, end))

    def settle(self) -> None:
        """Turn what the device has passed into times, oldest first; never waits."""
        while self._pending and self._pending[0].end.passed():
            lane, block_index, pass_index, begin, end = self._pending.popleft()
            self.add(lane, block_index, pass_index, begin.moment_s(), end.moment_s())

    def timeline(self, block_names: tuple[str, ...]) -> Timeline:
        """All that is known."""
        self.settle()
        return Timeline(tuple(self._events), block_names)
