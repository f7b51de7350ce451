"""Records become JSON and the same records again; what is of another form is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.inference.plain_values import from_plain, to_plain
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.planning.rates import LayerTimes, Rates
from headrace.planning.timeline import Event, Lane
from headrace.planning.workload import Workload

CURVE = ComputeCurve(compute_dtype="float32", stored_dtype="BF16", points=(CurvePoint(1, 0.1), CurvePoint(64, math.pi)))
RATES = Rates(
    curve=CURVE, block_overhead_s=0.0, pass_overhead_s=1e-3, layers=(LayerTimes(prefill_s=0.3, decode_s=0.1),)
)


def through_json(value: Any) -> Any:
    return from_plain(type(value), json.loads(json.dumps(to_plain(value))))


@pytest.mark.parametrize(
    "value",
    [
        RATES,
        replace(RATES, curve=None, layers=(), read_bytes_per_s=math.inf),
        Event(Lane.COPY, 1, 2, 0.25, 1 / 3),
        Workload(prompt_tokens=5, generate_tokens=6),
    ],
)
def test_a_record_comes_back_the_same(value: Any) -> None:
    assert through_json(value) == value


@given(st.floats(allow_nan=False), st.floats(min_value=1e-300, allow_infinity=False))
def test_floats_come_back_to_the_last_bit(rate: float, seconds: float) -> None:
    curve = replace(CURVE, points=(CurvePoint(3, seconds),))
    found = through_json(replace(RATES, read_bytes_per_s=rate, curve=curve))
    assert found == replace(RATES, read_bytes_per_s=rate, curve=curve)


def test_mappings_keep_keys_that_are_no_text() -> None:
    kinds = dict[tuple[int, str], LayerTimes]
    times = {(1, "full"): LayerTimes(prefill_s=1.0, decode_s=2.0), (2, "sliding"): LayerTimes(prefill_s=3, decode_s=4)}
    assert from_plain(kinds, json.loads(json.dumps(to_plain(times)))) == times


@pytest.mark.parametrize(
    "changed",
    [
        {"read_bytes_per_s": "fast"},
        {"overlaps_hops": 1},
        {"pass_overhead_s": True},
        {"layer": {"prefill_s": 0.3}},
        {"curve": {**to_plain(CURVE), "points": [[1, 0.1]]}},
        {"unknown": 1},
    ],
)
def test_another_form_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        from_plain(Rates, {**to_plain(RATES), **changed})


def test_what_has_no_plain_form_is_refused() -> None:
    with pytest.raises(TypeError, match="object has no plain form"):
        to_plain((1, object()))
