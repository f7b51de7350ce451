"""Closed forms of a pass."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.planning.pass_times import LowerBound, least_s
from headrace.planning.plan import Arrangement
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import RUNNABLE, Strategy
from planning_scenarios import accelerator_scenarios, planned


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


@given(accelerator_scenarios(), st.sampled_from(RUNNABLE))
@settings(max_examples=30, deadline=None)
def test_the_closed_form_lies_below_what_is_simulated(scenario: Scenario, strategy: Strategy) -> None:
    """For sequential plans it is what is simulated. The few passes simulated may live on what slots held before."""
    rates = dataclasses.replace(scenario.known_rates, read_latency_s=0.01, stall_penalty_s=0.002)
    scenario = scenario.at(rates)
    plan, prediction = planned(scenario, strategy)
    bound = LowerBound(scenario, strategy, cache_on_host=plan.cache_on_host)
    least_s = bound.total_s(Arrangement(plan.placements, plan.slots, plan.cache_on_host))
    lead_s = scenario.workload.generate_tokens * plan.slots * prediction.load_s_per_pass / 2
    assert least_s <= prediction.total_s * (1 + 1e-9) + (lead_s if strategy is Strategy.OVERLAP else 0.0)
    if strategy is Strategy.SEQUENTIAL:
        assert least_s == pytest.approx(prediction.total_s)
