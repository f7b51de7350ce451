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
from headrace.planning import accelerator_planner
from headrace.planning.accelerator_arrangements import SLOT_COUNTS, stores
from headrace.planning.accelerator_floor import AcceleratorFloor
from headrace.planning.accelerator_memory import (
    CACHE_LAYERS_ON_DEVICE,
    LIBRARY_WORK_SPACE_BYTES,
    AcceleratorRequest,
    Arrangement,
)
from headrace.planning.accelerator_pace import AcceleratorPace, predict_on_accelerator, tiered_times
from headrace.planning.accelerator_planner import (
    minimum_bytes_on_accelerator,
    plan_fastest_on_accelerator,
    plan_on_accelerator,
    refuse_below_minimum_on_accelerator,
)
from headrace.planning.estimate import LayerTimes, block_times
from headrace.planning.plan import TRAVELLING, EmbeddingPlacement, Placement, Plan, Strategy, Workload
from headrace.planning.planner import Candidate
from headrace.planning.timeline import Lane
from planning.test_planner import HIDDEN, model, pace_of

DEVICE, HOST, DISK, PROCESSOR = Placement.DEVICE, Placement.HOST, Placement.DISK, Placement.CPU
CHUNK_BYTES = 64 << 10


def request_of(
    spec: StoredModel, *, dtype: str = "bfloat16", work: Workload | None = None, **changes: Any
) -> AcceleratorRequest:
    """Ask for plans of a made-up model, with no memory at all unless `changes` give some."""
    return dataclasses.replace(
        AcceleratorRequest(
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


def weights_bytes(request: AcceleratorRequest) -> int:
    return sum(request.blocks.device)


def beside_bytes(request: AcceleratorRequest) -> int:
    """Return the device's memory that is held whichever blocks stay."""
    return request.device_memory(Arrangement((DISK,) * len(request.model.blocks), 0)).total_bytes


def budgets(request: AcceleratorRequest, share: float, host_share: float) -> AcceleratorRequest:
    """Give these shares of the weights' bytes on the device and on the host, beside what is needed there anyhow."""
    table_bytes = 2 * request.model.embedding.size_bytes
    return dataclasses.replace(
        request,
        budget_bytes=beside_bytes(request) + int(share * (weights_bytes(request) + table_bytes)),
        host_budget_bytes=host_beside_bytes(request) + int(host_share * (weights_bytes(request) + table_bytes)),
    )


def host_beside_bytes(request: AcceleratorRequest) -> int:
    """Return the ring's memory, and what the processor needs beside its layers where it may compute."""
    if not request.allow_cpu:
        return request.ring_bytes
    return request.ring_bytes + request.work_space_bytes + request.cpu_conversion_bytes


def accelerator_pace(spec: StoredModel, *, disk_s: float, link_s: float, **changes: Any) -> AcceleratorPace:
    """Return a machine on which a decode pass computes for 1 s; reading or copying all blocks take this long."""
    size_bytes = sum(block.held_bytes for block in spec.blocks)
    return dataclasses.replace(
        AcceleratorPace(
            device=pace_of(spec, load_per_compute=disk_s),
            link_bytes_per_s=size_bytes / link_s,
            staged_bytes_per_s=size_bytes / (3 * link_s),
        ),
        **changes,
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
    processor: bool | None = None,
    host_cache: bool | None = None,
) -> tuple[AcceleratorRequest, AcceleratorPace]:
    """Draw a model, some work, a machine, and any budgets between nothing and plenty."""
    spec = draw(models)
    request = request_of(
        spec,
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        work=draw(workloads),
        pinned=draw(st.booleans()),
        allow_cpu=draw(st.booleans()) if processor is None else processor,
        allow_host_cache=draw(st.booleans()) if host_cache is None else host_cache,
    )
    layers = len(spec.blocks) - 1
    slower = draw(st.sampled_from([0.5, 2.0, 10.0]))
    pace = accelerator_pace(
        spec,
        disk_s=draw(st.sampled_from([0.5, 1.5, 4.0, 20.0])),
        link_s=draw(st.sampled_from([0.3, 0.9, 1.5, 5.0])),
        copy_latency_s=draw(st.sampled_from([0.0, 1e-3])),
        processor_layer=LayerTimes(prefill_s=4 * slower / layers, decode_s=slower / layers),
        processor_handover_s=draw(st.sampled_from([0.0, 1e-2])),
        processor_handover_s_per_token=draw(st.sampled_from([0.0, 1e-4])),
        memory_copy_bytes_per_s=draw(st.sampled_from([math.inf, weights_bytes(request) / 0.5])),
    )
    twentieths = st.integers(0, 24).map(lambda number: number / 20 + 0.01)
    share = draw(twentieths | st.sampled_from([-0.1, 0.3, 0.5, 0.7]))
    return budgets(request, share, draw(twentieths | st.sampled_from([-0.02, 0.0]))), pace


def planned(request: AcceleratorRequest, pace: AcceleratorPace) -> Candidate:
    try:
        return plan_fastest_on_accelerator(request, pace)
    except BudgetError:
        assume(False)
        raise


fewer_examples = settings(max_examples=30, deadline=None)


# -- the budgets -------------------------------------------------------------------------------------------------------


@given(cases(), st.sampled_from([*Strategy, None]))
@settings(max_examples=80, deadline=None)
def test_a_plan_never_exceeds_either_budget(
    case: tuple[AcceleratorRequest, AcceleratorPace], strategy: Strategy | None
) -> None:
    request, pace = case
    if request.host_budget_bytes < request.ring_bytes or (
        minimum_bytes_on_accelerator(request, strategy) > request.budget_bytes
    ):
        with pytest.raises(BudgetError) as refused:
            plan_any(request, strategy, pace)
        with pytest.raises(BudgetError, match=re.escape(str(refused.value))):
            refuse_below_minimum_on_accelerator(request, strategy)
        return
    refuse_below_minimum_on_accelerator(request, strategy)
    plan, _ = plan_any(request, strategy, pace)
    assert plan.accelerator is not None
    assert plan.memory.total_bytes <= plan.budget_bytes == request.budget_bytes
    assert plan.accelerator.host.total_bytes <= plan.accelerator.host_budget_bytes == request.host_budget_bytes
    check_books(request, plan)
    assert Plan.from_json(plan.to_json()) == plan


def plan_any(request: AcceleratorRequest, strategy: Strategy | None, pace: AcceleratorPace) -> Candidate:
    if strategy is None:
        return plan_fastest_on_accelerator(request, pace)
    return plan_on_accelerator(request, strategy, pace)


def check_books(request: AcceleratorRequest, plan: Plan) -> None:
    """Recount from the blocks what the plan says of itself."""
    assert plan.accelerator is not None
    spec, places, host = request.model, plan.places, plan.accelerator.host
    of = {place: [b for b, own in zip(spec.blocks, places, strict=True) if own is place] for place in Placement}
    travelling = [block.held_bytes for block in (*of[HOST], *of[DISK])]
    assert plan.resident == tuple(place is DEVICE for place in places)
    assert plan.memory.resident_bytes == sum(block.held_bytes for block in of[DEVICE])
    assert plan.streamed_bytes_per_pass == sum(travelling)
    assert plan.slot_bytes == max(travelling, default=0)
    assert plan.memory.slots_bytes == plan.slots * plan.slot_bytes
    assert host.stores_bytes == sum(align_up(block.held_bytes) for block in of[HOST])
    own_bytes = sum(align_up(block.held_bytes) for block in of[PROCESSOR])
    assert host.cpu_bytes >= own_bytes
    assert host.ring_bytes == request.ring_chunks * request.chunk_bytes
    assert (plan.accelerator.device, plan.device) == ("cuda:0", "cuda:0")
    assert (plan.accelerator.chunk_bytes, plan.accelerator.ring_chunks) == (request.chunk_bytes, request.ring_chunks)
    if plan.strategy is Strategy.RESIDENT:
        assert (plan.slots, travelling) == (0, [])
    elif plan.strategy is Strategy.SEQUENTIAL:
        assert plan.slots == 1 <= len(travelling)
    else:
        assert plan.slots in SLOT_COUNTS
        assert plan.slots <= len(travelling), "more slots than travelling blocks would be memory for nothing"
    assert all(block.layer_index is not None for block in of[PROCESSOR]), "the head is never the processor's"
    assert request.allow_cpu or not of[PROCESSOR]
    cache_bytes = spec.kv_cache_bytes(
        sequences=request.workload.sequences,
        context_tokens=request.workload.context_tokens,
        element_bytes={"float32": 4, "bfloat16": 2}[request.compute_dtype],
    )
    if plan.accelerator.cache_on_host:
        assert request.allow_host_cache
        assert host.kv_cache_bytes == cache_bytes
        layers = len(spec.blocks) - 1
        visiting_bytes = CACHE_LAYERS_ON_DEVICE * cache_bytes // layers if len(of[PROCESSOR]) < layers else 0
        assert plan.memory.kv_cache_bytes == visiting_bytes
    else:
        assert plan.memory.kv_cache_bytes + host.kv_cache_bytes == cache_bytes
        assert (host.kv_cache_bytes > 0) == bool(of[PROCESSOR])
    assert (host.work_space_bytes > 0) == bool(of[PROCESSOR])
    head_stays = places[-1] is DEVICE
    everything_stays = all(place is DEVICE for place in places)
    table = plan.embedding
    assert (table is EmbeddingPlacement.HEAD) == (spec.tied and head_stays)
    assert table is not EmbeddingPlacement.RESIDENT or everything_stays
    assert (plan.memory.embedding_bytes > 0) == (table is EmbeddingPlacement.RESIDENT)
    assert (host.embedding_bytes > 0) == (table is EmbeddingPlacement.HOST)
    if table is EmbeddingPlacement.ROWS:
        free_bytes = plan.accelerator.host_budget_bytes - host.total_bytes
        assert free_bytes < align_up(spec.embedding.size_bytes), "rows are read only where there is no room for them"


@given(cases(), st.sampled_from([*Strategy, None]))
@example(
    (
        budgets(request_of(model([100, 100, 100], vocab=7000), allow_cpu=True), 0.0, 0.5),
        accelerator_pace(model([100]), disk_s=1.0, link_s=1.0, processor_layer=LayerTimes(prefill_s=1.0, decode_s=1.0)),
    ),
    None,
)
@example(
    (
        budgets(
            request_of(
                model([2500, 100]),
                work=Workload(prompt_tokens=1, generate_tokens=8),
                allow_cpu=True,
                pinned=False,
            ),
            0.0,
            0.41,
        ),
        accelerator_pace(
            model([2500, 100]), disk_s=0.5, link_s=0.3, processor_layer=LayerTimes(prefill_s=1.0, decode_s=0.25)
        ),
    ),
    Strategy.RESIDENT,
)
@fewer_examples
def test_the_smallest_budget_works_and_one_byte_less_does_not(
    case: tuple[AcceleratorRequest, AcceleratorPace], strategy: Strategy | None
) -> None:
    request, pace = case
    request = dataclasses.replace(request, host_budget_bytes=max(request.host_budget_bytes, request.ring_bytes))
    with pytest.raises(BudgetError, match="too small for made up") as refused:
        plan_any(dataclasses.replace(request, budget_bytes=0), strategy, pace)
    required_bytes = refused.value.required_bytes
    assert required_bytes is not None
    assert required_bytes == minimum_bytes_on_accelerator(request, strategy)
    assert f"{required_bytes} bytes" in str(refused.value)
    assert "--memory" in str(refused.value)
    enough = dataclasses.replace(request, budget_bytes=required_bytes)
    assert plan_any(enough, strategy, pace).plan.memory.total_bytes == required_bytes
    with pytest.raises(BudgetError) as refused:
        plan_any(dataclasses.replace(request, budget_bytes=required_bytes - 1), strategy, pace)
    assert refused.value.required_bytes == required_bytes


@pytest.mark.parametrize("strategy", [*Strategy, None])
def test_the_host_must_hold_the_ring_at_least(strategy: Strategy | None) -> None:
    spec = model([700] * 3)
    request = dataclasses.replace(budgets(request_of(spec), 1.2, 0.0), allow_cpu=True)
    pace = accelerator_pace(spec, disk_s=2.0, link_s=1.0)
    assert request.host_budget_bytes == 4 * CHUNK_BYTES
    assert plan_any(request, strategy, pace).plan.accelerator is not None
    with pytest.raises(BudgetError, match="--host-memory") as refused:
        plan_any(dataclasses.replace(request, host_budget_bytes=4 * CHUNK_BYTES - 1), strategy, pace)
    assert refused.value.required_bytes == 4 * CHUNK_BYTES
    with pytest.raises(BudgetError, match="--host-memory"):
        minimum_bytes_on_accelerator(dataclasses.replace(request, host_budget_bytes=0), strategy)


def test_a_refusal_says_what_host_memory_would_do_instead() -> None:
    """Keys and values that do not fit on the device fit on the host."""
    work = Workload(prompt_tokens=2000, generate_tokens=6000)
    spec = model([700] * 12)
    request = budgets(request_of(spec, work=work, allow_host_cache=True), 0.0, 0.0)
    pace = accelerator_pace(spec, disk_s=2.0, link_s=1.0)
    with pytest.raises(BudgetError, match="With --host-memory of") as refused:
        plan_on_accelerator(request, Strategy.OVERLAP, pace)
    with pytest.raises(BudgetError) as plain:
        plan_on_accelerator(dataclasses.replace(request, allow_host_cache=False), Strategy.OVERLAP, pace)
    assert "--host-memory" not in str(plain.value)
    assert plain.value.required_bytes == refused.value.required_bytes
    cache_bytes = sum(request.blocks.cache)
    more = dataclasses.replace(request, host_budget_bytes=request.ring_bytes + cache_bytes)
    plan, _ = plan_on_accelerator(more, Strategy.OVERLAP, pace)
    assert plan.accelerator is not None
    assert plan.accelerator.cache_on_host


def test_a_ring_that_carries_nothing_is_refused() -> None:
    request = request_of(model([100]))
    with pytest.raises(InvalidRequestError, match="ring"):
        dataclasses.replace(request, ring_chunks=1)
    with pytest.raises(InvalidRequestError, match="ring"):
        dataclasses.replace(request, chunk_bytes=PAGE_BYTES - 1)


def test_a_few_large_blocks_stay_where_slots_of_their_size_would_not_fit() -> None:
    """A head of six layers' size: two slots for it take twelve, keeping it takes six and two small slots."""
    spec = model([100] * 5, vocab=7000)
    request = budgets(request_of(spec), 0.0, 0.0)
    layer, *_, head = request.blocks.device
    least_bytes = minimum_bytes_on_accelerator(request, Strategy.OVERLAP)
    assert least_bytes == beside_bytes(request) + head + 2 * layer < beside_bytes(request) + 2 * head
    pace = accelerator_pace(spec, disk_s=2.0, link_s=1.0)
    plan, _ = plan_on_accelerator(dataclasses.replace(request, budget_bytes=least_bytes), Strategy.OVERLAP, pace)
    assert plan.places == (DISK,) * 5 + (DEVICE,)


# -- memory by purpose -------------------------------------------------------------------------------------------------


def test_what_is_held_beside_the_blocks() -> None:
    spec = model([700, 700])
    work = Workload(sequences=3, prompt_tokens=50, generate_tokens=20)
    request = request_of(spec, dtype="float32", work=work)
    beside = request.device_memory(Arrangement((DISK,) * 3, 0))
    assert (beside.resident_bytes, beside.slots_bytes, beside.embedding_bytes) == (0, 0, 0)
    assert beside.kv_cache_bytes == spec.kv_cache_bytes(sequences=3, context_tokens=70, element_bytes=4)
    assert beside.fixed_bytes == align_up(HIDDEN * 4), "the last norm, as it is used"
    activations = spec.work_space_bytes(sequences=3, new_tokens=50, context_tokens=50, element_bytes=4)
    assert beside.work_space_bytes >= activations + LIBRARY_WORK_SPACE_BYTES
    drafted = dataclasses.replace(request, draft_tokens=60).device_memory(Arrangement((DISK,) * 3, 0))
    assert drafted.work_space_bytes > beside.work_space_bytes


def test_the_head_is_converted_whole() -> None:
    """As one block: 8,000 rows of float32 are more than the largest matrix of a layer."""
    spec = model([700, 700], vocab=8000)
    assert request_of(spec).conversion_bytes == 0, "used as they lie"
    head_bytes = 8000 * HIDDEN * 4
    as_float32 = request_of(spec, dtype="float32")
    assert head_bytes <= as_float32.conversion_bytes < head_bytes + 4 * PAGE_BYTES
    largest_bytes = 700 * HIDDEN * 4
    assert largest_bytes <= as_float32.cpu_conversion_bytes < largest_bytes + 4 * PAGE_BYTES
    experts = request_of(model([64, 64], vocab=300, experts=8))
    together_bytes = 8 * 2 * 64 * HIDDEN * 2
    for converted in (experts.conversion_bytes, experts.cpu_conversion_bytes):
        assert together_bytes <= converted < together_bytes + 8 * 2 * 64 + 4 * PAGE_BYTES


def test_what_the_processor_computes_lies_on_the_host_with_all_it_needs() -> None:
    spec = model([700] * 4)
    request = request_of(spec, dtype="float32", host_budget_bytes=1 << 40)
    places = (PROCESSOR, DISK, PROCESSOR, HOST, DEVICE)
    held = request.memory(Arrangement(places, 2))
    host, layer = held.host, align_up(spec.blocks[0].held_bytes)
    assert host.cpu_bytes == 2 * layer + request.cpu_conversion_bytes
    assert host.stores_bytes == layer
    one_cache = spec.kv_cache_bytes(sequences=1, context_tokens=48, element_bytes=4) // 4
    assert (host.kv_cache_bytes, held.device.kv_cache_bytes) == (2 * one_cache, 2 * one_cache)
    assert host.work_space_bytes == held.device.work_space_bytes - LIBRARY_WORK_SPACE_BYTES
    on_host = request.memory(Arrangement(places, 2, cache_on_host=True))
    assert (on_host.host.kv_cache_bytes, on_host.device.kv_cache_bytes) == (4 * one_cache, 3 * one_cache)
    without = request.memory(Arrangement((DISK,) * 4 + (DEVICE,), 2)).host
    assert (without.cpu_bytes, without.kv_cache_bytes, without.work_space_bytes) == (0, 0, 0)


def test_a_sliding_window_keeps_no_more_than_itself() -> None:
    spec = model([100, 100])
    layer = next(spec.layers())
    shorter = dataclasses.replace(layer, window_tokens=10)
    groups = tuple(LayerGroup(layer=each, count=1) for each in (layer, shorter))
    windowed = dataclasses.replace(spec, groups=groups)
    whole, short, head = request_of(windowed).blocks.cache
    assert (whole, head) == (spec.kv_cache_bytes(sequences=1, context_tokens=48, element_bytes=2) // 2, 0)
    assert short == whole * 10 // 48
    assert sum(request_of(windowed).blocks.cache) == windowed.kv_cache_bytes(
        sequences=1, context_tokens=48, element_bytes=2
    )


def test_where_the_rows_of_the_embedding_come_from() -> None:
    spec = model([700] * 3)
    plenty = budgets(request_of(spec), 1.3, 1.3)
    everything, all_but_one = (DEVICE,) * 4, (DISK, DEVICE, DEVICE, DEVICE)
    table_bytes = spec.embedding.size_bytes
    stays = plenty.memory(Arrangement(everything, 0))
    assert stays.embedding is EmbeddingPlacement.RESIDENT
    assert 0 <= stays.device.embedding_bytes - table_bytes < 256
    tight = dataclasses.replace(plenty, budget_bytes=stays.device.total_bytes - 1)
    assert tight.memory(Arrangement(everything, 0)).embedding is EmbeddingPlacement.HOST
    streamed = plenty.memory(Arrangement(all_but_one, 1))
    assert streamed.embedding is EmbeddingPlacement.HOST
    assert (streamed.host.embedding_bytes, streamed.device.embedding_bytes) == (align_up(table_bytes), 0)
    little = dataclasses.replace(plenty, host_budget_bytes=streamed.host.total_bytes - 1)
    assert little.memory(Arrangement(all_but_one, 1)).embedding is EmbeddingPlacement.ROWS
    tied = budgets(request_of(model([700] * 3, tied=True)), 1.3, 1.3)
    assert tied.memory(Arrangement(all_but_one, 1)).embedding is EmbeddingPlacement.HEAD
    assert tied.memory(Arrangement((DEVICE, DEVICE, DEVICE, HOST), 1)).embedding is EmbeddingPlacement.HOST
    wide = budgets(request_of(spec, dtype="float32"), 3.0, 0.0).memory(Arrangement(everything, 0)).device
    assert 0 <= wide.embedding_bytes - 2 * table_bytes < 256, "as it is computed with"


# -- speed -------------------------------------------------------------------------------------------------------------


def fill_then_stream(request: AcceleratorRequest) -> list[Arrangement]:
    """Apply the rule that users apply by hand: two slots, the first blocks stay as long as they fit.

    Of the rest as many wait on the host as it has room for, or none.
    """
    count = len(request.model.blocks)
    for number in range(count - 2, -1, -1):
        bare = Arrangement((DEVICE,) * number + (DISK,) * (count - number), 2)
        if request.device_memory(bare).total_bytes <= request.budget_bytes:
            room_bytes = request.host_budget_bytes - request.host_memory(bare).total_bytes
            return [
                bare._replace(places=tuple(HOST if i in stored else place for i, place in enumerate(bare.places)))
                for stored in stores(request, range(number, count), room_bytes)
            ]
    return []


def prediction_s(request: AcceleratorRequest, pace: AcceleratorPace, plan: Plan, arrangement: Arrangement) -> float:
    """Return the seconds of the same work in another arrangement."""
    assert plan.accelerator is not None
    held = request.memory(arrangement)
    on_device = dataclasses.replace(
        plan.accelerator,
        places=arrangement.places,
        host=held.host,
        cache_on_host=arrangement.cache_on_host,
    )
    other = dataclasses.replace(
        plan,
        strategy=Strategy.OVERLAP,
        resident=tuple(place is DEVICE for place in arrangement.places),
        slots=arrangement.slots,
        embedding=held.embedding,
        memory=held.device,
        accelerator=on_device,
    )
    return predict_on_accelerator(request.model, other, pace, pinned=request.pinned).total_s


@given(cases(host_cache=False))
@fewer_examples
def test_the_planner_is_never_slower_than_filling_memory_and_streaming_the_rest(
    case: tuple[AcceleratorRequest, AcceleratorPace],
) -> None:
    request, pace = case
    plan, prediction = planned(request, pace)
    for simple in fill_then_stream(request):
        assert prediction.total_s <= prediction_s(request, pace, plan, simple) * (1 + 1e-9)


@given(cases())
@fewer_examples
def test_the_planner_is_never_slower_than_any_strategy_alone(case: tuple[AcceleratorRequest, AcceleratorPace]) -> None:
    request, pace = case
    _, prediction = planned(request, pace)
    for strategy in Strategy:
        try:
            alone = plan_on_accelerator(request, strategy, pace)
        except BudgetError:
            continue
        assert alone.plan.strategy is strategy
        assert prediction.total_s <= alone.prediction.total_s * (1 + 1e-9)


@given(cases(processor=False))
@fewer_examples
def test_a_processor_that_may_compute_makes_nothing_slower(case: tuple[AcceleratorRequest, AcceleratorPace]) -> None:
    request, pace = case
    _, without = planned(request, pace)
    _, allowed = planned(dataclasses.replace(request, allow_cpu=True), pace)
    assert allowed.total_s <= without.total_s * (1 + 1e-9)


@given(cases(host_cache=False), st.lists(st.floats(0, 1.1), min_size=2, max_size=5))
@fewer_examples
def test_more_of_the_devices_memory_never_predicts_a_slower_run(
    case: tuple[AcceleratorRequest, AcceleratorPace], shares: list[float]
) -> None:
    request, pace = case
    host_bytes = max(request.ring_bytes, request.host_budget_bytes)
    request = dataclasses.replace(request, host_budget_bytes=host_bytes)
    least, most_bytes = minimum_bytes_on_accelerator(request), int(1.1 * weights_bytes(request))
    fastest_s = math.inf
    for share in sorted(shares):
        larger = dataclasses.replace(request, budget_bytes=least + int(share * most_bytes))
        _, prediction = plan_fastest_on_accelerator(larger, pace)
        assert prediction.total_s <= fastest_s * 1.02
        fastest_s = min(fastest_s, prediction.total_s)


@given(cases(host_cache=False), st.lists(st.floats(0, 1.4), min_size=2, max_size=5), st.booleans())
@fewer_examples
def test_more_of_the_hosts_memory_never_predicts_a_slower_run(
    case: tuple[AcceleratorRequest, AcceleratorPace], shares: list[float], from_nothing: bool
) -> None:
    request, pace = case
    start_bytes = request.ring_bytes if from_nothing else host_beside_bytes(request)
    lean = dataclasses.replace(request, host_budget_bytes=request.ring_bytes)
    assume(minimum_bytes_on_accelerator(lean) <= request.budget_bytes)
    fastest_s = math.inf
    for share in sorted(shares):
        larger = dataclasses.replace(request, host_budget_bytes=start_bytes + int(share * weights_bytes(request)))
        _, prediction = plan_fastest_on_accelerator(larger, pace)
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
    pace = accelerator_pace(spec, disk_s=disk_s, link_s=link_s, processor_layer=own)
    request = budgets(request_of(spec, allow_cpu=slower is not None), share, host_share)
    plan, prediction = plan_fastest_on_accelerator(request, pace)
    for simple in fill_then_stream(request):
        assert prediction.total_s <= prediction_s(request, pace, plan, simple) * (1 + 1e-9)
    layer_bytes = align_up(request.blocks.device[0])
    for more in (
        dataclasses.replace(request, budget_bytes=request.budget_bytes + layer_bytes),
        dataclasses.replace(request, host_budget_bytes=request.host_budget_bytes + layer_bytes),
        dataclasses.replace(request, host_budget_bytes=request.host_budget_bytes + 5 * layer_bytes),
    ):
        assert plan_fastest_on_accelerator(more, pace).prediction.total_s <= prediction.total_s * 1.02


@given(cases(), st.sampled_from([*Strategy, None]))
@fewer_examples
def test_nothing_is_faster_than_bytes_over_bandwidth(
    case: tuple[AcceleratorRequest, AcceleratorPace], strategy: Strategy | None
) -> None:
    request, pace = case
    try:
        plan, prediction = plan_any(request, strategy, pace)
    except BudgetError:
        assume(False)
        raise
    blocks = request.model.blocks
    from_disk = [b.read_bytes for b, place in zip(blocks, plan.places, strict=True) if place is DISK]
    read_s = sum(from_disk) / pace.device.read_bytes_per_s
    copy_s = plan.streamed_bytes_per_pass / pace.link_bytes_per_s
    slack = 1 - 1e-9
    assert prediction.decode_s_per_pass >= max(read_s, copy_s, prediction.compute_s_per_pass) * slack
    assert prediction.decode_s_per_pass >= prediction.possible_decode_s * slack
    assert prediction.load_s_per_pass >= max(read_s, copy_s) * slack
    first_read_s = sum(block.read_bytes for block in blocks) / pace.device.read_bytes_per_s
    assert prediction.prefill_s >= first_read_s * slack
    further = request.workload.generate_tokens - 1
    assert prediction.total_s == pytest.approx(prediction.prefill_s + further * prediction.decode_s_per_pass)
    assert prediction.tokens_per_s == pytest.approx(request.workload.sequences / prediction.decode_s_per_pass)


@given(cases(), st.sampled_from(Strategy))
@fewer_examples
def test_the_closed_form_lies_below_what_is_simulated(
    case: tuple[AcceleratorRequest, AcceleratorPace], strategy: Strategy
) -> None:
    """For sequential plans it is what is simulated. The few passes simulated may live on what slots held before."""
    request, pace = case
    pace = dataclasses.replace(
        pace, device=dataclasses.replace(pace.device, read_latency_s=0.01, stall_penalty_s=0.002)
    )
    try:
        plan, prediction = plan_on_accelerator(request, strategy, pace)
    except BudgetError:
        assume(False)
        raise
    assert plan.accelerator is not None
    cache_on_host = plan.accelerator.cache_on_host
    floor = AcceleratorFloor.of(request, strategy, pace, cache_on_host=cache_on_host)
    least_s = floor.total_s(Arrangement(plan.places, plan.slots, cache_on_host))
    lead_s = request.workload.generate_tokens * plan.slots * prediction.load_s_per_pass / 2
    assert least_s <= prediction.total_s * (1 + 1e-9) + (lead_s if strategy is Strategy.OVERLAP else 0.0)
    if strategy is Strategy.SEQUENTIAL:
        assert least_s == pytest.approx(prediction.total_s)


def best_of_everything(request: AcceleratorRequest, pace: AcceleratorPace) -> float:
    """Try every place of every block with every number of slots; seconds of the fastest."""
    plan, prediction = plan_fastest_on_accelerator(request, pace)
    best_s = prediction.total_s
    kinds = Placement if request.allow_cpu else (DEVICE, HOST, DISK)
    for places in itertools.product(kinds, repeat=len(request.model.blocks)):
        if (
            places[-1] is PROCESSOR
            or request.host_memory(Arrangement(places, 0)).total_bytes > request.host_budget_bytes
        ):
            continue
        for slots in (2, 3):
            arrangement = Arrangement(places, slots)
            if arrangement.travelling < slots:
                break
            if request.device_memory(arrangement).total_bytes <= request.budget_bytes:
                best_s = min(best_s, prediction_s(request, pace, plan, arrangement))
    return best_s


alike = st.builds(model, st.integers(2, 4).map(lambda layers: [700] * layers), vocab=st.sampled_from([500, 3000]))
unlike = st.builds(model, st.lists(st.sampled_from([100, 700, 2500]), min_size=2, max_size=4))


@given(cases(models=alike, host_cache=False) | cases(models=unlike, host_cache=False, processor=False))
@settings(max_examples=15, deadline=None)
def test_the_planner_comes_close_to_trying_everything(case: tuple[AcceleratorRequest, AcceleratorPace]) -> None:
    """Layers of the processor are chosen evenly, not by their size: only where they are alike."""
    request, pace = case
    _, prediction = planned(request, pace)
    assert prediction.total_s <= 1.1 * best_of_everything(request, pace)


def test_the_simplest_rule_is_tried_whatever_the_ranking_says(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = model([700] * 8)
    request = budgets(request_of(spec), 0.4, 0.3)
    pace = accelerator_pace(spec, disk_s=4.0, link_s=0.5)
    monkeypatch.setattr(AcceleratorFloor, "total_s", lambda floor, arrangement: math.inf)
    plan, prediction = plan_on_accelerator(request, Strategy.OVERLAP, pace)
    simple_s = [prediction_s(request, pace, plan, simple) for simple in fill_then_stream(request)]
    assert prediction.total_s == pytest.approx(min(simple_s))


def test_a_ranking_that_is_wrong_makes_no_plan_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of a slow processor are simulated in vain."""
    spec = model([700] * 8)
    slow = LayerTimes(prefill_s=9.0, decode_s=9.0)
    pace = accelerator_pace(spec, disk_s=4.0, link_s=0.5, processor_layer=slow)
    request = budgets(request_of(spec, allow_cpu=True), 0.4, 0.3)
    monkeypatch.setattr(AcceleratorFloor, "total_s", lambda floor, arrangement: 0.0)
    allowed, without = (
        plan_fastest_on_accelerator(dataclasses.replace(request, allow_cpu=allow), pace) for allow in (True, False)
    )
    assert allowed.plan.cpu_blocks == 0
    assert allowed.prediction.total_s <= without.prediction.total_s * (1 + 1e-9)


def test_what_is_like_the_best_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread evenly the head would come from the disk, which is several times as large as a layer."""
    spec = model([700] * 8, vocab=8000)
    request = budgets(request_of(spec), 0.3, 0.4)
    pace = accelerator_pace(spec, disk_s=4.0, link_s=0.5)
    plan, prediction = plan_fastest_on_accelerator(request, pace)
    assert plan.places[-1] is not DISK
    monkeypatch.setattr(accelerator_planner, "ROUNDS_OF_VARIATION", 0)
    assert plan_fastest_on_accelerator(request, pace).prediction.total_s > 1.1 * prediction.total_s


# -- what is chosen ----------------------------------------------------------------------------------------------------


def places_of(request: AcceleratorRequest, pace: AcceleratorPace) -> dict[Placement, int]:
    plan, _ = plan_fastest_on_accelerator(request, pace)
    return {place: plan.places.count(place) for place in Placement if place in plan.places}


def test_everything_stays_on_the_device_where_everything_fits() -> None:
    spec = model([700] * 6)
    request = budgets(request_of(spec, allow_cpu=True, allow_host_cache=True), 1.2, 1.2)
    plan, prediction = plan_fastest_on_accelerator(
        request, accelerator_pace(spec, disk_s=2.0, link_s=1.0, processor_layer=LayerTimes(prefill_s=1.0, decode_s=1.0))
    )
    assert (plan.strategy, plan.embedding) == (Strategy.RESIDENT, EmbeddingPlacement.RESIDENT)
    assert (set(plan.places), prediction.binds) == ({DEVICE}, "compute")


def test_host_memory_comes_before_the_disk_and_what_is_left_is_spread() -> None:
    spec = model([700] * 23, vocab=600)
    pace = accelerator_pace(spec, disk_s=10.0, link_s=2.0)
    request = request_of(spec, work=Workload(generate_tokens=64))
    half = budgets(request, 0.3, 0.3)
    plan, prediction = plan_fastest_on_accelerator(half, pace)
    assert plan.accelerator is not None
    assert plan.accelerator.host.stores_bytes + align_up(spec.blocks[0].held_bytes) > half.host_budget_bytes - (
        plan.accelerator.host.ring_bytes + plan.accelerator.host.embedding_bytes
    )
    travelling = [place for place in plan.places if place in TRAVELLING]
    runs = [len(list(run)) for place, run in itertools.groupby(travelling) if place is DISK]
    assert plan.places.count(HOST) >= 6
    assert max(runs) <= 2, "the disk's lie among those of the host"
    assert prediction.binds == "disk"
    assert prediction.decode_s_per_pass < 1.1 * prediction.possible_decode_s
    all_on_host = plan_fastest_on_accelerator(budgets(request, 0.3, 1.2), pace)
    assert DISK not in all_on_host.plan.places
    assert all_on_host.prediction.binds == "link"


def test_the_processor_computes_where_the_link_is_slower_than_it() -> None:
    spec = model([700] * 24, vocab=600)
    request = budgets(request_of(spec, allow_cpu=True), 0.3, 4.0)
    own = LayerTimes(prefill_s=2.0 / 24, decode_s=2.0 / 24)
    slow, fast = (accelerator_pace(spec, disk_s=20.0, link_s=link_s, processor_layer=own) for link_s in (8.0, 0.5))
    chosen = places_of(request, slow)
    assert 4 <= chosen[PROCESSOR] < 24, "as many as let the processor and the link end together"
    assert PROCESSOR not in places_of(request, fast)
    assert PROCESSOR not in places_of(dataclasses.replace(request, allow_cpu=False), slow)
    unknown = dataclasses.replace(slow, processor_layer=None)
    assert PROCESSOR not in places_of(request, unknown)
    plan, prediction = plan_on_accelerator(request, Strategy.RESIDENT, slow)
    assert plan.cpu_blocks >= 10, "what does not fit on the device is computed where it lies"
    assert (plan.slots, prediction.binds) == (0, "cpu")
    layers = [place is PROCESSOR for place in plan_fastest_on_accelerator(request, slow).plan.places[:-1]]
    runs = [len(list(run)) for computed, run in itertools.groupby(layers) if not computed]
    assert max(runs) <= 2 * math.ceil(24 / sum(layers)), "they are spread"


def test_keys_and_values_wait_on_the_host_only_where_they_do_not_fit_beside_two_slots() -> None:
    spec = model([700] * 12)
    work = Workload(prompt_tokens=2000, generate_tokens=6000)
    request = request_of(spec, work=work, allow_host_cache=True)
    pace = accelerator_pace(spec, disk_s=4.0, link_s=1.0)
    enough_bytes = minimum_bytes_on_accelerator(
        dataclasses.replace(request, allow_host_cache=False, host_budget_bytes=1 << 40), Strategy.OVERLAP
    )
    for budget_bytes, on_host in ((enough_bytes, False), (enough_bytes - 1, True)):
        own = dataclasses.replace(request, budget_bytes=budget_bytes, host_budget_bytes=1 << 40)
        plan, _ = plan_on_accelerator(own, Strategy.OVERLAP, pace)
        assert plan.accelerator is not None
        assert plan.accelerator.cache_on_host is on_host
        with pytest.raises(BudgetError):
            plan_on_accelerator(dataclasses.replace(own, budget_bytes=0), Strategy.OVERLAP, pace)
    narrow = dataclasses.replace(request, budget_bytes=enough_bytes - 1, host_budget_bytes=request.ring_bytes)
    with pytest.raises(BudgetError):
        plan_on_accelerator(narrow, Strategy.OVERLAP, pace)


def test_a_faster_disk_than_link_leaves_the_host_alone_in_a_single_pass() -> None:
    """Stores are filled in the first pass for the passes after it; where there are none they are of no use."""
    spec = model([700] * 12)
    pace = accelerator_pace(spec, disk_s=2.0, link_s=1.0, memory_copy_bytes_per_s=1e6)
    once = budgets(request_of(spec, work=Workload(generate_tokens=1)), 0.2, 1.0)
    assert HOST not in places_of(once, pace)


# -- times -------------------------------------------------------------------------------------------------------------


def test_times_by_place() -> None:
    spec = model([700, 700])
    work = Workload(sequences=2, prompt_tokens=10, generate_tokens=5)
    pace = accelerator_pace(
        spec,
        disk_s=3.0,
        link_s=1.0,
        copy_latency_s=0.25,
        processor_layer=LayerTimes(prefill_s=7.0, decode_s=5.0),
        processor_handover_s=0.5,
        processor_handover_s_per_token=0.125,
        memory_copy_bytes_per_s=1e6,
    )
    layer = spec.blocks[0]
    own = block_times(spec, work, pace.device)[0]

    def times_in(place: Placement, *, pinned: bool = True) -> Any:
        found = tiered_times(spec, work, pace, (place, DEVICE, DEVICE), pinned=pinned, chunk_bytes=CHUNK_BYTES)
        assert found[1:] == tiered_times(spec, work, pace, (DEVICE,) * 3, pinned=True, chunk_bytes=CHUNK_BYTES)[1:]
        return found[0]

    copy_s = layer.held_bytes / pace.link_bytes_per_s + 0.25
    assert times_in(DISK) == times_in(DEVICE)
    assert times_in(DISK)[:6] == (own.read_s, own.prefill_s, own.decode_s, copy_s, 0.0, 0.0)
    assert times_in(DISK).pieces == -(-layer.read_bytes // CHUNK_BYTES)
    assert times_in(HOST)[:4] == times_in(DISK)[:4]
    assert (times_in(HOST).store_s, times_in(HOST).stage_s) == (layer.held_bytes / 1e6, 0.0)
    assert times_in(HOST, pinned=False).stage_s == layer.held_bytes / pace.staged_bytes_per_s
    assert times_in(PROCESSOR)[:5] == (own.read_s, 7.0 + 0.5 + 2.5, 5.0 + 0.5 + 0.25, 0.0, layer.held_bytes / 1e6)


def test_what_the_processor_was_not_measured_with_is_refused() -> None:
    spec = model([700, 700])
    pace = accelerator_pace(spec, disk_s=3.0, link_s=1.0)
    with pytest.raises(MachineError, match="layer 0"):
        tiered_times(spec, Workload(), pace, (PROCESSOR, DEVICE, DEVICE), pinned=True)
    known = dataclasses.replace(pace, processor_layer=LayerTimes(prefill_s=1.0, decode_s=1.0))
    with pytest.raises(MachineError, match="head"):
        tiered_times(spec, Workload(), known, (DEVICE, DEVICE, PROCESSOR), pinned=True)


def test_keys_and_values_on_the_host_visit_the_device_for_their_layers_turn() -> None:
    spec = model([700] * 4)
    work = Workload(prompt_tokens=100, generate_tokens=200)
    pace = accelerator_pace(
        spec, disk_s=3.0, link_s=1.0, processor_layer=LayerTimes(prefill_s=1.0, decode_s=1.0), copy_latency_s=0.5
    )
    places = (DEVICE, HOST, DISK, PROCESSOR, DEVICE)
    plain, visited = (
        tiered_times(spec, work, pace, places, pinned=True, cache_on_host=on_host) for on_host in (False, True)
    )
    visit_s = spec.kv_cache_bytes(sequences=1, context_tokens=200, element_bytes=2) / 4 / pace.link_bytes_per_s + 0.5
    assert visited[0].decode_s - plain[0].decode_s == pytest.approx(visit_s)
    for index in (1, 2):
        assert visited[index].copy_s - plain[index].copy_s == pytest.approx(visit_s)
    assert visited[3:] == plain[3:], "the processor has its own beside it, the head has none"


def prediction_of(spec: StoredModel, pace: AcceleratorPace, places: str, **changes: Any) -> Any:
    letters = {"v": DEVICE, "h": HOST, "d": DISK, "p": PROCESSOR}
    request = budgets(request_of(spec), 2.0, 9.0)
    plan, _ = plan_on_accelerator(request, Strategy.RESIDENT, pace)
    assert plan.accelerator is not None
    chosen = tuple(letters[letter] for letter in places)
    other = dataclasses.replace(
        plan,
        strategy=changes.pop("strategy", Strategy.OVERLAP),
        slots=2,
        resident=tuple(place is DEVICE for place in chosen),
        accelerator=dataclasses.replace(
            plan.accelerator,
            places=chosen,
            ring_chunks=changes.pop("ring_chunks", plan.accelerator.ring_chunks),
            chunk_bytes=changes.pop("chunk_bytes", plan.accelerator.chunk_bytes),
            cache_on_host=changes.pop("cache_on_host", False),
        ),
        embedding=changes.pop("embedding", plan.embedding),
    )
    return predict_on_accelerator(spec, other, pace, **changes)


def test_what_binds() -> None:
    spec = model([700] * 3, vocab=600)
    own = LayerTimes(prefill_s=1.0, decode_s=1.0)
    disk_bound = accelerator_pace(spec, disk_s=9.0, link_s=3.0, processor_layer=own)
    link_bound = accelerator_pace(spec, disk_s=3.0, link_s=9.0)
    device_bound = accelerator_pace(spec, disk_s=0.3, link_s=0.3)
    assert prediction_of(spec, disk_bound, "dddd").binds == "disk"
    assert prediction_of(spec, disk_bound, "hhhh").binds == "link"
    assert prediction_of(spec, disk_bound, "hhhh", pinned=False).binds == "link", "the readers, but not the disk"
    assert prediction_of(spec, link_bound, "dddd").binds == "link"
    assert prediction_of(spec, device_bound, "dddd").binds == "compute"
    assert prediction_of(spec, disk_bound, "pppv").binds == "cpu"
    assert prediction_of(spec, disk_bound, "dddd", strategy=Strategy.SEQUENTIAL).binds == "both"
    assert prediction_of(spec, disk_bound, "vvvv", strategy=Strategy.RESIDENT).binds == "compute"
    locked, staged = (prediction_of(spec, disk_bound, "hhhh", pinned=pinned) for pinned in (True, False))
    assert (locked.load_s_per_pass, staged.load_s_per_pass) == (pytest.approx(3.0), pytest.approx(9.0))
    loaded = prediction_of(spec, disk_bound, "dddd")
    assert loaded.load_s_per_pass == pytest.approx(9.0)
    assert loaded.compute_s_per_pass == pytest.approx(1.0)
    assert loaded.break_even_tokens_per_pass > 1
    assert prediction_of(spec, disk_bound, "pppv").compute_s_per_pass > 3.0
    assert prediction_of(spec, disk_bound, "vvvv").break_even_tokens_per_pass == 0.0


def test_visits_of_keys_and_values_count_in_a_prediction() -> None:
    spec = model([700] * 3, vocab=600)
    pace = accelerator_pace(spec, disk_s=2.0, link_s=1.0, copy_latency_s=0.125)
    there, visiting = (prediction_of(spec, pace, "hhhh", cache_on_host=on_host) for on_host in (False, True))
    assert visiting.load_s_per_pass > there.load_s_per_pass + 3 * 0.125


def test_ring_and_chunks_of_the_plan_are_those_simulated() -> None:
    """A larger ring lets the disk get further ahead of a slow link; larger chunks arrive later."""
    spec = model([700] * 3, vocab=600)
    pace = accelerator_pace(spec, disk_s=3.0, link_s=9.0)
    few, many = (prediction_of(spec, pace, "dddd", ring_chunks=chunks) for chunks in (2, 8))
    first_reads = [next(e for e in found.timeline.events if e.lane is Lane.READ) for found in (few, many)]
    assert first_reads[0].end_s > 1.1 * first_reads[1].end_s
    whole = prediction_of(spec, pace, "dddd", chunk_bytes=1 << 30)
    assert whole.prefill_s > few.prefill_s + 0.1


def test_the_first_pass_has_its_own_overhead() -> None:
    spec = model([700] * 3, vocab=600)
    pace = accelerator_pace(spec, disk_s=2.0, link_s=1.0)
    longer = dataclasses.replace(pace, device=dataclasses.replace(pace.device, first_pass_overhead_s=5.0))
    plain, first = (prediction_of(spec, own, "vvvv") for own in (pace, longer))
    assert first.prefill_s - plain.prefill_s == pytest.approx(5.0)
    assert first.decode_s_per_pass == pytest.approx(plain.decode_s_per_pass)


def test_only_rows_from_the_checkpoint_cost_reading() -> None:
    spec = model([700] * 3, vocab=600)
    pace = accelerator_pace(spec, disk_s=2.0, link_s=1.0)
    rows = dataclasses.replace(pace, device=dataclasses.replace(pace.device, row_s=0.5))
    for embedding, row_s in (
        (EmbeddingPlacement.ROWS, 0.5),
        (EmbeddingPlacement.HOST, 0.0),
        (EmbeddingPlacement.RESIDENT, 0.0),
    ):
        dear, cheap = (prediction_of(spec, own, "vvvv", embedding=embedding) for own in (rows, pace))
        assert dear.compute_s_per_pass - cheap.compute_s_per_pass == pytest.approx(row_s, rel=0.01)


def test_a_plan_of_the_processor_alone_is_not_predicted_here() -> None:
    spec = model([700])
    pace = accelerator_pace(spec, disk_s=2.0, link_s=1.0)
    plan, _ = plan_fastest_on_accelerator(budgets(request_of(spec), 2.0, 2.0), pace)
    with pytest.raises(ValueError, match="processor"):
        predict_on_accelerator(spec, dataclasses.replace(plan, accelerator=None), pace)
