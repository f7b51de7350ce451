"""Which blocks stay: few large ones where slots of their size would not fit, and whatever fills the memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings

from headrace.errors import BudgetError
from headrace.model.layout import PAGE_BYTES
from headrace.planning.infeasible import minimum_bytes
from headrace.planning.memory import MemoryAccount
from headrace.planning.planner import plan_strategy
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from planning_scenarios import (
    DEVICE,
    DISK,
    accelerator_rates,
    accelerator_scenario,
    budgets,
    cpu_scenario,
    cpu_scenarios,
    model,
    rates_of,
    with_budget,
    without_blocks,
)


@pytest.mark.parametrize("ask", [cpu_scenario, accelerator_scenario])
def test_a_few_large_blocks_stay_where_slots_of_their_size_would_not_fit(ask: Callable[..., Scenario]) -> None:
    """A head of six layers' size: two slots for it take twelve, keeping it takes six and two small slots."""
    spec = model([100] * 5, vocab=7000)
    scenario = budgets(ask(spec), 0.0, 0.0)
    *layers, head = MemoryAccount(scenario).block_bytes
    assert head > 4 * max(layers)
    least_bytes, bare_bytes = minimum_bytes(scenario, Strategy.OVERLAP), without_blocks(scenario).total_bytes
    assert least_bytes == bare_bytes + head + 2 * max(layers) < bare_bytes + 2 * head
    rates = accelerator_rates(spec, disk_s=2.0, link_s=1.0)
    plan, _ = plan_strategy(with_budget(scenario, least_bytes).at(rates), Strategy.OVERLAP)
    assert plan.placements == (DISK,) * 5 + (DEVICE,)


def test_several_large_blocks_of_different_sizes_stay() -> None:
    spec = model([100, 6000, 2500, 100, 100], vocab=300)
    scenario = cpu_scenario(spec)
    small = with_budget(scenario, minimum_bytes(scenario, Strategy.OVERLAP))
    plan, _ = plan_strategy(small.at(rates_of(spec, load_per_compute=2.0)), Strategy.OVERLAP)
    assert plan.placements == (DISK, DEVICE, DEVICE, DISK, DISK, DISK)


@pytest.mark.parametrize(
    ("layer_widths", "fitting", "expected"),
    [
        ([2500, 100, 2500, 100], (1, 3), (False, True, False, True, False)),  # two small ones between large ones
        ([2500, 700, 100, 2500], (1,), (False, True, False, False, False)),  # the larger of two, not the smaller
        ([2500, 100, 100, 2500], (1, 2), (False, True, True, False, False)),  # neighbours
    ],
)
def test_what_is_left_is_filled_with_blocks_that_fit(
    layer_widths: list[int], fitting: tuple[int, ...], expected: tuple[bool, ...]
) -> None:
    spec = model(layer_widths)
    scenario = cpu_scenario(spec)
    sizes = [block.read_bytes for block in spec.blocks]
    left_bytes = sum(sizes[index] for index in fitting) + PAGE_BYTES
    assert left_bytes < sizes[-1] < sizes[0], "neither the head nor a large layer fits"
    budget_bytes = without_blocks(scenario).total_bytes + max(sizes) + left_bytes
    scenario = with_budget(scenario, budget_bytes).at(rates_of(spec, load_per_compute=1.0))
    plan, _ = plan_strategy(scenario, Strategy.SEQUENTIAL)
    assert plan.placements == tuple(DEVICE if stays else DISK for stays in expected)


@given(cpu_scenarios())
@settings(max_examples=60, deadline=None)
def test_leftover_memory_does_not_lie_idle(scenario: Scenario) -> None:
    """The sequential plan, where every resident byte pays, keeps each streamed block out for want of memory."""
    assume(scenario.workload.generate_tokens > 1)
    try:
        plan, _ = plan_strategy(scenario, Strategy.SEQUENTIAL)
    except BudgetError:
        assume(False)
    free_bytes = scenario.budget_bytes - plan.memory.total_bytes
    if plan.streamed_blocks > 1:
        streamed = [
            block.read_bytes
            for block, place in zip(scenario.model.blocks, plan.placements, strict=True)
            if place is DISK
        ]
        assert free_bytes < min(streamed)
