"""The range of a prediction for a measured machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.planning.accelerator_memory import AcceleratorRequest
from headrace.planning.accelerator_pace import AcceleratorPace
from headrace.planning.accelerator_planner import minimum_bytes_on_accelerator, plan_on_accelerator
from headrace.planning.estimate import LayerTimes, predict
from headrace.planning.estimate_interval import (
    COMPUTE_RANGE,
    LIMITED_READ_RANGE,
    LINK_RANGE,
    READ_RANGE,
    prediction_interval,
)
from headrace.planning.plan import Placement, Strategy, Workload
from headrace.planning.planner import Request, plan_fastest
from planning.test_estimate import SPEC, pace_of

BUDGET = 1 << 40


def test_a_resident_model_depends_on_computing_alone() -> None:
    pace = pace_of((1, 0.001), (64, 0.002))
    request = Request(model=SPEC, workload=Workload(), compute_dtype="float32", budget_bytes=BUDGET)
    found = prediction_interval(SPEC, plan_fastest(request, pace), pace, read_is_limited=False)
    decode = found.decode_s_per_pass
    assert decode.high / decode.expected == pytest.approx(COMPUTE_RANGE.high, rel=1e-6)
    assert decode.low / decode.expected == pytest.approx(COMPUTE_RANGE.low, rel=1e-6)
    assert found.tokens_per_s.low == pytest.approx(1 / decode.high)


def test_a_rehearsed_layer_is_as_uncertain_as_the_curve() -> None:
    pace = replace(pace_of((1, 0.001), (64, 0.002)), layer=LayerTimes(prefill_s=3.0, decode_s=2.0))
    request = Request(model=SPEC, workload=Workload(), compute_dtype="float32", budget_bytes=BUDGET)
    decode = prediction_interval(SPEC, plan_fastest(request, pace), pace, read_is_limited=False).decode_s_per_pass
    assert decode.high / decode.expected == pytest.approx(COMPUTE_RANGE.high, rel=1e-6)
    assert decode.low / decode.expected == pytest.approx(COMPUTE_RANGE.low, rel=1e-6)


@pytest.mark.parametrize("limited", [False, True])
def test_what_waits_for_the_disk_moves_with_its_rate(limited: bool) -> None:
    pace = pace_of((1, 1e-6), (64, 1e-6), read_bytes_per_s=1e6)
    request = Request(model=SPEC, workload=Workload(), compute_dtype="float32", budget_bytes=BUDGET)
    fastest = plan_fastest(request, pace)
    found = prediction_interval(SPEC, fastest, pace, read_is_limited=limited)
    constant = LIMITED_READ_RANGE if limited else READ_RANGE
    assert found.prefill_s.high / found.prefill_s.expected == pytest.approx(1 / constant.low, rel=0.02)
    assert found.prefill_s.low / found.prefill_s.expected == pytest.approx(1 / constant.high, rel=0.02)
    assert found.prefill_s.expected == predict(SPEC, fastest.plan, pace).prefill_s


def on_accelerator() -> tuple[AcceleratorRequest, AcceleratorPace]:
    """A device with room for little more than two slots, all else in host memory; the link and the disk do 1 MB/s."""
    request = AcceleratorRequest(
        model=SPEC,
        workload=Workload(),
        compute_dtype="float32",
        budget_bytes=0,
        host_budget_bytes=BUDGET,
        device="cuda:0",
    )
    least = minimum_bytes_on_accelerator(request, Strategy.OVERLAP)
    pace = AcceleratorPace(
        device=pace_of((1, 1e-9), (64, 1e-9), read_bytes_per_s=1e6), link_bytes_per_s=1e6, staged_bytes_per_s=5e5
    )
    return replace(request, budget_bytes=least), pace


def test_what_waits_for_the_link_moves_with_its_rate() -> None:
    request, pace = on_accelerator()
    candidate = plan_on_accelerator(request, Strategy.OVERLAP, pace)
    assert (candidate.prediction.binds, Placement.DISK in candidate.plan.places) == ("link", False)
    found = prediction_interval(SPEC, candidate, pace, read_is_limited=False).decode_s_per_pass
    assert found.expected == candidate.prediction.decode_s_per_pass
    assert found.high / found.expected == pytest.approx(1 / LINK_RANGE.low, rel=0.01)
    assert found.low / found.expected == pytest.approx(1 / LINK_RANGE.high, rel=0.01)


def test_memory_that_is_not_page_locked_is_staged_at_a_rate_that_moves_too() -> None:
    request, pace = on_accelerator()
    request, pace = replace(request, pinned=False), replace(pace, device=replace(pace.device, read_bytes_per_s=1e4))
    candidate = plan_on_accelerator(request, Strategy.OVERLAP, pace)
    assert candidate.plan.places.count(Placement.HOST) > 0
    found = prediction_interval(SPEC, candidate, pace, read_is_limited=False, pinned=False).decode_s_per_pass
    assert found.expected == candidate.prediction.decode_s_per_pass
    assert found.high / found.expected == pytest.approx(1 / LINK_RANGE.low, rel=0.01)


def test_what_the_processor_computes_is_as_uncertain_as_all_computing() -> None:
    request, pace = on_accelerator()
    pace = replace(pace, processor_layer=LayerTimes(prefill_s=1e3, decode_s=1e3), link_bytes_per_s=1e3)
    candidate = plan_on_accelerator(replace(request, allow_cpu=True), Strategy.RESIDENT, pace)
    assert candidate.prediction.binds == "cpu"
    found = prediction_interval(SPEC, candidate, pace, read_is_limited=False).decode_s_per_pass
    assert found.high / found.expected == pytest.approx(COMPUTE_RANGE.high, rel=0.01)
