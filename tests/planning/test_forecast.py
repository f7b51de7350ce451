"""Forecasts of jobs: the scheduler's own passes, each no faster than its bytes or its products; packings that fit."""

from __future__ import annotations

import itertools
from collections.abc import Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import BudgetError
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.planning.jobs.forecast import (
    PackedCosts,
    Packing,
    PassLoad,
    PassTimes,
    choose_packing,
    forecast,
    longest_first,
)
from headrace.planning.jobs.packing import Need
from headrace.planning.rates import Rates
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from headrace.planning.workload import Workload
from planning_scenarios import model

SPEC = model([1024] * 12)
COSTS = PackedCosts(turn_s=1e-6, key_s=1e-9, product_s=1e-10, sample_s=1e-6, bookkeeping_s=1e-6)
CURVE = ComputeCurve(
    compute_dtype="bfloat16",
    stored_dtype="BF16",
    points=(CurvePoint(1, 2e-10), CurvePoint(16, 4e-10), CurvePoint(64, 1.6e-9), CurvePoint(256, 6.4e-9)),
)
RATES = Rates(read_bytes_per_s=1e9, curve=CURVE, block_overhead_s=0.0, pass_overhead_s=1e-4)


def needs_of(count: int, prompt: int = 20, new: int = 10) -> dict[Hashable, Need]:
    return {(number, 0): Need(prompt + number % 7, new + number % 5) for number in range(count)}


def scenario(budget_bytes: int) -> Scenario:
    return Scenario(
        model=SPEC,
        workload=Workload(sequences=1, prompt_tokens=1, generate_tokens=1),
        compute_dtype="bfloat16",
        budget_bytes=budget_bytes,
        rates=RATES,
    )


def smallest() -> int:
    with pytest.raises(BudgetError) as refused:
        choose_packing(scenario(1), COSTS, needs_of(50), {})
    assert refused.value.required_bytes is not None
    return refused.value.required_bytes


def test_refusal_names_a_budget_that_does() -> None:
    least = smallest()
    packing, candidate, _ = choose_packing(scenario(least), COSTS, needs_of(50), {}, sequences=1, pass_tokens=16)
    assert candidate.plan.memory.total_bytes <= least
    assert packing.sequences == 1


@settings(max_examples=25, deadline=None)
@given(extra=st.integers(0, 60 << 20), count=st.integers(1, 60), prompt=st.integers(1, 200), new=st.integers(1, 40))
def test_packings_fit_and_jobs_obey_physics(extra: int, count: int, prompt: int, new: int) -> None:
    needs = needs_of(count, prompt, new)
    try:
        packing, candidate, played = choose_packing(scenario((36 << 20) + extra), COSTS, needs, {})
    except BudgetError:
        assert extra < 40 << 20, "so much is enough for the smallest packing of any of these jobs"
        return
    plan = candidate.plan
    assert plan.memory.total_bytes <= (36 << 20) + extra
    assert packing.positions >= max(need.positions for need in needs.values())
    assert plan.memory.kv_cache_bytes == SPEC.kv_pool_bytes(positions=packing.positions, element_bytes=2)
    assert played.generated_tokens == sum(need.new_tokens for need in needs.values())
    assert played.tokens == sum(need.prompt_tokens + need.new_tokens - 1 for need in needs.values())
    assert played.passes >= max(need.new_tokens for need in needs.values())
    reading_s = played.passes * plan.streamed_bytes_per_pass / RATES.read_bytes_per_s
    assert played.total_s >= reading_s * (1 - 1e-9)


def test_more_memory_is_not_slower() -> None:
    least = smallest()
    times = [
        choose_packing(scenario(least + step * (4 << 20)), COSTS, needs_of(50), {})[2].total_s for step in range(8)
    ]
    for less, more in itertools.pairwise(times):
        assert more <= less * 1.03


def test_more_in_flight_is_faster_while_passes_wait_for_the_disk() -> None:
    least = smallest() + (12 << 20)
    alone, many = (
        choose_packing(scenario(least), COSTS, needs_of(48), {}, sequences=number)[2].total_s for number in (1, 16)
    )
    assert alone > 4 * many


def test_what_the_user_fixed_is_kept() -> None:
    packing, candidate, _ = choose_packing(
        scenario(80 << 20), COSTS, needs_of(40), {}, sequences=5, pass_tokens=33, strategy=Strategy.SEQUENTIAL
    )
    assert (packing.sequences, packing.pass_tokens) == (5, 33)
    assert candidate.plan.strategy is Strategy.SEQUENTIAL


def times_of(budget_bytes: int = 60 << 20) -> tuple[Packing, PassTimes]:
    packing, candidate, _ = choose_packing(scenario(budget_bytes), COSTS, needs_of(40), {}, sequences=8)
    return packing, PassTimes(SPEC, candidate.plan, RATES, COSTS, pass_tokens=packing.pass_tokens)


def test_pass_times_grow_with_the_load() -> None:
    _, times = times_of()
    loads = [
        PassLoad(tokens, min(tokens, 8), min(tokens, 8), 100 * tokens, 0) for tokens in (1, 4, 8, 16, 64, 256, 900)
    ]
    seconds = [times.seconds(load) for load in loads]
    assert seconds == sorted(seconds)
    for load, found in zip(loads, seconds, strict=True):
        assert found >= times.compute_s(load)
        assert found >= times.load_s * (1 - 1e-9)


def test_answers_that_end_early_shorten_the_job() -> None:
    packing, times = times_of()
    whole = forecast(needs_of(40), {}, packing, times)
    half = forecast(needs_of(40), {}, packing, times, answer_share=0.5)
    assert 0.4 < half.generated_tokens / whole.generated_tokens < 0.65
    assert half.total_s < whole.total_s


def test_long_jobs_are_forecast_from_a_part() -> None:
    packing, times = times_of()
    part = forecast(needs_of(4000), {}, packing, times)
    whole = forecast(needs_of(120_000), {}, packing, times)
    assert whole.total_s == pytest.approx(30 * part.total_s, rel=0.05)
    assert whole.generated_tokens == pytest.approx(30 * part.generated_tokens, rel=0.01)


def test_shared_beginnings_are_computed_once() -> None:
    packing, times = times_of()
    needs: dict[Hashable, Need] = {number: Need(60, 4, "p", 48) for number in range(20)}
    shared = forecast(needs, {"p": Need(48, 0)}, packing, times)
    alone = forecast({key: Need(60, 4) for key in needs}, {}, packing, times)
    assert alone.tokens - shared.tokens == 19 * 48
    assert shared.total_s < alone.total_s


def test_long_answers_are_begun_first() -> None:
    assert longest_first({"a": Need(1, 2), "b": Need(1, 9), "c": Need(1, 2)}) == ["b", "a", "c"]
