"""A timeline becomes a Chrome trace that tools can open, and a chart that fits a terminal."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.planning.timeline import Event, Lane, Timeline, chrome_trace, text_chart

NAMES = ("layer 0", "layer 1", 'head, rows 0-"99"')

seconds = st.floats(0, 1e4, allow_nan=False)
events = st.builds(
    lambda lane, block, pass_index, start, length: Event(lane, block, pass_index, start, start + length),
    st.sampled_from(list(Lane)),
    st.integers(0, len(NAMES) - 1),
    st.integers(0, 3),
    seconds,
    seconds,
)
timelines = st.lists(events, max_size=20).map(lambda found: Timeline(tuple(found), NAMES))

PIPELINE = Timeline(
    (
        Event(Lane.READ, 0, 0, 0.0, 1.0),
        Event(Lane.STALL, 0, 0, 0.0, 1.0),
        Event(Lane.COMPUTE, 0, 0, 1.0, 3.0),
        Event(Lane.READ, 1, 0, 1.0, 2.0),
        Event(Lane.COMPUTE, 1, 0, 3.0, 4.0),
        Event(Lane.READ, 0, 1, 3.0, 3.5),
    ),
    NAMES,
)


@given(st.lists(st.tuples(st.text(max_size=5), timelines), max_size=3))
def test_the_trace_is_one_that_tools_can_open(processes: list[tuple[str, Timeline]]) -> None:
    trace = json.loads(chrome_trace(processes))
    assert trace["displayTimeUnit"] == "ms"
    rows: list[dict[str, Any]] = trace["traceEvents"]
    named = {(row["pid"], row["tid"]): row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    labels = {row["pid"]: row["args"]["name"] for row in rows if row["name"] == "process_name"}
    assert list(labels.values()) == [name for name, _ in processes]
    spans = [row for row in rows if row["ph"] == "X"]
    assert len(spans) + len(named) + len(labels) == len(rows)
    assert len(spans) == sum(len(timeline.events) for _, timeline in processes)
    events = [(number, event) for number, (_, timeline) in enumerate(processes, start=1) for event in timeline.events]
    lanes = list(Lane)
    events.sort(key=lambda each: (each[0], lanes.index(each[1].lane), each[1].start_s))
    spans.sort(key=lambda row: (row["pid"], lanes.index(Lane(row["cat"])), row["ts"]))
    for (process_id, event), row in zip(events, spans, strict=True):
        assert row["pid"] == process_id
        assert event.lane.value == row["cat"]
        assert named[row["pid"], row["tid"]].split()[0] == row["cat"]
        assert row["ts"] == pytest.approx(event.start_s * 1e6, abs=0.001)
        assert row["dur"] >= 0
        assert set(row["args"]) == {"block", "pass"}
        assert row["name"] == NAMES[row["args"]["block"]]
    described = sorted((row["pid"], row["cat"], row["args"]["block"], row["args"]["pass"], row["dur"]) for row in spans)
    assert described == sorted(
        (number, event.lane.value, event.block_index, event.pass_index, round(event.duration_s * 1e6, 3))
        for number, event in events
    )
    for thread in named:
        own = [row for row in spans if (row["pid"], row["tid"]) == thread]
        for before, after in itertools.pairwise(own):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.01, "tools draw what overlaps as if nested"


def test_busy_seconds_by_lane_and_pass() -> None:
    assert PIPELINE.busy_s(Lane.READ) == 2.5
    assert PIPELINE.busy_s(Lane.READ, pass_index=1) == 0.5
    assert PIPELINE.busy_s(Lane.COMPUTE, pass_index=0) == 3.0
    assert PIPELINE.busy_s(Lane.COPY) == 0
    assert PIPELINE.pass_span(0) == (0.0, 4.0)


def test_the_chart_shows_who_was_busy() -> None:
    read, compute, stall, ruler = text_chart(PIPELINE, pass_index=0, width=8).splitlines()
    assert read == "   read |████  █ |"
    assert compute == "compute |  ██████|"
    assert stall == "  stall |██      |"
    assert ruler.split() == ["0", "4", "s"]
    assert len(ruler) == len("        ") + 8 + len(" ms") - 2


def test_copying_has_a_row_where_anything_was_copied() -> None:
    copied = Timeline((*PIPELINE.events, Event(Lane.COPY, 0, 0, 2.0, 4.0)), NAMES)
    read, copy, compute, stall, _ = text_chart(copied, pass_index=0, width=8).splitlines()
    assert [read, compute, stall] == text_chart(PIPELINE, pass_index=0, width=8).splitlines()[:3]
    assert copy == "   copy |    ████|"


def test_partly_busy_cells_are_shaded() -> None:
    timeline = Timeline(
        (
            Event(Lane.COMPUTE, 0, 0, 0.0, 4.0),
            Event(Lane.READ, 0, 0, 0.0, 0.05),
            Event(Lane.READ, 0, 0, 1.0, 1.3),
            Event(Lane.READ, 0, 0, 2.2, 2.8),
            Event(Lane.READ, 0, 0, 3.0, 3.9),
        ),
        NAMES,
    )
    assert text_chart(timeline, pass_index=0, width=4).splitlines()[0] == "   read | ░▒█|"


def test_a_pass_without_work_has_no_chart() -> None:
    assert text_chart(PIPELINE, pass_index=7) == ""
    assert text_chart(PIPELINE, pass_index=1) == "", "what was read ahead for a pass that never came"
    instant = Timeline((Event(Lane.COMPUTE, 0, 0, 1.0, 1.0),), NAMES)
    assert text_chart(instant, pass_index=0) == ""


@given(timelines, st.integers(0, 3), st.integers(4, 100))
def test_charts_have_the_width_that_was_asked_for(timeline: Timeline, pass_index: int, width: int) -> None:
    lines = text_chart(timeline, pass_index=pass_index, width=width).splitlines()
    for line in lines[:3]:
        assert len(line) == len("compute |") + width + len("|")
        assert set(line[9:-1]) <= set(" ░▒█")
