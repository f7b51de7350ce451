"""Plans for an accelerator keep both budgets, are never slower than the simple rule, nor with more of either memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from headrace.errors import BudgetError, InvalidRequestError, MachineError
from headrace.model.layout import PAGE_BYTES, align_up
from headrace.model.model import LayerGroup
from headrace.model.stored_model import StoredModel
from headrace.planning import planner
from headrace.planning.block_times import BlockTimes, block_times
from headrace.planning.infeasible import minimum_bytes, refuse_below_minimum
from headrace.planning.memory import (
    CACHE_LAYERS_ON_DEVICE,
    LIBRARY_WORK_SPACE_BYTES,
    ArrangedMemory,
    Arrangement,
    MemoryAccount,
)
from headrace.planning.pass_times import LowerBound
from headrace.planning.placements import SLOT_COUNTS, stores
from headrace.planning.plan import TRAVELLING, EmbeddingPlacement, Placement, Plan, Strategy, TierMemory
from headrace.planning.planner import plan_fastest, plan_strategy
from headrace.planning.prediction import Candidate, Prediction, predict
from headrace.planning.rates import LayerTimes, Rates
from headrace.planning.scenario import Scenario
from headrace.planning.timeline import Lane
from headrace.planning.workload import Workload
from planning.test_planner import HIDDEN, model, rates_of

DEVICE, HOST, DISK, CPU = Placement.DEVICE, Placement.HOST, Placement.DISK, Placement.CPU
CHUNK_BYTES = 64 << 10
SHORT = model([700] * 3, vocab=600)


def scenario_of(
    spec: StoredModel, *, dtype: str = "bfloat16", work: Workload | None = None, **changes: Any
) -> Scenario:
    """Ask for plans of a made-up model, with no memory at all unless `changes` give some."""
    return dataclasses.replace(
        Scenario(
            model=spec,
            workload=work or Workload(),
            compute_dtype=dtype,
            budget_bytes=0,
            host_budget_bytes=0,
            device="cuda:0",
            chunk_bytes=CHUNK_BYTES,
        ),
        **changes,
    )


def weights_bytes(scenario: Scenario) -> int:
    return sum(MemoryAccount(scenario).block_bytes)


def without_blocks_bytes(scenario: Scenario) -> int:
    """Return the device's memory that is held whichever blocks stay."""
    return device_memory(scenario, Arrangement((DISK,) * len(scenario.model.blocks), 0)).total_bytes


def device_memory(scenario: Scenario, arrangement: Arrangement) -> TierMemory:
    return MemoryAccount(scenario).device(arrangement)


def host_memory(scenario: Scenario, arrangement: Arrangement) -> TierMemory:
    return MemoryAccount(scenario).host(arrangement)


def memory_of(scenario: Scenario, arrangement: Arrangement) -> ArrangedMemory:
    return MemoryAccount(scenario).of(arrangement)


def ring_bytes(scenario: Scenario) -> int:
    return MemoryAccount(scenario).ring_bytes


def budgets(scenario: Scenario, share: float, host_share: float) -> Scenario:
    """Give these shares of the weights' bytes on the device and on the host, in addition to what is needed anyhow."""
    table_bytes = 2 * scenario.model.embedding.size_bytes
    return dataclasses.replace(
        scenario,
        budget_bytes=without_blocks_bytes(scenario) + int(share * (weights_bytes(scenario) + table_bytes)),
        host_budget_bytes=host_without_blocks_bytes(scenario)
        + int(host_share * (weights_bytes(scenario) + table_bytes)),
    )


def host_without_blocks_bytes(scenario: Scenario) -> int:
    """Return the ring's memory, and what the CPU needs apart from its layers where it may compute."""
    account = MemoryAccount(scenario)
    if not scenario.allow_cpu:
        return account.ring_bytes
    return account.ring_bytes + account.work_space_bytes + account.cpu_conversion_bytes


def accelerator_rates(spec: StoredModel, *, disk_s: float, link_s: float, **changes: Any) -> Rates:
    """Return a machine on which a decode pass computes for 1 s; reading or copying all blocks take this long."""
    size_bytes = sum(block.held_bytes for block in spec.blocks)
    return dataclasses.replace(
        rates_of(spec, load_per_compute=disk_s),
        **{"link_bytes_per_s": size_bytes / link_s, "staged_bytes_per_s": size_bytes / (3 * link_s), **changes},
    )


