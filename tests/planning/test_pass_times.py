"""Closed forms of a pass."""

from __future__ import annotations

import pytest

from headrace.planning.pass_times import least_s


@pytest.mark.parametrize(
    ("read_s", "compute_s", "read_slowdown", "compute_slowdown", "expected"),
    [
        (3.0, 2.0, 1.0, 1.0, 3.0),
        (2.0, 3.0, 1.0, 1.0, 3.0),
        (3.0, 2.0, 2.0, 2.0, 5.0),
        (3.0, 2.0, 9.0, 9.0, 5.0),
        (10.0, 2.0, 1.0, 1.5, 10.0),  # computing 2 s takes 3 s while reading goes on at full speed
        (10.0, 2.0, 1.25, 1.0, 10.4),  # in the 2 s of computing 1.6 s of reading are done
        (2.0, 9.0, 1.0, 1.5, 9 + 2 / 3),  # in the 2 s of reading a third of computing is lost
        (0.0, 2.0, 1.5, 1.5, 2.0),
    ],
)
def test_the_least_time_of_doing_both(
    read_s: float, compute_s: float, read_slowdown: float, compute_slowdown: float, expected: float
) -> None:
    assert least_s(read_s, compute_s, read_slowdown, compute_slowdown) == pytest.approx(expected)
