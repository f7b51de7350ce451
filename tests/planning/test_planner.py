"""Plans are never slower than the simple rule, nor slower with more of any memory."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.errors import BudgetError
from headrace.model.layout import PAGE_BYTES, align_up
from headrace.planning import planner
from headrace.planning.infeasible import minimum_bytes
from headrace.planning.memory import MemoryAccount
from headrace.planning.pass_times import LowerBound
from headrace.planning.placements import CPU_SLOT_COUNTS, stores
from headrace.planning.plan import TRAVELLING, Arrangement, EmbeddingPlacement, Placement, Plan
from headrace.planning.planner import MARGIN, compare, plan_fastest, plan_strategy
from headrace.planning.prediction import Candidate, Prediction, first_pass_s, predict
from headrace.planning.rates import LayerTimes
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import RUNNABLE, Strategy
from headrace.planning.workload import Workload
from plan_books import check_books
from planning_scenarios import (
    CPU,
    DEVICE,
    DISK,
    HOST,
    accelerator_rates,
    accelerator_scenario,
    accelerator_scenarios,
    budgets,
    cpu_scenario,
    cpu_scenarios,
    cpu_workloads,
    everything_bytes,
    fastest,
    host_without_blocks_bytes,
    model,
    planned,
    prediction_s,
    rates_of,
    scenarios,
    strategies,
    weights_bytes,
    with_budget,
    without_blocks,
)

fewer_examples = settings(max_examples=60, deadline=None)
fewest_examples = settings(max_examples=30, deadline=None)


# -- speed -------------------------------------------------------------------------------------------------------------


def fill_then_stream(scenario: Scenario) -> list[Arrangement]:
    """Apply the rule that users apply by hand: two slots, the first blocks stay as long as they fit.

    Of the rest as many wait on an accelerator's host as it has room for, or none.
    """
    account, count = MemoryAccount(scenario), len(scenario.model.blocks)
    for number in range(count - 2, -1, -1):
        bare = Arrangement((DEVICE,) * number + (DISK,) * (count - number), 2)
        if account.device(bare).total_bytes <= scenario.budget_bytes:
            if scenario.on_cpu:
                return [bare]
            room_bytes = scenario.host_budget_bytes - account.host(bare).total_bytes
            return [
                bare._replace(
                    placements=tuple(HOST if index in stored else place for index, place in enumerate(bare.placements))
                )
                for stored in stores(account, range(number, count), room_bytes)
            ]
    return []


@given(cpu_scenarios() | accelerator_scenarios(host_cache=False))
@settings(max_examples=90, deadline=None)
def test_the_planner_is_never_slower_than_filling_memory_and_streaming_the_rest(scenario: Scenario) -> None:
    plan, prediction = fastest(scenario)
    for simple in fill_then_stream(scenario):
        assert prediction.total_s <= prediction_s(scenario, plan, simple) * (1 + 1e-9)


def test_filling_memory_from_the_first_block_on_is_sometimes_best() -> None:
    spec = model([2500, 100, 2500, 700], vocab=20_000)
    scenario = cpu_scenario(spec, prompt_tokens=1, generate_tokens=32)
    least, most = minimum_bytes(scenario), everything_bytes(scenario)
    scenario = with_budget(scenario, least + (most - least) * 10 // 24)
    scenario = scenario.at(rates_of(spec, load_per_compute=0.8, compute_slowdown=1.2, read_slowdown=1.2))
    (simple,) = fill_then_stream(scenario)
    plan, prediction = plan_fastest(scenario)
    assert prediction.total_s <= prediction_s(scenario, plan, simple) * (1 + 1e-9)


@given(scenarios())
@settings(max_examples=90, deadline=None)
def test_the_planner_is_never_slower_than_any_strategy_alone(scenario: Scenario) -> None:
    _, prediction = planned(scenario)
    for strategy, alone in compare(scenario).items():
        if isinstance(alone, Candidate):
            assert alone.plan.strategy is strategy
            # But for the margin that a plan with fewer moving parts is allowed.
            assert prediction.total_s * (1 - MARGIN) <= alone.prediction.total_s * (1 + 1e-9)


@given(scenarios())
@fewest_examples
def test_the_first_pass_played_alone_is_that_of_the_whole_run(scenario: Scenario) -> None:
    """By it plans are left out of the search."""
    plan, prediction = planned(scenario)
    assert first_pass_s(plan, scenario) == prediction.prefill_s


def test_where_all_weights_stay_no_streaming_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[Plan] = []

    def counted(plan: Plan, scenario: Scenario) -> Prediction:
        played.append(plan)
        return predict(plan, scenario)

    monkeypatch.setattr(planner, "predict", counted)
    spec = model([100] * 8, vocab=2000)
    scenario = cpu_scenario(spec, prompt_tokens=4, generate_tokens=1).at(rates_of(spec, load_per_compute=0.5))
    plan_fastest(with_budget(scenario, everything_bytes(scenario)))
    assert [plan.strategy for plan in played] == [Strategy.RESIDENT]


@given(accelerator_scenarios(cpu=False))
@fewest_examples
def test_a_cpu_that_may_compute_makes_nothing_slower(scenario: Scenario) -> None:
    _, without = fastest(scenario)
    _, allowed = fastest(dataclasses.replace(scenario, allow_cpu=True))
    assert allowed.total_s <= without.total_s * (1 + 1e-9)


@given(cpu_scenarios(), st.lists(st.floats(0, 1.05), min_size=3, max_size=6))
@settings(max_examples=80, deadline=None)
def test_more_memory_never_predicts_a_slower_run(scenario: Scenario, shares: list[float]) -> None:
    least, most = minimum_bytes(scenario), everything_bytes(scenario)
    fastest_s = math.inf
    for share in sorted(shares):
        _, prediction = fastest(with_budget(scenario, int(least + share * (most - least))))
        assert prediction.total_s <= fastest_s * 1.01
        fastest_s = min(fastest_s, prediction.total_s)


@given(
    layers=st.integers(2, 9),
    vocab=st.sampled_from([500, 20_000]),
    load_per_compute=st.sampled_from([0.5, 1.0, 1.2, 2.0]),
    slowdown=st.sampled_from([1.0, 1.2]),
    work=cpu_workloads,
    first_budget=st.floats(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_one_more_layer_of_memory_never_predicts_a_slower_run(
    layers: int, vocab: int, load_per_compute: float, slowdown: float, work: Workload, first_budget: float
) -> None:
    """The usual case, all layers alike, within a hundredth."""
    spec = model([700] * layers, vocab=vocab)
    scenario = dataclasses.replace(cpu_scenario(spec), workload=work)
    rates = rates_of(spec, load_per_compute=load_per_compute, compute_slowdown=slowdown, read_slowdown=slowdown)
    scenario = scenario.at(rates)
    budget_bytes = minimum_bytes(scenario) + int(first_budget * spec.blocks[0].read_bytes)
    fastest_s = math.inf
    while budget_bytes < everything_bytes(scenario):
        _, prediction = fastest(with_budget(scenario, budget_bytes))
        assert prediction.total_s <= fastest_s * 1.01
        fastest_s = min(fastest_s, prediction.total_s)
        budget_bytes += spec.blocks[0].read_bytes


@given(accelerator_scenarios(host_cache=False), st.lists(st.floats(0, 1.1), min_size=2, max_size=5))
@fewest_examples
def test_more_of_the_devices_memory_never_predicts_a_slower_run(scenario: Scenario, shares: list[float]) -> None:
    host_bytes = max(MemoryAccount(scenario).ring_bytes, scenario.host_budget_bytes)
    scenario = dataclasses.replace(scenario, host_budget_bytes=host_bytes)
    least, most_bytes = minimum_bytes(scenario), int(1.1 * weights_bytes(scenario))
    fastest_s = math.inf
    for share in sorted(shares):
        larger = dataclasses.replace(scenario, budget_bytes=least + int(share * most_bytes))
        _, prediction = fastest(larger)
        assert prediction.total_s <= fastest_s * 1.02
        fastest_s = min(fastest_s, prediction.total_s)


@given(accelerator_scenarios(host_cache=False), st.lists(st.floats(0, 1.4), min_size=2, max_size=5), st.booleans())
@fewest_examples
def test_more_of_the_hosts_memory_never_predicts_a_slower_run(
    scenario: Scenario, shares: list[float], from_nothing: bool
) -> None:
    start_bytes = MemoryAccount(scenario).ring_bytes if from_nothing else host_without_blocks_bytes(scenario)
    lean = dataclasses.replace(scenario, host_budget_bytes=MemoryAccount(scenario).ring_bytes)
    assume(minimum_bytes(lean) <= scenario.budget_bytes)
    fastest_s = math.inf
    for share in sorted(shares):
        larger = dataclasses.replace(scenario, host_budget_bytes=start_bytes + int(share * weights_bytes(scenario)))
        _, prediction = fastest(larger)
        assert prediction.total_s <= fastest_s * 1.02
        fastest_s = min(fastest_s, prediction.total_s)


@given(
    layers=st.sampled_from([24, 48, 80]),
    disk_s=st.sampled_from([1.5, 4.0, 20.0]),
    link_s=st.sampled_from([0.5, 2.0]),
    slower=st.sampled_from([None, 0.5, 3.0]),
    host_share=st.sampled_from([0.0, 0.3, 1.2]),
    share=st.floats(0.05, 0.9),
)
@settings(max_examples=6, deadline=None)
def test_a_deep_model_gains_by_more_of_either_memory(
    layers: int, disk_s: float, link_s: float, slower: float | None, host_share: float, share: float
) -> None:
    """Where only a small part of all arrangements is simulated."""
    spec = model([700] * layers)
    own = None if slower is None else LayerTimes(prefill_s=2 * slower / layers, decode_s=slower / layers)
    scenario = budgets(accelerator_scenario(spec, allow_cpu=slower is not None), share, host_share).at(
        accelerator_rates(spec, disk_s=disk_s, link_s=link_s, cpu_layer=own)
    )
    plan, prediction = fastest(scenario)
    for simple in fill_then_stream(scenario):
        assert prediction.total_s <= prediction_s(scenario, plan, simple) * (1 + 1e-9)
    layer_bytes = align_up(MemoryAccount(scenario).block_bytes[0])
    for more in (
        dataclasses.replace(scenario, budget_bytes=scenario.budget_bytes + layer_bytes),
        dataclasses.replace(scenario, host_budget_bytes=scenario.host_budget_bytes + layer_bytes),
        dataclasses.replace(scenario, host_budget_bytes=scenario.host_budget_bytes + 5 * layer_bytes),
    ):
        assert fastest(more).prediction.total_s <= prediction.total_s * 1.02


@given(accelerator_scenarios(), strategies)
@fewest_examples
def test_nothing_is_faster_than_bytes_over_bandwidth(scenario: Scenario, strategy: Strategy | None) -> None:
    plan, prediction = planned(scenario, strategy)
    blocks, rates = scenario.model.blocks, scenario.known_rates
    from_disk = [b.read_bytes for b, place in zip(blocks, plan.placements, strict=True) if place is DISK]
    read_s = sum(from_disk) / rates.read_bytes_per_s
    copy_s = plan.streamed_bytes_per_pass / rates.link_bytes_per_s
    slack = 1 - 1e-9
    assert prediction.decode_s_per_pass >= max(read_s, copy_s, prediction.compute_s_per_pass) * slack
    assert prediction.decode_s_per_pass >= prediction.possible_decode_s * slack
    assert prediction.load_s_per_pass >= max(read_s, copy_s) * slack
    first_read_s = sum(block.read_bytes for block in blocks) / rates.read_bytes_per_s
    assert prediction.prefill_s >= first_read_s * slack
    further = scenario.workload.generate_tokens - 1
    assert prediction.total_s == pytest.approx(prediction.prefill_s + further * prediction.decode_s_per_pass)
    assert prediction.tokens_per_s == pytest.approx(scenario.workload.sequences / prediction.decode_s_per_pass)


def best_of_everything(scenario: Scenario) -> float:
    """Try every place of every block with every number of slots; seconds of the fastest."""
    account, (plan, prediction) = MemoryAccount(scenario), plan_fastest(scenario)
    best_s = prediction.total_s
    kinds = (DEVICE, DISK) if scenario.on_cpu else Placement if scenario.allow_cpu else (DEVICE, HOST, DISK)
    for places in itertools.product(kinds, repeat=len(scenario.model.blocks)):
        if places[-1] is CPU or account.host(Arrangement(places, 0)).total_bytes > scenario.host_budget_bytes:
            continue
        for slots in CPU_SLOT_COUNTS if scenario.on_cpu else (2, 3):
            arrangement = Arrangement(places, slots)
            if arrangement.travelling < slots:
                break
            if account.device(arrangement).total_bytes <= scenario.budget_bytes:
                best_s = min(best_s, prediction_s(scenario, plan, arrangement))
    return best_s


@given(cpu_scenarios())
@settings(max_examples=15, deadline=None)
def test_on_a_cpu_the_planner_comes_close_to_trying_everything(scenario: Scenario) -> None:
    assume(len(scenario.model.blocks) <= 6)
    _, prediction = fastest(scenario)
    assert prediction.total_s <= 1.05 * best_of_everything(scenario)


def test_where_the_residents_lie_makes_a_difference() -> None:
    """Spread evenly is not enough: it also matters with which block the pattern begins."""
    spec = model([700] * 5, vocab=20_000)
    scenario = cpu_scenario(spec, prompt_tokens=16, generate_tokens=8)
    least, most = minimum_bytes(scenario), everything_bytes(scenario)
    scenario = with_budget(scenario, least + (most - least) * 8 // 24)
    scenario = scenario.at(rates_of(spec, load_per_compute=1.2, compute_slowdown=1.2, read_slowdown=1.2))
    _, prediction = plan_fastest(scenario)
    assert prediction.total_s <= 1.03 * best_of_everything(scenario)


alike = st.builds(model, st.integers(2, 4).map(lambda layers: [700] * layers), vocab=st.sampled_from([500, 3000]))
unlike = st.builds(model, st.lists(st.sampled_from([100, 700, 2500]), min_size=2, max_size=4))


@given(
    accelerator_scenarios(models=alike, host_cache=False)
    | accelerator_scenarios(models=unlike, host_cache=False, cpu=False)
)
@settings(max_examples=15, deadline=None)
def test_on_an_accelerator_the_planner_comes_close_to_trying_everything(scenario: Scenario) -> None:
    """Layers of the CPU are chosen evenly, not by their size: only where they are alike."""
    _, prediction = fastest(scenario)
    assert prediction.total_s <= 1.1 * best_of_everything(scenario)


def test_the_simplest_rule_is_tried_whatever_the_ranking_says(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = model([700] * 8)
    scenario = budgets(accelerator_scenario(spec), 0.4, 0.3).at(accelerator_rates(spec, disk_s=4.0, link_s=0.5))
    monkeypatch.setattr(LowerBound, "total_s", lambda bound, arrangement: math.inf)
    plan, prediction = plan_strategy(scenario, Strategy.OVERLAP)
    simple_s = [prediction_s(scenario, plan, simple) for simple in fill_then_stream(scenario)]
    assert prediction.total_s == pytest.approx(min(simple_s))


def test_a_ranking_that_is_wrong_makes_no_plan_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of a slow CPU are simulated in vain."""
    spec = model([700] * 8)
    slow = LayerTimes(prefill_s=9.0, decode_s=9.0)
    scenario = budgets(accelerator_scenario(spec, allow_cpu=True), 0.4, 0.3).at(
        accelerator_rates(spec, disk_s=4.0, link_s=0.5, cpu_layer=slow)
    )
    monkeypatch.setattr(LowerBound, "total_s", lambda bound, arrangement: 0.0)
    allowed, without = (fastest(dataclasses.replace(scenario, allow_cpu=allow)) for allow in (True, False))
    assert allowed.plan.cpu_blocks == 0
    assert allowed.prediction.total_s <= without.prediction.total_s * (1 + 1e-9)


