"""The limit that stands beside a run's measurements is never slower than they are, whatever was measured before it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.inference.handle import Handle, Overheads, PassRecord
from headrace.planning.plan import Placement
from headrace.planning.prediction import Prediction
from headrace.planning.rates import Rates
from headrace.planning.timeline import Event, Lane, Timeline
from headrace.streaming.device import CpuDevice
from headrace.streaming.stream import StreamCounters
from machine.test_measured_machine import CURVE


class Pass(NamedTuple):
    """Seconds of computing, of waiting, and until the next pass begins."""

    compute_s: float
    stall_s: float
    beside_s: float = 0.0


PREDICTION = Prediction(
    prefill_s=1.0,
    decode_s_per_pass=1.0,
    tokens_per_s=1.0,
    total_s=1.0,
    binds="disk",
    load_s_per_pass=1.0,
    compute_s_per_pass=1.0,
    possible_decode_s=1.0,
)
RATES = Rates(read_bytes_per_s=1e9, curve=CURVE, block_overhead_s=0.0, pass_overhead_s=0.0)


def handle_of(
    passes: list[Pass],
    *,
    disk_s: float,
    link_s: float = 0.0,
    compute_s: float = 0.0,
    rates: Rates = RATES,
    bytes_read: int = 0,
    bytes_copied: int = 0,
) -> Handle:
    """A run of these passes, in which a decode pass was predicted to take so long of each resource."""
    records, events, now = [], [], 0.0
    for number, own in enumerate(passes):
        end_s = now + own.stall_s + own.compute_s
        events.append(Event(Lane.STALL, 0, number, now, now + own.stall_s))
        records.append(PassRecord(now, end_s, 1))
        now = end_s + own.beside_s
    counters = StreamCounters(bytes_read, 0.0, 0.0, bytes_copied)
    stream: Any = SimpleNamespace(counters=counters, timeline=lambda: Timeline(tuple(events), ("block",)))
    parts = {"disk": disk_s, "link": link_s, "compute": compute_s, "cpu": 0.0}
    other: Any = SimpleNamespace(
        row_bytes_read=0, known_rates=rates, placements=(Placement.DISK,), on_cpu=not link_s, uses_host_memory=True
    )
    prediction = replace(PREDICTION, decode_parts_s=parts)
    handle = Handle(
        checkpoint=other,
        plan=other,
        prediction=prediction,
        scenario=other,
        notes=(),
        warnings=(),
        stream=stream,
        device=CpuDevice(),
        layers=(),
        overheads=Overheads(0, 0),
        load_s=0.0,
        view_droppers=(),
    )
    handle.passes += records
    return handle


seconds = st.floats(1e-4, 1e3)
any_pass = st.builds(Pass, compute_s=seconds, stall_s=st.floats(0, 1e3), beside_s=st.floats(0, 1))


@given(
    passes=st.lists(any_pass, min_size=2, max_size=8),
    disk_s=st.floats(0, 1e3),
    link_s=st.floats(0, 1e3),
    compute_s=seconds,
    read_bytes_per_s=st.floats(1e3, 1e11),
    link_bytes_per_s=st.floats(1e3, 1e12),
    bytes_read=st.integers(0, 10**15),
    bytes_copied=st.integers(0, 10**15),
)
def test_nothing_measured_beats_what_was_possible(
    passes: list[Pass],
    disk_s: float,
    link_s: float,
    compute_s: float,
    read_bytes_per_s: float,
    link_bytes_per_s: float,
    bytes_read: int,
    bytes_copied: int,
) -> None:
    rates = replace(RATES, read_bytes_per_s=read_bytes_per_s, link_bytes_per_s=link_bytes_per_s)
    handle = handle_of(
        passes,
        disk_s=disk_s,
        link_s=link_s,
        compute_s=compute_s,
        rates=rates,
        bytes_read=bytes_read,
        bytes_copied=bytes_copied,
    )
    measured, possible = handle.measured(), handle.possible()
    assert 0 < possible.decode_s_per_pass <= measured.decode_s_per_pass
    assert possible.read_bytes_per_s >= max(measured.read_bytes_per_s, read_bytes_per_s)
    assert possible.copied_bytes_per_s >= max(measured.copied_bytes_per_s, link_bytes_per_s)
    assert possible.decode_s_per_pass <= max(disk_s, link_s, compute_s) * (1 + 1e-12)


def test_without_a_decode_pass_it_is_what_was_known_before() -> None:
    handle = handle_of([Pass(1.0, 0.5)], disk_s=0.3, compute_s=0.2)
    assert list(handle.possible()) == pytest.approx([1e9, 0.3, float("inf")])


def test_a_disk_that_was_slow_only_while_it_was_measured_is_taken_at_the_rate_of_the_fastest_pass() -> None:
    handle = handle_of([Pass(0.1, 2.0), Pass(0.1, 0.8), Pass(0.1, 0.4), Pass(0.1, 0.6), Pass(1, 1)], disk_s=1.0)
    possible = handle.possible()
    assert possible.read_bytes_per_s == pytest.approx(2e9)  # 1 GB in 0.5 s
    assert possible.decode_s_per_pass == pytest.approx(0.5)


def test_computing_at_its_best_is_the_shortest_of_what_was_predicted_and_seen() -> None:
    passes = [Pass(5, 0), Pass(3.0, 0.1), Pass(2.0, 0.5), Pass(4, 0), Pass(1, 0)]
    assert handle_of(passes, disk_s=0.3, compute_s=9.0).possible().decode_s_per_pass == pytest.approx(2.0)
    assert handle_of(passes, disk_s=0.3, compute_s=1.5).possible().decode_s_per_pass == pytest.approx(1.5)
    assert handle_of(passes, disk_s=1.8, compute_s=1.5).possible().decode_s_per_pass == pytest.approx(1.8)


def test_passes_that_waited_longer_than_they_took_say_nothing_of_computing_but_how_fast_they_were() -> None:
    handle = handle_of([Pass(1, 0)] * 4, disk_s=0.1, compute_s=5.0)
    stalls = tuple(Event(Lane.STALL, 0, number, 0.0, 50.0) for number in range(4))
    stream: Any = handle.stream
    stream.timeline = lambda: Timeline(stalls, ("block",))
    assert handle.possible().decode_s_per_pass == 1.0
