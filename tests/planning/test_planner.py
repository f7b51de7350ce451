"""Plans keep the budget, are never slower than the simple rule, and never slower with more memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from headrace.dtypes import STORED_BYTES
from headrace.errors import BudgetError
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.model.layout import PAGE_BYTES
from headrace.model.safetensors_index import ShardFile, TensorEntry, TensorIndex
from headrace.model.stored_model import StoredBlock, StoredModel, build_stored_model
from headrace.planning.infeasible import minimum_bytes, refuse_below_minimum
from headrace.planning.memory import Arrangement, MemoryAccount
from headrace.planning.placements import CPU_SLOT_COUNTS
from headrace.planning.plan import EmbeddingPlacement, Placement, Plan, Strategy, TierMemory
from headrace.planning.planner import compare, plan_fastest, plan_strategy
from headrace.planning.prediction import Candidate, predict
from headrace.planning.rates import LayerTimes, Rates
from headrace.planning.scenario import Scenario
from headrace.planning.workload import Workload

HIDDEN = 256
DEVICE, DISK = Placement.DEVICE, Placement.DISK


def model(
    layer_widths: Sequence[int], *, vocab: int = 3000, tied: bool = False, experts: int = 0, dtype: str = "BF16"
) -> StoredModel:
    """Fabricate a model whose layers have the given widths of their feed-forward part; no bytes of it exist."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer, width in enumerate(layer_widths):
        inner = f"model.layers.{layer}."
        shapes |= {f"{inner}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        shapes[f"{inner}input_layernorm.weight"] = (HIDDEN,)
        for part in range(experts) or ("",):
            place = f"{inner}mlp.experts.{part}." if experts else f"{inner}mlp."
            shapes |= {f"{place}up_proj.weight": (width, HIDDEN), f"{place}down_proj.weight": (HIDDEN, width)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, HIDDEN)
    entries, end = {}, 1000
    for name, shape in shapes.items():
        size_bytes = math.prod(shape) * STORED_BYTES[dtype]
        entries[name] = TensorEntry(name, dtype, shape, 0, end, size_bytes)
        end += size_bytes
    raw: dict[str, Any] = {
        "model_type": "qwen3_moe" if experts else "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": max(layer_widths),
        "moe_intermediate_size": max(layer_widths),
        "num_hidden_layers": len(layer_widths),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "num_experts": experts or None,
        "num_experts_per_tok": min(2, experts) or None,
    }
    index = TensorIndex(
        directory=Path("model"), files=(ShardFile(Path("model/0"), end, 0, 0, 0),), entries=MappingProxyType(entries)
    )
    return build_stored_model("made up", raw, index)


def rates_of(spec: StoredModel, *, load_per_compute: float, **changes: Any) -> Rates:
    """Return a machine on which a decode pass of one sequence computes for 1 s, reads for `load_per_compute`."""
    per_parameter = 1.0 / sum(block.active_parameters for block in spec.blocks)
    return dataclasses.replace(
        Rates(
            read_bytes_per_s=sum(block.read_bytes for block in spec.blocks) / load_per_compute,
            curve=ComputeCurve(
                compute_dtype="bfloat16",
                stored_dtype="BF16",
                points=(CurvePoint(1, per_parameter), CurvePoint(64, 8 * per_parameter)),
            ),
            block_overhead_s=0.0,
            pass_overhead_s=0.0,
        ),
        **changes,
    )


def scenario_of(spec: StoredModel, budget_bytes: int, *, dtype: str = "bfloat16", **workload: int) -> Scenario:
    return Scenario(model=spec, workload=Workload(**workload), compute_dtype=dtype, budget_bytes=budget_bytes)


def with_budget(scenario: Scenario, budget_bytes: int) -> Scenario:
    return dataclasses.replace(scenario, budget_bytes=budget_bytes)


def beside_blocks(scenario: Scenario) -> TierMemory:
    """Return the memory that is held whichever blocks stay."""
    return MemoryAccount(scenario).device(Arrangement((DISK,) * len(scenario.model.blocks), 0))


def conversion_bytes(scenario: Scenario) -> int:
    return MemoryAccount(scenario).conversion_bytes


def everything_bytes(scenario: Scenario) -> int:
    """Return a budget in which all blocks and the embedding table can stay."""
    return minimum_bytes(scenario, Strategy.RESIDENT) + scenario.model.embedding.size_bytes + 4 * PAGE_BYTES


widths = st.lists(st.just(700), min_size=1, max_size=8) | st.lists(
    st.sampled_from([100, 700, 2500]), min_size=1, max_size=6
)
specs = st.builds(model, widths, vocab=st.sampled_from([500, 3000, 9000, 20_000, 40_000]), tied=st.booleans())
workloads = st.builds(
    Workload,
    sequences=st.sampled_from([1, 4]),
    prompt_tokens=st.sampled_from([1, 16]),
    generate_tokens=st.sampled_from([1, 8, 32]),
)


@st.composite
def cases(draw: st.DrawFn, *, slowdowns: bool = True) -> Scenario:
    """Draw a model, some work, a machine, and any budget between nothing and plenty."""
    spec = draw(specs)
    dtype = draw(st.sampled_from(["bfloat16", "float32"]))
    scenario = dataclasses.replace(scenario_of(spec, 0, dtype=dtype), workload=draw(workloads))
    share = draw(st.floats(-0.1, 1.2))
    least, most = minimum_bytes(scenario), everything_bytes(scenario)
    slowdown = st.sampled_from([1.0, 1.2]) if slowdowns else st.just(1.0)
    rates = rates_of(
        spec,
        load_per_compute=draw(st.sampled_from([0.3, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0])),
        compute_slowdown=draw(slowdown),
        read_slowdown=draw(slowdown),
    )
    return with_budget(scenario, max(0, int(least + share * (most - least)))).at(rates)


def planned(scenario: Scenario) -> Candidate:
    try:
        return plan_fastest(scenario)
    except BudgetError:
        assume(False)
        raise


fewer_examples = settings(max_examples=60, deadline=None)


# -- the budget --------------------------------------------------------------------------------------------------------


@given(cases(), st.sampled_from([*Strategy, None]))
@fewer_examples
def test_a_plan_never_exceeds_the_budget(scenario: Scenario, strategy: Strategy | None) -> None:
    if minimum_bytes(scenario, strategy) > scenario.budget_bytes:
        with pytest.raises(BudgetError):
            refuse_below_minimum(scenario, strategy)
        return
    plan, _ = plan_fastest(scenario) if strategy is None else plan_strategy(scenario, strategy)
    assert plan.memory.total_bytes <= plan.budget_bytes == scenario.budget_bytes
    check_books(scenario, plan)


def check_books(scenario: Scenario, plan: Plan) -> None:
    """Recount from the blocks what the plan says of itself."""
    sizes = [block.read_bytes for block in scenario.model.blocks]
    streamed = [size for size, place in zip(sizes, plan.placements, strict=True) if place is DISK]
    assert plan.memory.weights_bytes == sum(sizes) - sum(streamed)
    assert plan.streamed_bytes_per_pass == sum(streamed)
    assert plan.slot_bytes == max(streamed, default=0)
    assert plan.memory.slots_bytes == plan.slots * plan.slot_bytes
    assert plan.workload == scenario.workload
    assert plan.compute_dtype == scenario.compute_dtype
    if plan.strategy is Strategy.RESIDENT:
        assert (plan.slots, streamed) == (0, [])
    elif plan.strategy is Strategy.SEQUENTIAL:
        assert plan.slots == 1 <= len(streamed)
    else:
        assert plan.slots in CPU_SLOT_COUNTS
        assert plan.slots <= len(streamed), "more slots than streamed blocks would be memory for nothing"
    table_stays = plan.embedding is EmbeddingPlacement.RESIDENT
    assert (plan.memory.embedding_bytes >= scenario.model.embedding.size_bytes) == table_stays
    if plan.embedding is EmbeddingPlacement.HEAD:
        assert scenario.model.tied
        assert all(
            place is DEVICE
            for place, block in zip(plan.placements, scenario.model.blocks, strict=True)
            if block.head_rows
        )


@given(cases(), st.sampled_from([*Strategy, None]))
@example(
    scenario_of(model([100, 100, 100], vocab=7000), 0).at(rates_of(model([100]), load_per_compute=1.0)),
    Strategy.OVERLAP,
)
@fewer_examples
def test_the_smallest_budget_works_and_one_page_less_does_not(scenario: Scenario, strategy: Strategy | None) -> None:

    def plan(budget_bytes: int) -> Candidate:
        own = with_budget(scenario, budget_bytes)
        return plan_fastest(own) if strategy is None else plan_strategy(own, strategy)

    with pytest.raises(BudgetError) as refused:
        plan(0)
    required_bytes = refused.value.required_bytes
    assert required_bytes == minimum_bytes(scenario, strategy)
    assert plan(required_bytes).plan.memory.total_bytes == required_bytes
    refuse_below_minimum(with_budget(scenario, required_bytes), strategy)
    with pytest.raises(BudgetError) as refused:
        plan(required_bytes - PAGE_BYTES)
    assert refused.value.required_bytes == required_bytes
    assert f"{required_bytes} bytes" in str(refused.value)
    with pytest.raises(BudgetError, match="too small for made up") as refused:
        refuse_below_minimum(with_budget(scenario, required_bytes - 1), strategy)
    assert refused.value.required_bytes == required_bytes


def test_what_is_held_beside_the_blocks() -> None:
    spec = model([700, 700])
    scenario = scenario_of(spec, 0, dtype="float32", sequences=3, prompt_tokens=50, generate_tokens=20)
    beside = beside_blocks(scenario)
    assert (beside.weights_bytes, beside.slots_bytes, beside.embedding_bytes) == (0, 0, 0)
    assert beside.kv_cache_bytes == spec.kv_cache_bytes(sequences=3, context_tokens=70, element_bytes=4)
    for new_tokens, context_tokens in ((50, 50), (1, 70)):
        assert beside.work_space_bytes >= spec.work_space_bytes(
            sequences=3, new_tokens=new_tokens, context_tokens=context_tokens, element_bytes=4
        )
    long = beside_blocks(scenario_of(spec, 0, dtype="float32", prompt_tokens=1, generate_tokens=5000))
    assert long.work_space_bytes == spec.work_space_bytes(
        sequences=1, new_tokens=1, context_tokens=5001, element_bytes=4
    ), "the last token has the longest context"
    assert HIDDEN * (2 + 4) <= beside.fixed_bytes <= 3 * PAGE_BYTES, "the last norm, as it is stored and as it is used"
    assert beside.conversion_bytes == conversion_bytes(scenario)


def test_a_few_large_blocks_stay_where_slots_of_their_size_would_not_fit() -> None:
    """A head of six layers' size: two slots for it take twelve, keeping it takes six and two small slots."""
    spec = model([100] * 5, vocab=7000)
    layer, head = spec.blocks[0].read_bytes, spec.blocks[-1].read_bytes
    assert head > 4 * layer
    scenario = scenario_of(spec, 0)
    beside_bytes = beside_blocks(scenario).total_bytes
    assert minimum_bytes(scenario, Strategy.OVERLAP) < beside_bytes + head + 3 * layer < beside_bytes + 2 * head
    small = with_budget(scenario, minimum_bytes(scenario, Strategy.OVERLAP))
    plan, _ = plan_strategy(small.at(rates_of(spec, load_per_compute=2.0)), Strategy.OVERLAP)
    assert plan.placements == (DISK,) * 5 + (DEVICE,)


def test_several_large_blocks_of_different_sizes_stay() -> None:
    spec = model([100, 6000, 2500, 100, 100], vocab=300)
    scenario = scenario_of(spec, 0)
    small = with_budget(scenario, minimum_bytes(scenario, Strategy.OVERLAP))
    plan, _ = plan_strategy(small.at(rates_of(spec, load_per_compute=2.0)), Strategy.OVERLAP)
    assert plan.placements == (DISK, DEVICE, DEVICE, DISK, DISK, DISK)


# -- speed -------------------------------------------------------------------------------------------------------------


def fill_then_stream(scenario: Scenario) -> Plan | None:
    """Apply the rule that users apply by hand: two slots, the first blocks stay as long as they fit."""
    sizes = [block.read_bytes for block in scenario.model.blocks]
    beside = beside_blocks(scenario)
    for number in range(len(sizes) - 2, -1, -1):
        memory = dataclasses.replace(beside, weights_bytes=sum(sizes[:number]), slots_bytes=2 * max(sizes[number:]))
        if memory.total_bytes <= scenario.budget_bytes:
            return Plan(
                strategy=Strategy.OVERLAP,
                placements=(DEVICE,) * number + (DISK,) * (len(sizes) - number),
                slots=2,
                slot_bytes=max(sizes[number:]),
                embedding=EmbeddingPlacement.ROWS,
                compute_dtype=scenario.compute_dtype,
                memory=memory,
                budget_bytes=scenario.budget_bytes,
                workload=scenario.workload,
                streamed_bytes_per_pass=sum(sizes[number:]),
            )
    return None


@given(cases())
@fewer_examples
def test_the_planner_is_never_slower_than_filling_memory_and_streaming_the_rest(scenario: Scenario) -> None:
    _, prediction = planned(scenario)
    simple = fill_then_stream(scenario)
    if simple is not None:
        assert prediction.total_s <= predict(simple, scenario).total_s * (1 + 1e-9)


def test_filling_memory_from_the_first_block_on_is_sometimes_best() -> None:
    spec = model([2500, 100, 2500, 700], vocab=20_000)
    scenario = scenario_of(spec, 0, prompt_tokens=1, generate_tokens=32)
    least, most = minimum_bytes(scenario), everything_bytes(scenario)
    scenario = with_budget(scenario, least + (most - least) * 10 // 24)
    scenario = scenario.at(rates_of(spec, load_per_compute=0.8, compute_slowdown=1.2, read_slowdown=1.2))
    simple = fill_then_stream(scenario)
    assert simple is not None
    _, prediction = plan_fastest(scenario)
    assert prediction.total_s <= predict(simple, scenario).total_s * (1 + 1e-9)


@given(cases())
@fewer_examples
def test_the_planner_is_never_slower_than_any_strategy_alone(scenario: Scenario) -> None:
    _, prediction = planned(scenario)
    for strategy in Strategy:
        try:
            alone = plan_strategy(scenario, strategy)
        except BudgetError:
            continue
        assert prediction.total_s <= alone.prediction.total_s * (1 + 1e-9)


@given(cases(), st.lists(st.floats(0, 1.05), min_size=3, max_size=6))
@settings(max_examples=80, deadline=None)
def test_more_memory_never_predicts_a_slower_run(scenario: Scenario, shares: list[float]) -> None:
    least, most = minimum_bytes(scenario), everything_bytes(scenario)
    fastest_s = math.inf
    for share in sorted(shares):
        _, prediction = plan_fastest(with_budget(scenario, int(least + share * (most - least))))
        assert prediction.total_s <= fastest_s * 1.01
        fastest_s = min(fastest_s, prediction.total_s)


@given(
    layers=st.integers(2, 9),
    vocab=st.sampled_from([500, 20_000]),
    load_per_compute=st.sampled_from([0.5, 1.0, 1.2, 2.0]),
    slowdown=st.sampled_from([1.0, 1.2]),
    work=workloads,
    first_budget=st.floats(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_one_more_layer_of_memory_never_predicts_a_slower_run(
    layers: int, vocab: int, load_per_compute: float, slowdown: float, work: Workload, first_budget: float
) -> None:
    """The usual case, all layers alike, within a hundredth."""
    spec = model([700] * layers, vocab=vocab)
    scenario = dataclasses.replace(scenario_of(spec, 0), workload=work)
    rates = rates_of(spec, load_per_compute=load_per_compute, compute_slowdown=slowdown, read_slowdown=slowdown)
    scenario = scenario.at(rates)
    budget_bytes = minimum_bytes(scenario) + int(first_budget * spec.blocks[0].read_bytes)
    fastest_s = math.inf
    while budget_bytes < everything_bytes(scenario):
        _, prediction = plan_fastest(with_budget(scenario, budget_bytes))
        assert prediction.total_s <= fastest_s * 1.01
        fastest_s = min(fastest_s, prediction.total_s)
        budget_bytes += spec.blocks[0].read_bytes


def best_of_everything(scenario: Scenario) -> float:
    """Try every set of residents with every number of slots; seconds of the fastest."""
    blocks = scenario.model.blocks
    plan, prediction = plan_fastest(scenario)
    best_s = prediction.total_s
    for slots in CPU_SLOT_COUNTS:
        for placements in itertools.product((DEVICE, DISK), repeat=len(blocks)):
            streamed = [b.read_bytes for b, place in zip(blocks, placements, strict=True) if place is DISK]
            if len(streamed) < slots:
                continue
            held_bytes = sum(b.read_bytes for b in blocks) - sum(streamed) + slots * max(streamed)
            if beside_blocks(scenario).total_bytes + held_bytes <= scenario.budget_bytes:
                other = dataclasses.replace(plan, strategy=Strategy.OVERLAP, placements=placements, slots=slots)
                best_s = min(best_s, predict(other, scenario).total_s)
    return best_s


@given(cases())
@settings(max_examples=15, deadline=None)
def test_the_planner_comes_close_to_trying_everything(scenario: Scenario) -> None:
    assume(len(scenario.model.blocks) <= 6)
    _, prediction = planned(scenario)
    assert prediction.total_s <= 1.05 * best_of_everything(scenario)


def test_where_the_residents_lie_makes_a_difference() -> None:
    """Spread evenly is not enough: it also matters with which block the pattern begins."""
    spec = model([700] * 5, vocab=20_000)
    scenario = scenario_of(spec, 0, prompt_tokens=16, generate_tokens=8)
    least, most = minimum_bytes(scenario), everything_bytes(scenario)
    scenario = with_budget(scenario, least + (most - least) * 8 // 24)
    scenario = scenario.at(rates_of(spec, load_per_compute=1.2, compute_slowdown=1.2, read_slowdown=1.2))
    _, prediction = plan_fastest(scenario)
    assert prediction.total_s <= 1.03 * best_of_everything(scenario)


# -- each strategy -----------------------------------------------------------------------------------------------------


@given(cases())
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
    scenario = scenario_of(spec, 0).at(rates_of(spec, load_per_compute=2.0))
    blocks_only = with_budget(scenario, minimum_bytes(scenario, Strategy.RESIDENT))
    plan, _ = plan_strategy(blocks_only, Strategy.RESIDENT)
    assert plan.embedding is EmbeddingPlacement.ROWS
    assert plan.memory.embedding_bytes == 0


def test_rows_are_taken_from_the_tied_head_only_where_all_of_it_stays() -> None:
    spec = model([700] * 3, vocab=20_000, tied=True)
    assert sum(block.head_rows is not None for block in spec.blocks) > 1
    scenario = scenario_of(spec, 0).at(rates_of(spec, load_per_compute=2.0))
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


@pytest.mark.parametrize("strategy", list(Strategy))
def test_each_strategy_on_request(strategy: Strategy) -> None:
    spec = model([700] * 6)
    scenario = scenario_of(spec, 0).at(rates_of(spec, load_per_compute=2.0))
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
    scenario = scenario_of(spec, 0, prompt_tokens=1)
    size = spec.blocks[0].read_bytes
    half = with_budget(scenario, beside_blocks(scenario).total_bytes + 7 * size)
    plan, prediction = plan_fastest(half.at(rates_of(spec, load_per_compute=2.0)))
    assert plan.strategy is Strategy.OVERLAP
    assert plan.resident_blocks >= 4
    runs = [len(list(run)) for place, run in itertools.groupby(plan.placements) if place is DISK]
    assert max(runs) <= plan.streamed_blocks // 2, "they are spread among the streamed"
    assert prediction.decode_s_per_pass < 1.1 * prediction.possible_decode_s


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
    scenario = scenario_of(spec, 0)
    sizes = [block.read_bytes for block in spec.blocks]
    left_bytes = sum(sizes[index] for index in fitting) + PAGE_BYTES
    assert left_bytes < sizes[-1] < sizes[0], "neither the head nor a large layer fits"
    budget_bytes = beside_blocks(scenario).total_bytes + max(sizes) + left_bytes
    scenario = with_budget(scenario, budget_bytes).at(rates_of(spec, load_per_compute=1.0))
    plan, _ = plan_strategy(scenario, Strategy.SEQUENTIAL)
    assert plan.placements == tuple(DEVICE if stays else DISK for stays in expected)


@given(cases())
@fewer_examples
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


# -- memory for conversion ---------------------------------------------------------------------------------------------


def test_weights_that_are_used_as_they_lie_need_no_conversion() -> None:
    spec = model([700, 700])
    assert conversion_bytes(scenario_of(spec, 0, dtype="bfloat16")) == 0
    largest_bytes = 700 * HIDDEN * 4
    for_float32 = conversion_bytes(scenario_of(spec, 0, dtype="float32"))
    assert 3000 * HIDDEN * 4 <= for_float32 < 3000 * HIDDEN * 4 + 4 * PAGE_BYTES, "the head is the largest module"
    small_head = scenario_of(model([700, 700], vocab=300), 0, dtype="float32")
    assert largest_bytes <= conversion_bytes(small_head) < largest_bytes + 4 * PAGE_BYTES
    copied = dataclasses.replace(scenario_of(spec, 0, dtype="bfloat16"), copies_weights=True)
    assert 3000 * HIDDEN * 2 <= conversion_bytes(copied) < 3000 * HIDDEN * 2 + 4 * PAGE_BYTES


def test_experts_are_put_together_even_where_no_dtype_changes() -> None:
    spec = model([64, 64], vocab=300, experts=8)
    together_bytes = 8 * 2 * 64 * HIDDEN * 2
    converted = conversion_bytes(scenario_of(spec, 0, dtype="bfloat16"))
    assert together_bytes <= converted < together_bytes + 8 * 2 * 64 + 4 * PAGE_BYTES


@pytest.mark.parametrize("plan", [plan_fastest, compare])
def test_the_memory_beside_the_blocks_is_counted_once_for_a_scenario(
    monkeypatch: pytest.MonkeyPatch, plan: Callable[[Scenario], object]
) -> None:
    """A mixture of experts has tens of thousands of tensors: looking at all of them for each candidate took seconds."""
    counted: list[int] = []

    module_bytes = StoredBlock.module_bytes

    def count(block: StoredBlock, element_bytes: int, *, converts: bool) -> int:
        counted.append(block.index)
        return module_bytes(block, element_bytes, converts=converts)

    monkeypatch.setattr(StoredBlock, "module_bytes", count)
    spec = model([64] * 6, vocab=300, experts=4)
    plan(scenario_of(spec, 1 << 40).at(rates_of(spec, load_per_compute=1.2)))
    assert counted == list(range(6))


def test_measured_layers_count_instead_of_the_curve() -> None:
    spec = model([700] * 6)
    scenario = scenario_of(spec, 0)
    scenario = with_budget(scenario, minimum_bytes(scenario, Strategy.OVERLAP))
    slow = rates_of(spec, load_per_compute=1.0, layer=LayerTimes(prefill_s=5.0, decode_s=3.0))
    _, prediction = plan_fastest(scenario.at(slow))
    assert prediction.compute_s_per_pass >= 18
    assert prediction.binds == "compute"
