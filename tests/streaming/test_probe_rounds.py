"""Measurements take turns, so that a moment in which others hold the machine spoils none: on a clock of the tests'."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headrace.streaming.probe import machine as machine_probe
from headrace.streaming.probe.machine import ReadSettings, compute_curve, contention, median_read_rate

TOKENS = (1, 4, 16)
NO_FILES: Any = ()


class Clock:
    """Products take `row_s` for each row, ten times as long in the calls that a test names."""

    def __init__(self, slow: range, row_s: float = 2**-10) -> None:
        self.now_s, self.calls, self._slow, self._row_s = 0.0, 0, slow, row_s

    def product(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.now_s += len(rows) * self._row_s * (10 if self.calls in self._slow else 1)
        self.calls += 1
        return weight


@pytest.mark.parametrize("first", range(12))
def test_others_that_come_for_a_round_do_not_show_in_a_curve(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(range(first, first + len(TOKENS)))
    monkeypatch.setattr("torch.nn.functional.linear", clock.product)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now_s)
    curve = compute_curve(torch.float32, torch.float32, shape=(2, 4), tokens=TOKENS, repetitions=3)
    assert [(point.tokens, point.seconds_per_parameter * 2**13) for point in curve.points] == [(1, 1), (4, 4), (16, 16)]
    assert clock.calls == len(TOKENS) * 4, "one round to warm up, three that count"


def test_long_products_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(range(0), row_s=2**-5)
    monkeypatch.setattr("torch.nn.functional.linear", clock.product)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now_s)
    curve = compute_curve(torch.float32, torch.float32, shape=(2, 4), tokens=TOKENS, repetitions=3)
    assert [(point.tokens, point.seconds_per_parameter * 2**8) for point in curve.points] == [(1, 1), (4, 4), (16, 16)]
    assert clock.calls == 4 + 2 + 2, "of 1, 4 and 16 rows, after one each to warm up"


def test_the_rate_of_the_disk_is_a_median_in_the_time_of_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, asked = iter((8e8, 1e8, 9e8)), []

    def read_rate(*_args: Any, seconds: float, **_options: Any) -> float:
        asked.append(seconds)
        return next(rates)

    monkeypatch.setattr(machine_probe, "read_rate", read_rate)
    source: Any = None
    assert median_read_rate(source, NO_FILES, chunk_bytes=1, threads=1, seconds=0.3) == 8e8
    assert sum(asked) == pytest.approx(0.3)


def test_contention_says_how_fast_reading_alone_was_among_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, beside = iter((6e8, 1e8, 6.2e8)), iter((3e8, 3.1e8, 0.5e8))

    def read_rate(*_args: Any, while_doing: Any = None, **_options: Any) -> float:
        return next(alone if while_doing is None else beside)

    monkeypatch.setattr(machine_probe, "read_rate", read_rate)
    source: Any = None
    found = contention(source, NO_FILES, ReadSettings(1, 1, 0.0), lambda: None, rounds=3, seconds=0.0)
    assert (found.read_bytes_per_s, found.read) == (6e8, 2.0)
