"""Nothing is planned beyond a budget, and a refusal names the smallest budget that would suffice."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import example, given, settings

from headrace.errors import BudgetError
from headrace.planning.infeasible import minimum_bytes, refuse_below_minimum
from headrace.planning.memory import MemoryAccount
from headrace.planning.planner import plan_strategy
from headrace.planning.rates import LayerTimes
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import RUNNABLE, Strategy
from headrace.planning.workload import Workload
from plan_books import check_books
from planning_scenarios import (
    CHUNK_BYTES,
    accelerator_rates,
    accelerator_scenario,
    budgets,
    cpu_scenario,
    model,
    plan_any,
    rates_of,
    scenarios,
    strategies,
    with_budget,
)


@given(scenarios(), strategies)
@settings(max_examples=140, deadline=None)
def test_a_plan_never_exceeds_its_budgets(scenario: Scenario, strategy: Strategy | None) -> None:
    no_ring = not scenario.on_cpu and scenario.host_budget_bytes < MemoryAccount(scenario).ring_bytes
    if no_ring or minimum_bytes(scenario, strategy) > scenario.budget_bytes:
        with pytest.raises(BudgetError) as refused:
            plan_any(scenario, strategy)
        with pytest.raises(BudgetError, match=re.escape(str(refused.value))):
            refuse_below_minimum(scenario, strategy)
        return
    refuse_below_minimum(scenario, strategy)
    plan, _ = plan_any(scenario, strategy)
    assert plan.memory.total_bytes <= plan.budget_bytes == scenario.budget_bytes
    assert plan.host_memory.total_bytes <= plan.host_budget_bytes == scenario.host_budget_bytes
    check_books(scenario, plan)


@given(scenarios(), strategies)
@example(
    cpu_scenario(model([100, 100, 100], vocab=7000)).at(rates_of(model([100]), load_per_compute=1.0)),
    Strategy.OVERLAP,
)
@example(
    budgets(accelerator_scenario(model([100, 100, 100], vocab=7000), allow_cpu=True), 0.0, 0.5).at(
        accelerator_rates(model([100]), disk_s=1.0, link_s=1.0, cpu_layer=LayerTimes(prefill_s=1.0, decode_s=1.0))
    ),
    None,
)
@example(
    budgets(
        accelerator_scenario(
            model([2500, 100]), work=Workload(prompt_tokens=1, generate_tokens=8), allow_cpu=True, pinned=False
        ),
        0.0,
        0.41,
    ).at(
        accelerator_rates(
            model([2500, 100]), disk_s=0.5, link_s=0.3, cpu_layer=LayerTimes(prefill_s=1.0, decode_s=0.25)
        )
    ),
    Strategy.RESIDENT,
)
@settings(max_examples=90, deadline=None)
def test_the_smallest_budget_works_and_one_byte_less_does_not(scenario: Scenario, strategy: Strategy | None) -> None:
    scenario = dataclasses.replace(
        scenario, host_budget_bytes=max(scenario.host_budget_bytes, MemoryAccount(scenario).ring_bytes)
    )
    with pytest.raises(BudgetError, match="too small for made up") as refused:
        plan_any(dataclasses.replace(scenario, budget_bytes=0), strategy)
    required_bytes = refused.value.required_bytes
    assert required_bytes is not None
    assert required_bytes == minimum_bytes(scenario, strategy)
    assert f"{required_bytes} bytes" in str(refused.value)
    assert "--memory" in str(refused.value)
    with pytest.raises(BudgetError, match="too small for made up") as refused:
        refuse_below_minimum(with_budget(scenario, required_bytes - 1), strategy)
    assert refused.value.required_bytes == required_bytes
    refuse_below_minimum(with_budget(scenario, required_bytes), strategy)
    enough = dataclasses.replace(scenario, budget_bytes=required_bytes)
    assert plan_any(enough, strategy).plan.memory.total_bytes == required_bytes
    with pytest.raises(BudgetError) as refused:
        plan_any(dataclasses.replace(scenario, budget_bytes=required_bytes - 1), strategy)
    assert refused.value.required_bytes == required_bytes


@pytest.mark.parametrize("strategy", [*RUNNABLE, None])
def test_the_host_must_hold_the_ring_at_least(strategy: Strategy | None) -> None:
    spec = model([700] * 3)
    scenario = dataclasses.replace(budgets(accelerator_scenario(spec), 1.2, 0.0), allow_cpu=True)
    scenario = scenario.at(accelerator_rates(spec, disk_s=2.0, link_s=1.0))
    assert scenario.host_budget_bytes == 4 * CHUNK_BYTES
    assert not plan_any(scenario, strategy).plan.uses_host_memory
    with pytest.raises(BudgetError, match="--host-memory") as refused:
        plan_any(dataclasses.replace(scenario, host_budget_bytes=4 * CHUNK_BYTES - 1), strategy)
    assert refused.value.required_bytes == 4 * CHUNK_BYTES
    with pytest.raises(BudgetError, match="--host-memory"):
        minimum_bytes(dataclasses.replace(scenario, host_budget_bytes=0), strategy)


def test_a_refusal_says_what_host_memory_would_do_instead() -> None:
    """Keys and values that do not fit on the device fit on the host."""
    work = Workload(prompt_tokens=2000, generate_tokens=6000)
    spec = model([700] * 12)
    scenario = budgets(accelerator_scenario(spec, work=work, allow_host_cache=True), 0.0, 0.0)
    scenario = scenario.at(accelerator_rates(spec, disk_s=2.0, link_s=1.0))
    with pytest.raises(BudgetError, match=r"or --host-memory [0-9]+MB") as refused:
        plan_strategy(scenario, Strategy.OVERLAP)
    with pytest.raises(BudgetError) as plain:
        plan_strategy(dataclasses.replace(scenario, allow_host_cache=False), Strategy.OVERLAP)
    assert "--host-memory" not in str(plain.value)
    assert plain.value.required_bytes == refused.value.required_bytes
    cache_bytes = sum(MemoryAccount(scenario).cache_bytes)
    more = dataclasses.replace(scenario, host_budget_bytes=MemoryAccount(scenario).ring_bytes + cache_bytes)
    plan, _ = plan_strategy(more, Strategy.OVERLAP)
    assert plan.cache_on_host
