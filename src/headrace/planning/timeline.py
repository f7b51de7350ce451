"""What happened when: one type for a simulated run and a measured one, so that the two can be laid over one another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from headrace.units import format_seconds

CHART_WIDTH = 70
"""cells of a row, which has 10 columns more"""


class Lane(StrEnum):
    """What was busy: the reader, the copy to a device, the computing; or computing that waited."""

    READ = "read"
    COPY = "copy"
    COMPUTE = "compute"
    STALL = "stall"


class Event(NamedTuple):
    """One stretch of work or waiting; seconds from the start of the run."""

    lane: Lane
    block_index: int
    pass_index: int
    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """Length of the stretch in seconds."""
        return self.end_s - self.start_s


_SAME_MOMENT_S = 1e-9


@dataclass(frozen=True)
class Timeline:
    """Events in no particular order, and the names of the blocks they speak of."""

    events: tuple[Event, ...]
    block_names: tuple[str, ...]

    def busy_s(self, lane: Lane, *, pass_index: int | None = None) -> float:
        """Seconds of work in one lane, of one pass or of all; parallel reads of one lane count once each."""
        return sum(
            event.duration_s
            for event in self.events
            if event.lane is lane and (pass_index is None or event.pass_index == pass_index)
        )

    def pass_span(self, pass_index: int) -> tuple[float, float]:
        """First and last moment of computing or stalling in a pass, in seconds."""
        own = [e for e in self.events if e.pass_index == pass_index and e.lane in (Lane.COMPUTE, Lane.STALL)]
        return min(e.start_s for e in own), max(e.end_s for e in own)


def chrome_trace(processes: Iterable[tuple[str, Timeline]]) -> str:
    """Return the Chrome trace (JSON object format, times in microseconds) with one process per named timeline.

    Events of a lane that overlap, of several readers or stages, are in threads of their own, all of the lane's name.
    Format: "Trace Event Format", complete events (`ph: X`); opens in Perfetto and in chrome://tracing.
    """
    rows: list[dict[str, Any]] = []
    for process_id, (name, timeline) in enumerate(processes, start=1):
        rows.append({"ph": "M", "name": "process_name", "pid": process_id, "tid": 0, "args": {"name": name}})
        threads = [
            (lane.value, events)
            for lane in Lane
            for events in _apart([event for event in timeline.events if event.lane is lane])
        ]
        for thread_id, (label, events) in enumerate(threads, start=1):
            of_thread = {"pid": process_id, "tid": thread_id}
            rows.append({"ph": "M", "name": "thread_name", **of_thread, "args": {"name": label}})
            rows.extend(
                {
                    "ph": "X",
                    "name": timeline.block_names[event.block_index],
                    "cat": event.lane.value,
                    **of_thread,
                    "ts": round(event.start_s * 1e6, 3),
                    "dur": round(max(0.0, event.duration_s) * 1e6, 3),
                    "args": {"block": event.block_index, "pass": event.pass_index},
                }
                for event in events
            )
    return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}, separators=(",", ":"))


def _apart(events: Sequence[Event]) -> list[list[Event]]:
    """Share events out so that none of one list overlap; one list where there are none."""
    found: list[list[Event]] = [[]]
    for event in sorted(events, key=lambda each: each.start_s):
        free = next((own for own in found if not own or own[-1].end_s <= event.start_s + _SAME_MOMENT_S), None)
        if free is None:
            found.append(free := [])
        free.append(event)
    return found


def text_chart(timeline: Timeline, *, pass_index: int, width: int = CHART_WIDTH) -> str:
    """Draw one pass as rows of characters, read, compute and stall; a full cell is a busy one.

    Where anything was copied to a device, copying has a row too. Returns an empty string when nothing was computed or
    waited for in the pass.
    """
    own_lanes = (Lane.COMPUTE, Lane.STALL)  # what was read ahead for a pass that never came is no pass
    if not any(event.pass_index == pass_index and event.lane in own_lanes for event in timeline.events):
        return ""
    start, end = timeline.pass_span(pass_index)
    if end <= start:
        return ""
    lines = []
    copying = (Lane.COPY,) if any(event.lane is Lane.COPY for event in timeline.events) else ()
    for lane in (Lane.READ, *copying, Lane.COMPUTE, Lane.STALL):
        cells = _coverage([e for e in timeline.events if e.lane is lane], start, end, width)
        lines.append(f"{lane.value:>7} |" + "".join(_shade(share) for share in cells) + "|")
    lines.append(" " * 8 + f"0{format_seconds(end - start):>{width}s}")
    return "\n".join(lines)


def _coverage(events: Sequence[Event], start: float, end: float, width: int) -> list[float]:
    step = (end - start) / width
    cells = [0.0] * width
    for event in events:
        first = max(0, int((event.start_s - start) / step))
        last = min(width - 1, int((event.end_s - start) / step))
        for cell in range(first, last + 1):
            left = max(event.start_s, start + cell * step)
            right = min(event.end_s, start + (cell + 1) * step)
            cells[cell] += max(0.0, right - left) / step
    return cells


def _shade(share: float) -> str:
    return " " if share < 0.1 else "░" if share < 0.4 else "▒" if share < 0.7 else "█"