widths = st.integers(3, 10).map(lambda layers: [700] * layers) | st.lists(
    st.sampled_from([100, 700, 2500]), min_size=1, max_size=7
)
specs = st.builds(model, widths, vocab=st.sampled_from([500, 3000, 8000]), tied=st.booleans())
workloads = st.builds(
    Workload,
    sequences=st.sampled_from([1, 4]),
    prompt_tokens=st.sampled_from([1, 16, 300]),
    generate_tokens=st.sampled_from([1, 8, 32]),
)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    models: st.SearchStrategy[StoredModel] = specs,
    cpu: bool | None = None,
    host_cache: bool | None = None,
) -> Scenario:
    """Draw a model, some work, a machine, and any budgets between nothing and plenty."""
    spec = draw(models)
    scenario = scenario_of(
        spec,
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        work=draw(workloads),
        pinned=draw(st.booleans()),
        allow_cpu=draw(st.booleans()) if cpu is None else cpu,
        allow_host_cache=draw(st.booleans()) if host_cache is None else host_cache,
    )
    layers = len(spec.blocks) - 1
    slower = draw(st.sampled_from([0.5, 2.0, 10.0]))
    rates = accelerator_rates(
        spec,
        disk_s=draw(st.sampled_from([0.5, 1.5, 4.0, 20.0])),
        link_s=draw(st.sampled_from([0.3, 0.9, 1.5, 5.0])),
        copy_latency_s=draw(st.sampled_from([0.0, 1e-3])),
        cpu_layer=LayerTimes(prefill_s=4 * slower / layers, decode_s=slower / layers),
        activation_latency_s=draw(st.sampled_from([0.0, 1e-2])),
        activation_s_per_token=draw(st.sampled_from([0.0, 1e-4])),
        memory_copy_bytes_per_s=draw(st.sampled_from([math.inf, weights_bytes(scenario) / 0.5])),
    )
    twentieths = st.integers(0, 24).map(lambda number: number / 20 + 0.01)
    share = draw(twentieths | st.sampled_from([-0.1, 0.3, 0.5, 0.7]))
    return budgets(scenario.at(rates), share, draw(twentieths | st.sampled_from([-0.02, 0.0])))


def planned(scenario: Scenario) -> Candidate:
    try:
        return plan_fastest(scenario)
    except BudgetError:
        assume(False)
        raise


fewer_examples = settings(max_examples=30, deadline=None)


# -- the budgets -------------------------------------------------------------------------------------------------------


@given(cases(), st.sampled_from([*Strategy, None]))
@settings(max_examples=80, deadline=None)
def test_a_plan_never_exceeds_either_budget(scenario: Scenario, strategy: Strategy | None) -> None:
    if scenario.host_budget_bytes < ring_bytes(scenario) or (minimum_bytes(scenario, strategy) > scenario.budget_bytes):
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


def plan_any(scenario: Scenario, strategy: Strategy | None) -> Candidate:
    if strategy is None:
        return plan_fastest(scenario)
    return plan_strategy(scenario, strategy)


def check_books(scenario: Scenario, plan: Plan) -> None:
    """Recount from the blocks what the plan says of itself."""
    spec, places, host = scenario.model, plan.placements, plan.host_memory
    of = {place: [b for b, own in zip(spec.blocks, places, strict=True) if own is place] for place in Placement}
    travelling = [block.held_bytes for block in (*of[HOST], *of[DISK])]
    assert plan.memory.weights_bytes == sum(block.held_bytes for block in of[DEVICE])
    assert plan.streamed_bytes_per_pass == sum(travelling)
    assert plan.slot_bytes == max(travelling, default=0)
    assert plan.memory.slots_bytes == plan.slots * plan.slot_bytes
    assert host.weights_bytes == sum(align_up(block.held_bytes) for block in (*of[HOST], *of[CPU]))
    assert host.conversion_bytes == (MemoryAccount(scenario).cpu_conversion_bytes if of[CPU] else 0)
    assert host.ring_bytes == scenario.ring_chunks * scenario.chunk_bytes
    assert plan.device == "cuda:0"
    assert (plan.chunk_bytes, plan.ring_chunks) == (scenario.chunk_bytes, scenario.ring_chunks)
    if plan.strategy is Strategy.RESIDENT:
        assert (plan.slots, travelling) == (0, [])
    elif plan.strategy is Strategy.SEQUENTIAL:
        assert plan.slots == 1 <= len(travelling)
    else:
        assert plan.slots in SLOT_COUNTS
        assert plan.slots <= len(travelling), "more slots than travelling blocks would be memory for nothing"
    assert all(block.layer_index is not None for block in of[CPU]), "the head is never the CPU's"
    assert scenario.allow_cpu or not of[CPU]
    cache_bytes = spec.kv_cache_bytes(
        sequences=scenario.workload.sequences,
        context_tokens=scenario.workload.context_tokens,
        element_bytes={"float32": 4, "bfloat16": 2}[scenario.compute_dtype],
    )
    if plan.cache_on_host:
        assert scenario.allow_host_cache
        assert host.kv_cache_bytes == cache_bytes
        layers = len(spec.blocks) - 1
        visiting_bytes = CACHE_LAYERS_ON_DEVICE * cache_bytes // layers if len(of[CPU]) < layers else 0
        assert plan.memory.kv_cache_bytes == visiting_bytes
    else:
        assert plan.memory.kv_cache_bytes + host.kv_cache_bytes == cache_bytes
        assert (host.kv_cache_bytes > 0) == bool(of[CPU])
    assert (host.work_space_bytes > 0) == bool(of[CPU])
    head_stays = places[-1] is DEVICE
    everything_stays = all(place is DEVICE for place in places)
    table = plan.embedding
    assert (table is EmbeddingPlacement.HEAD) == (spec.tied and head_stays)
    assert table is not EmbeddingPlacement.RESIDENT or everything_stays
    assert (plan.memory.embedding_bytes > 0) == (table is EmbeddingPlacement.RESIDENT)
    assert (host.embedding_bytes > 0) == (table is EmbeddingPlacement.HOST)
    if table is EmbeddingPlacement.ROWS:
        free_bytes = plan.host_budget_bytes - host.total_bytes
        assert free_bytes < align_up(spec.embedding.size_bytes), "rows are read only where there is no room for them"


