"""The range of a prediction for a measured machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from headrace.machine.engine import PRESENT, Engine
from headrace.machine.quantity import Interval, Quantity
from headrace.planning.infeasible import minimum_bytes
from headrace.planning.plan import Placement
from headrace.planning.planner import plan_fastest, plan_strategy
from headrace.planning.prediction import (
    COMPUTE_RANGE,
    LIMITED_READ_RANGE,
    LINK_RANGE,
    READ_RANGE,
    predict,
    prediction_interval,
)
from headrace.planning.rates import LayerTimes
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from headrace.planning.workload import DEFAULT_WORKLOAD
from planning.test_prediction import rates_of, scenario_of
from planning_examples import PERFECT_ENGINE, dense_model, server


def test_a_resident_model_depends_on_computing_alone() -> None:
    scenario = scenario_of(rates_of((1, 0.001), (64, 0.002)))
    found = prediction_interval(plan_fastest(scenario), scenario)
    decode = found.decode_s_per_pass
    assert decode.high / decode.expected == pytest.approx(COMPUTE_RANGE.high, rel=1e-6)
    assert decode.low / decode.expected == pytest.approx(COMPUTE_RANGE.low, rel=1e-6)
    assert found.tokens_per_s.low == pytest.approx(1 / decode.high)


def test_a_timed_layer_is_as_uncertain_as_the_curve() -> None:
    scenario = scenario_of(rates_of((1, 0.001), (64, 0.002), layers=(LayerTimes(prefill_s=3.0, decode_s=2.0),)))
    decode = prediction_interval(plan_fastest(scenario), scenario).decode_s_per_pass
    assert decode.high / decode.expected == pytest.approx(COMPUTE_RANGE.high, rel=1e-6)
    assert decode.low / decode.expected == pytest.approx(COMPUTE_RANGE.low, rel=1e-6)


@pytest.mark.parametrize("limited", [False, True])
def test_what_waits_for_the_disk_moves_with_its_rate(limited: bool) -> None:
    rates = rates_of((1, 1e-6), (64, 1e-6), read_bytes_per_s=1e6)
    scenario = replace(scenario_of(rates), read_is_limited=limited)
    fastest = plan_fastest(scenario)
    found = prediction_interval(fastest, scenario)
    constant = LIMITED_READ_RANGE if limited else READ_RANGE
    assert found.prefill_s.high / found.prefill_s.expected == pytest.approx(1 / constant.low, rel=0.02)
    assert found.prefill_s.low / found.prefill_s.expected == pytest.approx(1 / constant.high, rel=0.02)
    assert found.prefill_s.expected == predict(fastest.plan, scenario).prefill_s


def on_accelerator(**changes: Any) -> Scenario:
    """A device with room for little more than two slots, all else in host memory; the link and the disk do 1 MB/s."""
    rates = rates_of(
        (1, 1e-9),
        (64, 1e-9),
        **{"read_bytes_per_s": 1e6, "link_bytes_per_s": 1e6, "staged_bytes_per_s": 5e5, **changes},
    )
    scenario = replace(scenario_of(rates), device="cuda:0", host_budget_bytes=1 << 40)
    return replace(scenario, budget_bytes=minimum_bytes(scenario, Strategy.OVERLAP))


def test_what_waits_for_the_link_moves_with_its_rate() -> None:
    scenario = on_accelerator()
    candidate = plan_strategy(scenario, Strategy.OVERLAP)
    assert (candidate.prediction.binds, Placement.DISK in candidate.plan.placements) == ("link", False)
    found = prediction_interval(candidate, scenario).decode_s_per_pass
    assert found.expected == candidate.prediction.decode_s_per_pass
    assert found.high / found.expected == pytest.approx(1 / LINK_RANGE.low, rel=0.01)
    assert found.low / found.expected == pytest.approx(1 / LINK_RANGE.high, rel=0.01)


def test_memory_that_is_not_page_locked_is_staged_at_a_rate_that_moves_too() -> None:
    scenario = replace(on_accelerator(read_bytes_per_s=1e4), pinned=False)
    candidate = plan_strategy(scenario, Strategy.OVERLAP)
    assert candidate.plan.placements.count(Placement.HOST) > 0
    found = prediction_interval(candidate, scenario).decode_s_per_pass
    assert found.expected == candidate.prediction.decode_s_per_pass
    assert found.high / found.expected == pytest.approx(1 / LINK_RANGE.low, rel=0.01)


def test_what_the_cpu_computes_is_as_uncertain_as_all_computing() -> None:
    slow = LayerTimes(prefill_s=1e3, decode_s=1e3)
    scenario = replace(on_accelerator(cpu_layer=slow, link_bytes_per_s=1e3), allow_cpu=True)
    candidate = plan_strategy(scenario, Strategy.RESIDENT)
    assert candidate.prediction.binds == "cpu"
    found = prediction_interval(candidate, scenario).decode_s_per_pass
    assert found.high / found.expected == pytest.approx(COMPUTE_RANGE.high, rel=0.01)


# -- other work while the machine was measured -------------------------------------------------------------------------


def test_computing_that_was_measured_beside_other_work_may_be_as_much_faster_or_slower() -> None:
    scenario = scenario_of(rates_of((1, 0.001), (64, 0.002)))
    quiet = prediction_interval(plan_fastest(scenario), scenario).decode_s_per_pass
    busy = prediction_interval(plan_fastest(scenario), replace(scenario, busy=0.6)).decode_s_per_pass
    assert busy.expected == quiet.expected
    assert busy.high == pytest.approx(quiet.high / 0.4, rel=1e-6)
    assert busy.low == pytest.approx(quiet.low * 0.4, rel=1e-6)


@pytest.mark.parametrize("limited", [False, True])
def test_so_may_reading_but_never_faster_than_its_limit(limited: bool) -> None:
    rates = rates_of((1, 1e-9), (64, 1e-9), read_bytes_per_s=1e6)
    scenario = replace(scenario_of(rates), read_is_limited=limited)
    fastest = plan_fastest(scenario)
    quiet = prediction_interval(fastest, scenario).prefill_s
    busy = prediction_interval(fastest, replace(scenario, busy=0.6)).prefill_s
    assert busy.high == pytest.approx(quiet.high / 0.4, rel=0.02)
    assert busy.low == pytest.approx(quiet.low * (1.0 if limited else 0.4), rel=0.02)


def test_how_far_engines_are_off_the_formulas_is_part_of_a_described_machine_s_interval() -> None:
    found = range_of(replace(PERFECT_ENGINE, spread=Quantity(1.0, 0.5, 4.0, "test")))
    assert found.high == pytest.approx(4.0 * found.expected)
    assert found.low == pytest.approx(found.expected)  # no engine is faster than the hardware

    narrow, wide = (range_of(replace(PRESENT, spread=Quantity(1.0, low, 1.0, "test"))) for low in (1.0, 0.9))
    assert wide.low < narrow.low
    assert wide.high == narrow.high


def range_of(engine: Engine) -> Interval:
    scenario = Scenario.described(dense_model(), server(devices=1), DEFAULT_WORKLOAD, engine=engine)
    return prediction_interval(plan_strategy(scenario, Strategy.RESIDENT), scenario).decode_s_per_pass
