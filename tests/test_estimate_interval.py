"""The range of a prediction for a measured machine."""

from __future__ import annotations

import pytest

from headrace.planning.estimate import predict
from headrace.planning.estimate_interval import COMPUTE_RANGE, LIMITED_READ_RANGE, READ_RANGE, prediction_interval
from headrace.planning.plan import Workload
from headrace.planning.planner import Request, plan_fastest
from test_estimate import SPEC, pace_of

BUDGET = 1 << 40


def test_a_resident_model_depends_on_computing_alone() -> None:
    pace = pace_of((1, 0.001), (64, 0.002))
    request = Request(spec=SPEC, workload=Workload(), compute_dtype="float32", budget_bytes=BUDGET)
    found = prediction_interval(SPEC, plan_fastest(request, pace), pace, read_is_limited=False)
    decode = found.decode_s_per_pass
    assert decode.high / decode.expected == pytest.approx(COMPUTE_RANGE.high, rel=1e-6)
    assert decode.low / decode.expected == pytest.approx(COMPUTE_RANGE.low, rel=1e-6)
    assert found.tokens_per_s.low == pytest.approx(1 / decode.high)


@pytest.mark.parametrize("limited", [False, True])
def test_what_waits_for_the_disk_moves_with_its_rate(limited: bool) -> None:
    pace = pace_of((1, 1e-6), (64, 1e-6), read_bytes_per_s=1e6)
    request = Request(spec=SPEC, workload=Workload(), compute_dtype="float32", budget_bytes=BUDGET)
    fastest = plan_fastest(request, pace)
    found = prediction_interval(SPEC, fastest, pace, read_is_limited=limited)
    constant = LIMITED_READ_RANGE if limited else READ_RANGE
    assert found.prefill_s.high / found.prefill_s.expected == pytest.approx(1 / constant.low, rel=0.02)
    assert found.prefill_s.low / found.prefill_s.expected == pytest.approx(1 / constant.high, rel=0.02)
    assert found.prefill_s.expected == predict(SPEC, fastest.plan, pace).prefill_s