@given(cases(), st.sampled_from([*Strategy, None]))
@example(
    budgets(scenario_of(model([100, 100, 100], vocab=7000), allow_cpu=True), 0.0, 0.5).at(
        accelerator_rates(model([100]), disk_s=1.0, link_s=1.0, cpu_layer=LayerTimes(prefill_s=1.0, decode_s=1.0))
    ),
    None,
)
@example(
    budgets(
        scenario_of(
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
@fewer_examples
def test_the_smallest_budget_works_and_one_byte_less_does_not(scenario: Scenario, strategy: Strategy | None) -> None:
    scenario = dataclasses.replace(scenario, host_budget_bytes=max(scenario.host_budget_bytes, ring_bytes(scenario)))
    with pytest.raises(BudgetError, match="too small for made up") as refused:
        plan_any(dataclasses.replace(scenario, budget_bytes=0), strategy)
    required_bytes = refused.value.required_bytes
    assert required_bytes is not None
    assert required_bytes == minimum_bytes(scenario, strategy)
    assert f"{required_bytes} bytes" in str(refused.value)
    assert "--memory" in str(refused.value)
    enough = dataclasses.replace(scenario, budget_bytes=required_bytes)
    assert plan_any(enough, strategy).plan.memory.total_bytes == required_bytes
    with pytest.raises(BudgetError) as refused:
        plan_any(dataclasses.replace(scenario, budget_bytes=required_bytes - 1), strategy)
    assert refused.value.required_bytes == required_bytes


@pytest.mark.parametrize("strategy", [*Strategy, None])
def test_the_host_must_hold_the_ring_at_least(strategy: Strategy | None) -> None:
    spec = model([700] * 3)
    scenario = dataclasses.replace(budgets(scenario_of(spec), 1.2, 0.0), allow_cpu=True)
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
    scenario = budgets(scenario_of(spec, work=work, allow_host_cache=True), 0.0, 0.0)
    scenario = scenario.at(accelerator_rates(spec, disk_s=2.0, link_s=1.0))
    with pytest.raises(BudgetError, match="or --host-memory to") as refused:
        plan_strategy(scenario, Strategy.OVERLAP)
    with pytest.raises(BudgetError) as plain:
        plan_strategy(dataclasses.replace(scenario, allow_host_cache=False), Strategy.OVERLAP)
    assert "--host-memory" not in str(plain.value)
    assert plain.value.required_bytes == refused.value.required_bytes
    cache_bytes = sum(MemoryAccount(scenario).cache_bytes)
    more = dataclasses.replace(scenario, host_budget_bytes=ring_bytes(scenario) + cache_bytes)
    plan, _ = plan_strategy(more, Strategy.OVERLAP)
    assert plan.cache_on_host


def test_a_ring_that_carries_nothing_is_refused() -> None:
    scenario = scenario_of(model([100]))
    with pytest.raises(InvalidRequestError, match="ring"):
        dataclasses.replace(scenario, ring_chunks=1)
    with pytest.raises(InvalidRequestError, match="ring"):
        dataclasses.replace(scenario, chunk_bytes=PAGE_BYTES - 1)


def test_a_few_large_blocks_stay_where_slots_of_their_size_would_not_fit() -> None:
    """A head of six layers' size: two slots for it take twelve, keeping it takes six and two small slots."""
    spec = model([100] * 5, vocab=7000)
    scenario = budgets(scenario_of(spec), 0.0, 0.0)
    layer, *_, head = MemoryAccount(scenario).block_bytes
    least_bytes = minimum_bytes(scenario, Strategy.OVERLAP)
    assert least_bytes == without_blocks_bytes(scenario) + head + 2 * layer < without_blocks_bytes(scenario) + 2 * head
    small = dataclasses.replace(scenario, budget_bytes=least_bytes).at(accelerator_rates(spec, disk_s=2.0, link_s=1.0))
    plan, _ = plan_strategy(small, Strategy.OVERLAP)
    assert plan.placements == (DISK,) * 5 + (DEVICE,)


# -- memory by purpose -------------------------------------------------------------------------------------------------


def test_what_is_held_beside_the_blocks() -> None:
    spec = model([700, 700])
    work = Workload(sequences=3, prompt_tokens=50, generate_tokens=20)
    scenario = scenario_of(spec, dtype="float32", work=work)
    beside = device_memory(scenario, Arrangement((DISK,) * 3, 0))
    assert (beside.weights_bytes, beside.slots_bytes, beside.embedding_bytes) == (0, 0, 0)
    assert beside.kv_cache_bytes == spec.kv_cache_bytes(sequences=3, context_tokens=70, element_bytes=4)
    assert beside.fixed_bytes == align_up(HIDDEN * 4), "the last norm, as it is used"
    activations = spec.work_space_bytes(sequences=3, new_tokens=50, context_tokens=50, element_bytes=4)
    assert beside.work_space_bytes >= activations + LIBRARY_WORK_SPACE_BYTES
    drafted = device_memory(dataclasses.replace(scenario, draft_tokens=60), Arrangement((DISK,) * 3, 0))
    assert drafted.work_space_bytes > beside.work_space_bytes


def test_the_head_is_converted_whole() -> None:
    """As one block: 8,000 rows of float32 are more than the largest matrix of a layer."""
    spec = model([700, 700], vocab=8000)
    assert MemoryAccount(scenario_of(spec)).conversion_bytes == 0, "used as they lie"
    head_bytes = 8000 * HIDDEN * 4
    as_float32 = MemoryAccount(scenario_of(spec, dtype="float32"))
    assert head_bytes <= as_float32.conversion_bytes < head_bytes + 4 * PAGE_BYTES
    largest_bytes = 700 * HIDDEN * 4
    assert largest_bytes <= as_float32.cpu_conversion_bytes < largest_bytes + 4 * PAGE_BYTES
    experts = MemoryAccount(scenario_of(model([64, 64], vocab=300, experts=8)))
    together_bytes = 8 * 2 * 64 * HIDDEN * 2
    for converted in (experts.conversion_bytes, experts.cpu_conversion_bytes):
        assert together_bytes <= converted < together_bytes + 8 * 2 * 64 + 4 * PAGE_BYTES


def test_what_the_cpu_computes_lies_on_the_host_with_all_it_needs() -> None:
    spec = model([700] * 4)
    scenario = scenario_of(spec, dtype="float32", host_budget_bytes=1 << 40)
    places = (CPU, DISK, CPU, HOST, DEVICE)
    held = memory_of(scenario, Arrangement(places, 2))
    host, layer = held.host, align_up(spec.blocks[0].held_bytes)
    assert host.weights_bytes == (2 + 1) * layer
    assert host.conversion_bytes == MemoryAccount(scenario).cpu_conversion_bytes > 0
    one_cache = spec.kv_cache_bytes(sequences=1, context_tokens=48, element_bytes=4) // 4
    assert (host.kv_cache_bytes, held.device.kv_cache_bytes) == (2 * one_cache, 2 * one_cache)
    assert host.work_space_bytes == held.device.work_space_bytes - LIBRARY_WORK_SPACE_BYTES
    on_host = memory_of(scenario, Arrangement(places, 2, cache_on_host=True))
    assert (on_host.host.kv_cache_bytes, on_host.device.kv_cache_bytes) == (4 * one_cache, 3 * one_cache)
    without = memory_of(scenario, Arrangement((DISK,) * 4 + (DEVICE,), 2)).host
    assert (without.weights_bytes, without.conversion_bytes) == (0, 0)
    assert (without.kv_cache_bytes, without.work_space_bytes) == (0, 0)


def test_a_sliding_window_keeps_no_more_than_itself() -> None:
    spec = model([100, 100])
    layer = next(spec.layers())
    shorter = dataclasses.replace(layer, window_tokens=10)
    windowed = dataclasses.replace(spec, groups=tuple(LayerGroup(layer=each, count=1) for each in (layer, shorter)))
    whole, short, head = cache_bytes = MemoryAccount(scenario_of(windowed)).cache_bytes
    assert (whole, head) == (spec.kv_cache_bytes(sequences=1, context_tokens=48, element_bytes=2) // 2, 0)
    assert short == whole * 10 // 48
    assert sum(cache_bytes) == windowed.kv_cache_bytes(sequences=1, context_tokens=48, element_bytes=2)


def test_where_the_rows_of_the_embedding_come_from() -> None:
    spec = model([700] * 3)
    plenty = budgets(scenario_of(spec), 1.3, 1.3)
    everything, all_but_one = (DEVICE,) * 4, (DISK, DEVICE, DEVICE, DEVICE)
    table_bytes = spec.embedding.size_bytes
    stays = memory_of(plenty, Arrangement(everything, 0))
    assert stays.embedding is EmbeddingPlacement.RESIDENT
    assert 0 <= stays.device.embedding_bytes - table_bytes < 256
    tight = dataclasses.replace(plenty, budget_bytes=stays.device.total_bytes - 1)
    assert memory_of(tight, Arrangement(everything, 0)).embedding is EmbeddingPlacement.HOST
    streamed = memory_of(plenty, Arrangement(all_but_one, 1))
    assert streamed.embedding is EmbeddingPlacement.HOST
    assert (streamed.host.embedding_bytes, streamed.device.embedding_bytes) == (align_up(table_bytes), 0)
    little = dataclasses.replace(plenty, host_budget_bytes=streamed.host.total_bytes - 1)
    assert memory_of(little, Arrangement(all_but_one, 1)).embedding is EmbeddingPlacement.ROWS
    tied = budgets(scenario_of(model([700] * 3, tied=True)), 1.3, 1.3)
    assert memory_of(tied, Arrangement(all_but_one, 1)).embedding is EmbeddingPlacement.HEAD
    assert memory_of(tied, Arrangement((DEVICE, DEVICE, DEVICE, HOST), 1)).embedding is EmbeddingPlacement.HOST
    wide = memory_of(budgets(scenario_of(spec, dtype="float32"), 3.0, 0.0), Arrangement(everything, 0)).device
    assert 0 <= wide.embedding_bytes - 2 * table_bytes < 256, "as it is computed with"


# -- speed -------------------------------------------------------------------------------------------------------------


def fill_then_stream(scenario: Scenario) -> list[Arrangement]:
    """Apply the rule that users apply by hand: two slots, the first blocks stay as long as they fit.

    Of the rest as many wait on the host as it has room for, or none.
    """
    count = len(scenario.model.blocks)
    for number in range(count - 2, -1, -1):
        bare = Arrangement((DEVICE,) * number + (DISK,) * (count - number), 2)
        if device_memory(scenario, bare).total_bytes <= scenario.budget_bytes:
            room_bytes = scenario.host_budget_bytes - host_memory(scenario, bare).total_bytes
            return [
                bare._replace(
                    placements=tuple(HOST if index in stored else place for index, place in enumerate(bare.placements))
                )
                for stored in stores(MemoryAccount(scenario), range(number, count), room_bytes)
            ]
    return []


def prediction_s(scenario: Scenario, plan: Plan, arrangement: Arrangement) -> float:
    """Return the seconds of the same work in another arrangement."""
    held = memory_of(scenario, arrangement)
    other = dataclasses.replace(
        plan,
        strategy=Strategy.OVERLAP,
        placements=arrangement.placements,
        slots=arrangement.slots,
        embedding=held.embedding,
        memory=held.device,
        host_memory=held.host,
        cache_on_host=arrangement.cache_on_host,
    )
    return predict(other, scenario).total_s


@given(cases(host_cache=False))
@fewer_examples
def test_the_planner_is_never_slower_than_filling_memory_and_streaming_the_rest(
    scenario: Scenario,
) -> None:
    plan, prediction = planned(scenario)
    for simple in fill_then_stream(scenario):
        assert prediction.total_s <= prediction_s(scenario, plan, simple) * (1 + 1e-9)


@given(cases())
@fewer_examples
def test_the_planner_is_never_slower_than_any_strategy_alone(scenario: Scenario) -> None:
    _, prediction = planned(scenario)
    for strategy in Strategy:
        try:
            alone = plan_strategy(scenario, strategy)
        except BudgetError:
            continue
        assert alone.plan.strategy is strategy
        assert prediction.total_s <= alone.prediction.total_s * (1 + 1e-9)


@given(cases(cpu=False))
@fewer_examples
def test_a_cpu_that_may_compute_makes_nothing_slower(scenario: Scenario) -> None:
    _, without = planned(scenario)
    _, allowed = planned(dataclasses.replace(scenario, allow_cpu=True))
    assert allowed.total_s <= without.total_s * (1 + 1e-9)


@given(cases(host_cache=False), st.lists(st.floats(0, 1.1), min_size=2, max_size=5))
@fewer_examples
def test_more_of_the_devices_memory_never_predicts_a_slower_run(scenario: Scenario, shares: list[float]) -> None:
    host_bytes = max(ring_bytes(scenario), scenario.host_budget_bytes)
    scenario = dataclasses.replace(scenario, host_budget_bytes=host_bytes)
    least, most_bytes = minimum_bytes(scenario), int(1.1 * weights_bytes(scenario))
    fastest_s = math.inf
    for share in sorted(shares):
        larger = dataclasses.replace(scenario, budget_bytes=least + int(share * most_bytes))
        _, prediction = plan_fastest(larger)
        assert prediction.total_s <= fastest_s * 1.02
        fastest_s = min(fastest_s, prediction.total_s)


@given(cases(host_cache=False), st.lists(st.floats(0, 1.4), min_size=2, max_size=5), st.booleans())
@fewer_examples
def test_more_of_the_hosts_memory_never_predicts_a_slower_run(
    scenario: Scenario, shares: list[float], from_nothing: bool
) -> None:
    start_bytes = ring_bytes(scenario) if from_nothing else host_without_blocks_bytes(scenario)
    lean = dataclasses.replace(scenario, host_budget_bytes=ring_bytes(scenario))
    assume(minimum_bytes(lean) <= scenario.budget_bytes)
    fastest_s = math.inf
    for share in sorted(shares):
        larger = dataclasses.replace(scenario, host_budget_bytes=start_bytes + int(share * weights_bytes(scenario)))
        _, prediction = plan_fastest(larger)
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
    scenario = budgets(scenario_of(spec, allow_cpu=slower is not None), share, host_share).at(
        accelerator_rates(spec, disk_s=disk_s, link_s=link_s, cpu_layer=own)
    )
    plan, prediction = plan_fastest(scenario)
    for simple in fill_then_stream(scenario):
        assert prediction.total_s <= prediction_s(scenario, plan, simple) * (1 + 1e-9)
    layer_bytes = align_up(MemoryAccount(scenario).block_bytes[0])
    for more in (
        dataclasses.replace(scenario, budget_bytes=scenario.budget_bytes + layer_bytes),
        dataclasses.replace(scenario, host_budget_bytes=scenario.host_budget_bytes + layer_bytes),
        dataclasses.replace(scenario, host_budget_bytes=scenario.host_budget_bytes + 5 * layer_bytes),
    ):
        assert plan_fastest(more).prediction.total_s <= prediction.total_s * 1.02


@given(cases(), st.sampled_from([*Strategy, None]))
@fewer_examples
def test_nothing_is_faster_than_bytes_over_bandwidth(scenario: Scenario, strategy: Strategy | None) -> None:
    try:
        plan, prediction = plan_any(scenario, strategy)
    except BudgetError:
        assume(False)
        raise
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


@given(cases(), st.sampled_from(Strategy))
@fewer_examples
def test_the_closed_form_lies_below_what_is_simulated(scenario: Scenario, strategy: Strategy) -> None:
    """For sequential plans it is what is simulated. The few passes simulated may live on what slots held before."""
    rates = dataclasses.replace(scenario.known_rates, read_latency_s=0.01, stall_penalty_s=0.002)
    scenario = scenario.at(rates)
    try:
        plan, prediction = plan_strategy(scenario, strategy)
    except BudgetError:
        assume(False)
        raise
    bound = LowerBound(scenario, strategy, cache_on_host=plan.cache_on_host)
    least_s = bound.total_s(Arrangement(plan.placements, plan.slots, plan.cache_on_host))
    lead_s = scenario.workload.generate_tokens * plan.slots * prediction.load_s_per_pass / 2
    assert least_s <= prediction.total_s * (1 + 1e-9) + (lead_s if strategy is Strategy.OVERLAP else 0.0)
    if strategy is Strategy.SEQUENTIAL:
        assert least_s == pytest.approx(prediction.total_s)


def best_of_everything(scenario: Scenario) -> float:
    """Try every place of every block with every number of slots; seconds of the fastest."""
    plan, prediction = plan_fastest(scenario)
    best_s = prediction.total_s
    kinds = Placement if scenario.allow_cpu else (DEVICE, HOST, DISK)
    for places in itertools.product(kinds, repeat=len(scenario.model.blocks)):
        if places[-1] is CPU or host_memory(scenario, Arrangement(places, 0)).total_bytes > scenario.host_budget_bytes:
            continue
        for slots in (2, 3):
            arrangement = Arrangement(places, slots)
            if arrangement.travelling < slots:
                break
            if device_memory(scenario, arrangement).total_bytes <= scenario.budget_bytes:
                best_s = min(best_s, prediction_s(scenario, plan, arrangement))
    return best_s


alike = st.builds(model, st.integers(2, 4).map(lambda layers: [700] * layers), vocab=st.sampled_from([500, 3000]))
unlike = st.builds(model, st.lists(st.sampled_from([100, 700, 2500]), min_size=2, max_size=4))


@given(cases(models=alike, host_cache=False) | cases(models=unlike, host_cache=False, cpu=False))
@settings(max_examples=15, deadline=None)
def test_the_planner_comes_close_to_trying_everything(scenario: Scenario) -> None:
    """Layers of the CPU are chosen evenly, not by their size: only where they are alike."""
    _, prediction = planned(scenario)
    assert prediction.total_s <= 1.1 * best_of_everything(scenario)


def test_the_simplest_rule_is_tried_whatever_the_ranking_says(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = model([700] * 8)
    scenario = budgets(scenario_of(spec), 0.4, 0.3).at(accelerator_rates(spec, disk_s=4.0, link_s=0.5))
    monkeypatch.setattr(LowerBound, "total_s", lambda bound, arrangement: math.inf)
    plan, prediction = plan_strategy(scenario, Strategy.OVERLAP)
    simple_s = [prediction_s(scenario, plan, simple) for simple in fill_then_stream(scenario)]
    assert prediction.total_s == pytest.approx(min(simple_s))


def test_a_ranking_that_is_wrong_makes_no_plan_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of a slow CPU are simulated in vain."""
    spec = model([700] * 8)
    slow = LayerTimes(prefill_s=9.0, decode_s=9.0)
    scenario = budgets(scenario_of(spec, allow_cpu=True), 0.4, 0.3).at(
        accelerator_rates(spec, disk_s=4.0, link_s=0.5, cpu_layer=slow)
    )
    monkeypatch.setattr(LowerBound, "total_s", lambda bound, arrangement: 0.0)
    allowed, without = (plan_fastest(dataclasses.replace(scenario, allow_cpu=allow)) for allow in (True, False))
    assert allowed.plan.cpu_blocks == 0
    assert allowed.prediction.total_s <= without.prediction.total_s * (1 + 1e-9)


def test_what_is_like_the_best_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread evenly the head would come from the disk, which is several times as large as a layer."""
    spec = model([700] * 8, vocab=8000)
    scenario = budgets(scenario_of(spec), 0.3, 0.4).at(accelerator_rates(spec, disk_s=4.0, link_s=0.5))
    plan, prediction = plan_fastest(scenario)
    assert plan.placements[-1] is not DISK
    monkeypatch.setattr(planner, "ROUNDS_OF_VARIATION", 0)
    assert plan_fastest(scenario).prediction.total_s > 1.1 * prediction.total_s


# -- what is chosen ----------------------------------------------------------------------------------------------------


def places_of(scenario: Scenario) -> dict[Placement, int]:
    plan, _ = plan_fastest(scenario)
    return {place: plan.placements.count(place) for place in Placement if place in plan.placements}


def test_everything_stays_on_the_device_where_everything_fits() -> None:
    spec = model([700] * 6)
    scenario = budgets(scenario_of(spec, allow_cpu=True, allow_host_cache=True), 1.2, 1.2)
    own = LayerTimes(prefill_s=1.0, decode_s=1.0)
    plan, prediction = plan_fastest(scenario.at(accelerator_rates(spec, disk_s=2.0, link_s=1.0, cpu_layer=own)))
    assert (plan.strategy, plan.embedding) == (Strategy.RESIDENT, EmbeddingPlacement.RESIDENT)
    assert (set(plan.placements), prediction.binds) == ({DEVICE}, "compute")


def test_host_memory_comes_before_the_disk_and_what_is_left_is_spread() -> None:
    spec = model([700] * 23, vocab=600)
    scenario = scenario_of(spec, work=Workload(generate_tokens=64)).at(accelerator_rates(spec, disk_s=10.0, link_s=2.0))
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
    scenario = budgets(scenario_of(spec, allow_cpu=True), 0.3, 4.0)
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
    scenario = scenario_of(spec, work=work, allow_host_cache=True).at(accelerator_rates(spec, disk_s=4.0, link_s=1.0))
    enough_bytes = minimum_bytes(
        dataclasses.replace(scenario, allow_host_cache=False, host_budget_bytes=1 << 40), Strategy.OVERLAP
    )
    for budget_bytes, on_host in ((enough_bytes, False), (enough_bytes - 1, True)):
        own = dataclasses.replace(scenario, budget_bytes=budget_bytes, host_budget_bytes=1 << 40)
        plan, _ = plan_strategy(own, Strategy.OVERLAP)
        assert plan.cache_on_host is on_host
        with pytest.raises(BudgetError):
            plan_strategy(dataclasses.replace(own, budget_bytes=0), Strategy.OVERLAP)
    narrow = dataclasses.replace(scenario, budget_bytes=enough_bytes - 1, host_budget_bytes=ring_bytes(scenario))
    with pytest.raises(BudgetError):
        plan_strategy(narrow, Strategy.OVERLAP)


def test_a_faster_disk_than_link_leaves_the_host_alone_in_a_single_pass() -> None:
    """Stores are filled in the first pass for the passes after it; where there are none they are of no use."""
    spec = model([700] * 12)
    rates = accelerator_rates(spec, disk_s=2.0, link_s=1.0, memory_copy_bytes_per_s=1e6)
    once = budgets(scenario_of(spec, work=Workload(generate_tokens=1)), 0.2, 1.0)
    assert HOST not in places_of(once.at(rates))


# -- times -------------------------------------------------------------------------------------------------------------


def test_times_by_place() -> None:
    spec = model([700, 700])
    work = Workload(sequences=2, prompt_tokens=10, generate_tokens=5)
    rates = accelerator_rates(
        spec,
        disk_s=3.0,
        link_s=1.0,
        copy_latency_s=0.25,
        cpu_layer=LayerTimes(prefill_s=7.0, decode_s=5.0),
        activation_latency_s=0.5,
        activation_s_per_token=0.125,
        memory_copy_bytes_per_s=1e6,
    )
    scenario = scenario_of(spec, work=work).at(rates)
    layer = spec.blocks[0]
    own = block_times(dataclasses.replace(scenario, device="cpu"), (DISK,) * 3)[0]
    assert own.copy_s == 0.0

    def times_in(place: Placement, *, pinned: bool = True) -> BlockTimes:
        found = block_times(dataclasses.replace(scenario, pinned=pinned), (place, DEVICE, DEVICE))
        assert found[1:] == block_times(scenario, (DEVICE,) * 3)[1:]
        return found[0]

    copy_s = layer.held_bytes / rates.link_bytes_per_s + 0.25
    assert times_in(DISK) == times_in(DEVICE)
    assert times_in(DISK)[:6] == (own.read_s, own.prefill_s, own.decode_s, copy_s, 0.0, 0.0)
    assert times_in(DISK).pieces == -(-layer.read_bytes // CHUNK_BYTES)
    assert times_in(HOST)[:4] == times_in(DISK)[:4]
    assert (times_in(HOST).store_s, times_in(HOST).stage_s) == (layer.held_bytes / 1e6, 0.0)
    assert times_in(HOST, pinned=False).stage_s == layer.held_bytes / rates.staged_bytes_per_s
    assert times_in(CPU)[:5] == (own.read_s, 7.0 + 0.5 + 2.5, 5.0 + 0.5 + 0.25, 0.0, layer.held_bytes / 1e6)


def test_what_the_cpu_was_not_measured_with_is_refused() -> None:
    spec = model([700, 700])
    scenario = scenario_of(spec).at(accelerator_rates(spec, disk_s=3.0, link_s=1.0))
    with pytest.raises(MachineError, match="layer 0"):
        block_times(scenario, (CPU, DEVICE, DEVICE))
    known = dataclasses.replace(scenario.known_rates, cpu_layer=LayerTimes(prefill_s=1.0, decode_s=1.0))
    with pytest.raises(MachineError, match="head"):
        block_times(scenario.at(known), (DEVICE, DEVICE, CPU))


def test_keys_and_values_on_the_host_visit_the_device_for_their_layers_turn() -> None:
    spec = model([700] * 4)
    rates = accelerator_rates(
        spec, disk_s=3.0, link_s=1.0, cpu_layer=LayerTimes(prefill_s=1.0, decode_s=1.0), copy_latency_s=0.5
    )
    scenario = scenario_of(spec, work=Workload(prompt_tokens=100, generate_tokens=200)).at(rates)
    places = (DEVICE, HOST, DISK, CPU, DEVICE)
    plain, visited = (block_times(scenario, places, cache_on_host=on_host) for on_host in (False, True))
    visit_s = spec.kv_cache_bytes(sequences=1, context_tokens=200, element_bytes=2) / 4 / rates.link_bytes_per_s + 0.5
    assert visited[0].decode_s - plain[0].decode_s == pytest.approx(visit_s)
    for index in (1, 2):
        assert visited[index].copy_s - plain[index].copy_s == pytest.approx(visit_s)
    assert visited[3:] == plain[3:], "the CPU has its own in its memory, the head has none"


def prediction_of(
    rates: Rates,
    placements: str,
    *,
    spec: StoredModel = SHORT,
    pinned: bool = True,
    ring_chunks: int = 4,
    chunk_bytes: int = CHUNK_BYTES,
    **changes: Any,
) -> Prediction:
    """Predict blocks at v(ideo memory), h(ost), d(isk) and c(omputed by the CPU) through two slots."""
    letters = {"v": DEVICE, "h": HOST, "d": DISK, "c": CPU}
    scenario = budgets(scenario_of(spec), 2.0, 9.0).at(rates)
    plan, _ = plan_strategy(scenario, Strategy.RESIDENT)
    chosen = tuple(letters[letter] for letter in placements)
    other = dataclasses.replace(plan, **{"strategy": Strategy.OVERLAP, "slots": 2, "placements": chosen, **changes})
    return predict(
        other, dataclasses.replace(scenario, pinned=pinned, ring_chunks=ring_chunks, chunk_bytes=chunk_bytes)
    )


def test_what_binds() -> None:
    own = LayerTimes(prefill_s=1.0, decode_s=1.0)
    disk_bound = accelerator_rates(SHORT, disk_s=9.0, link_s=3.0, cpu_layer=own)
    link_bound = accelerator_rates(SHORT, disk_s=3.0, link_s=9.0)
    device_bound = accelerator_rates(SHORT, disk_s=0.3, link_s=0.3)
    assert prediction_of(disk_bound, "dddd").binds == "disk"
    assert prediction_of(disk_bound, "hhhh").binds == "link"
    assert prediction_of(disk_bound, "hhhh", pinned=False).binds == "link", "the readers, but not the disk"
    assert prediction_of(link_bound, "dddd").binds == "link"
    assert prediction_of(device_bound, "dddd").binds == "compute"
    assert prediction_of(disk_bound, "cccv").binds == "cpu"
    assert prediction_of(disk_bound, "dddd", strategy=Strategy.SEQUENTIAL).binds == "both"
    assert prediction_of(disk_bound, "vvvv", strategy=Strategy.RESIDENT).binds == "compute"
    locked, staged = (prediction_of(disk_bound, "hhhh", pinned=pinned) for pinned in (True, False))
    assert locked.load_s_per_pass == pytest.approx(3.0)
    assert staged.load_s_per_pass == pytest.approx(9.0)
    loaded = prediction_of(disk_bound, "dddd")
    assert loaded.load_s_per_pass == pytest.approx(9.0)
    assert loaded.compute_s_per_pass == pytest.approx(1.0)
    assert loaded.break_even_tokens_per_pass > 1
    assert prediction_of(disk_bound, "cccv").compute_s_per_pass > 3.0
    assert prediction_of(disk_bound, "vvvv").break_even_tokens_per_pass == 0.0


def test_visits_of_keys_and_values_count_in_a_prediction() -> None:
    rates = accelerator_rates(SHORT, disk_s=2.0, link_s=1.0, copy_latency_s=0.125)
    there, visiting = (prediction_of(rates, "hhhh", cache_on_host=on_host) for on_host in (False, True))
    assert visiting.load_s_per_pass > there.load_s_per_pass + 3 * 0.125


def test_ring_and_chunks_are_those_simulated() -> None:
    """A larger ring lets the disk get further ahead of a slow link; larger chunks arrive later."""
    rates = accelerator_rates(SHORT, disk_s=3.0, link_s=9.0)
    few, many = (prediction_of(rates, "dddd", ring_chunks=chunks) for chunks in (2, 8))
    first_reads = [next(e for e in found.timeline.events if e.lane is Lane.READ) for found in (few, many)]
    assert first_reads[0].end_s > 1.1 * first_reads[1].end_s
    whole = prediction_of(rates, "dddd", chunk_bytes=1 << 30)
    assert whole.prefill_s > few.prefill_s + 0.1


def test_the_first_pass_has_its_own_overhead() -> None:
    rates = accelerator_rates(SHORT, disk_s=2.0, link_s=1.0)
    plain, first = (
        prediction_of(own, "vvvv") for own in (rates, dataclasses.replace(rates, first_pass_overhead_s=5.0))
    )
    assert first.prefill_s - plain.prefill_s == pytest.approx(5.0)
    assert first.decode_s_per_pass == pytest.approx(plain.decode_s_per_pass)


def test_rows_that_are_looked_up_one_by_one_cost_what_their_place_takes() -> None:
    rates = accelerator_rates(SHORT, disk_s=2.0, link_s=1.0)
    rows = dataclasses.replace(rates, row_s=0.5, host_row_s=0.25)
    for embedding, row_s in (
        (EmbeddingPlacement.ROWS, 0.5),
        (EmbeddingPlacement.HOST, 0.25),
        (EmbeddingPlacement.RESIDENT, 0.0),
    ):
        dear, cheap = (prediction_of(own, "vvvv", embedding=embedding) for own in (rows, rates))
        assert dear.compute_s_per_pass - cheap.compute_s_per_pass == pytest.approx(row_s, rel=0.01)