def test_what_is_like_the_best_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread evenly the head would come from the disk, which is several times as large as a layer."""
    spec = model([700] * 8, vocab=8000)
    scenario = budgets(accelerator_scenario(spec), 0.3, 0.4).at(accelerator_rates(spec, disk_s=4.0, link_s=0.5))
    plan, prediction = plan_fastest(scenario)
    assert plan.placements[-1] is not DISK
    monkeypatch.setattr(planner, "ROUNDS_OF_VARIATION", 0)
    assert plan_fastest(scenario).prediction.total_s > 1.1 * prediction.total_s


# -- what is chosen on a CPU -------------------------------------------------------------------------------------------


@given(cpu_scenarios())
@fewer_examples
def test_everything_stays_where_everything_fits(scenario: Scenario) -> None:
    plan, prediction = plan_fastest(with_budget(scenario, everything_bytes(scenario)))
    assert plan.strategy is Strategy.RESIDENT
    assert set(plan.placements) == {DEVICE}
    expected = EmbeddingPlacement.HEAD if scenario.model.tied else EmbeddingPlacement.RESIDENT
    assert plan.embedding is expected
    assert prediction.binds == "compute"


def test_the_table_is_read_by_rows_where_only_the_blocks_fit() -> None:
    spec = model([700] * 4, vocab=20_000)
    scenario = cpu_scenario(spec).at(rates_of(spec, load_per_compute=2.0))
    blocks_only = with_budget(scenario, minimum_bytes(scenario, Strategy.RESIDENT))
    plan, _ = plan_strategy(blocks_only, Strategy.RESIDENT)
    assert plan.embedding is EmbeddingPlacement.ROWS
    assert plan.memory.embedding_bytes == 0


def test_rows_are_taken_from_the_tied_head_only_where_all_of_it_stays() -> None:
    spec = model([700] * 3, vocab=20_000, tied=True)
    assert sum(block.head_rows is not None for block in spec.blocks) > 1
    scenario = cpu_scenario(spec).at(rates_of(spec, load_per_compute=2.0))
    seen = set()
    for budget_bytes in range(minimum_bytes(scenario), everything_bytes(scenario), 256 * PAGE_BYTES):
        plan, _ = plan_fastest(with_budget(scenario, budget_bytes))
        check_books(scenario, plan)
        heads = [
            place is DEVICE
            for place, block in zip(plan.placements, spec.blocks, strict=True)
            if block.head_rows is not None
        ]
        assert (plan.embedding is EmbeddingPlacement.HEAD) == all(heads)
        seen.add(plan.embedding)
    assert seen == {EmbeddingPlacement.HEAD, EmbeddingPlacement.ROWS}


@pytest.mark.parametrize("strategy", RUNNABLE)
def test_each_strategy_on_request(strategy: Strategy) -> None:
    spec = model([700] * 6)
    scenario = cpu_scenario(spec).at(rates_of(spec, load_per_compute=2.0))
    plan, prediction = plan_strategy(with_budget(scenario, everything_bytes(scenario)), strategy)
    assert plan.strategy is strategy
    check_books(scenario, plan)
    assert (plan.streamed_blocks == 0) == (strategy is Strategy.RESIDENT)
    if strategy is Strategy.SEQUENTIAL:
        streamed_s = prediction.load_s_per_pass
        assert streamed_s > 0
        assert prediction.decode_s_per_pass == pytest.approx(streamed_s + prediction.compute_s_per_pass)


def test_overlap_is_taken_where_it_pays_and_residents_are_spread() -> None:
    spec = model([700] * 11, vocab=500)
    scenario = cpu_scenario(spec, prompt_tokens=1)
    size = spec.blocks[0].read_bytes
    half = with_budget(scenario, without_blocks(scenario).total_bytes + 7 * size)
    plan, prediction = plan_fastest(half.at(rates_of(spec, load_per_compute=2.0)))
    assert plan.strategy is Strategy.OVERLAP
    assert plan.resident_blocks >= 4
    runs = [len(list(run)) for place, run in itertools.groupby(plan.placements) if place is DISK]
    assert max(runs) <= plan.streamed_blocks // 2, "they are spread among the streamed"
    assert prediction.decode_s_per_pass < 1.1 * prediction.possible_decode_s


def test_measured_layers_count_instead_of_the_curve() -> None:
    spec = model([700] * 6)
    scenario = cpu_scenario(spec)
    scenario = with_budget(scenario, minimum_bytes(scenario, Strategy.OVERLAP))
    slow = rates_of(spec, load_per_compute=1.0, layers=(LayerTimes(prefill_s=5.0, decode_s=3.0),))
    _, prediction = plan_fastest(scenario.at(slow))
    assert prediction.compute_s_per_pass >= 18
    assert prediction.binds == "compute"


# -- what is chosen on an accelerator ----------------------------------------------------------------------------------


def places_of(scenario: Scenario) -> dict[Placement, int]:
    plan, _ = plan_fastest(scenario)
    return {place: plan.placements.count(place) for place in Placement if place in plan.placements}


def test_everything_stays_on_the_device_where_everything_fits() -> None:
    spec = model([700] * 6)
    scenario = budgets(accelerator_scenario(spec, allow_cpu=True, allow_host_cache=True), 1.2, 1.2)
    own = LayerTimes(prefill_s=1.0, decode_s=1.0)
    plan, prediction = plan_fastest(scenario.at(accelerator_rates(spec, disk_s=2.0, link_s=1.0, cpu_layer=own)))
    assert (plan.strategy, plan.embedding) == (Strategy.RESIDENT, EmbeddingPlacement.RESIDENT)
    assert (set(plan.placements), prediction.binds) == ({DEVICE}, "compute")


def test_host_memory_comes_before_the_disk_and_what_is_left_is_spread() -> None:
    spec = model([700] * 23, vocab=600)
    scenario = accelerator_scenario(spec, work=Workload(generate_tokens=64, prompt_tokens=16)).at(
        accelerator_rates(spec, disk_s=10.0, link_s=2.0)
    )
    half = budgets(scenario, 0.3, 0.3)
    plan, prediction = plan_fastest(half)
    assert plan.host_memory.weights_bytes + align_up(spec.blocks[0].held_bytes) > half.host_budget_bytes - (
        plan.host_memory.ring_bytes + plan.host_memory.embedding_bytes
    )
    travelling = [place for place in plan.placements if place in TRAVELLING]
    runs = [len(list(run)) for place, run in itertools.groupby(travelling) if place is DISK]
    assert plan.placements.count(HOST) >= 6
    assert max(runs) <= 2, "the disk's lie among those of the host"
    assert prediction.binds == "disk"
    assert prediction.decode_s_per_pass < 1.1 * prediction.possible_decode_s
    all_on_host = plan_fastest(budgets(scenario, 0.3, 1.2))
    assert DISK not in all_on_host.plan.placements
    assert all_on_host.prediction.binds == "link"


def test_the_cpu_computes_where_the_link_is_slower_than_it() -> None:
    spec = model([700] * 24, vocab=600)
    scenario = budgets(accelerator_scenario(spec, allow_cpu=True), 0.3, 4.0)
    own = LayerTimes(prefill_s=2.0 / 24, decode_s=2.0 / 24)
    slow, fast = (accelerator_rates(spec, disk_s=20.0, link_s=link_s, cpu_layer=own) for link_s in (8.0, 0.5))
    chosen = places_of(scenario.at(slow))
    assert 4 <= chosen[CPU] < 24, "as many as let the CPU and the link end together"
    assert CPU not in places_of(scenario.at(fast))
    assert CPU not in places_of(dataclasses.replace(scenario, allow_cpu=False).at(slow))
    unknown = dataclasses.replace(slow, cpu_layer=None)
    assert CPU not in places_of(scenario.at(unknown))
    plan, prediction = plan_strategy(scenario.at(slow), Strategy.RESIDENT)
    assert plan.cpu_blocks >= 10, "what does not fit on the device is computed where it lies"
    assert (plan.slots, prediction.binds) == (0, "cpu")
    layers = [place is CPU for place in plan_fastest(scenario.at(slow)).plan.placements[:-1]]
    runs = [len(list(run)) for computed, run in itertools.groupby(layers) if not computed]
    assert max(runs) <= 2 * math.ceil(24 / sum(layers)), "they are spread"


def test_keys_and_values_wait_on_the_host_only_where_they_do_not_fit_beside_two_slots() -> None:
    spec = model([700] * 12)
    work = Workload(prompt_tokens=2000, generate_tokens=6000)
    scenario = accelerator_scenario(spec, work=work, allow_host_cache=True).at(
        accelerator_rates(spec, disk_s=4.0, link_s=1.0)
    )
    enough_bytes = minimum_bytes(
        dataclasses.replace(scenario, allow_host_cache=False, host_budget_bytes=1 << 40), Strategy.OVERLAP
    )
    for budget_bytes, on_host in ((enough_bytes, False), (enough_bytes - 1, True)):
        own = dataclasses.replace(scenario, budget_bytes=budget_bytes, host_budget_bytes=1 << 40)
        plan, _ = plan_strategy(own, Strategy.OVERLAP)
        assert plan.cache_on_host is on_host
        with pytest.raises(BudgetError):
            plan_strategy(dataclasses.replace(own, budget_bytes=0), Strategy.OVERLAP)
    narrow = dataclasses.replace(
        scenario, budget_bytes=enough_bytes - 1, host_budget_bytes=MemoryAccount(scenario).ring_bytes
    )
    with pytest.raises(BudgetError):
        plan_strategy(narrow, Strategy.OVERLAP)


def test_a_faster_disk_than_link_leaves_the_host_alone_in_a_single_pass() -> None:
    """Stores are filled in the first pass for the passes after it; where there are none they are of no use."""
    spec = model([700] * 12)
    rates = accelerator_rates(spec, disk_s=2.0, link_s=1.0, memory_copy_bytes_per_s=1e6)
    once = budgets(accelerator_scenario(spec, work=Workload(generate_tokens=1, prompt_tokens=16)), 0.2, 1.0)
    assert HOST not in places_of(once.at(rates))
