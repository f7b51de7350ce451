"""Plans keep the budget, are never slower than the simple rule, and never slower with more memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
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
from headrace.model.stored_model import StoredModel, build_stored_model
from headrace.planning import planner
from headrace.planning.estimate import LayerTimes, Pace, predict
from headrace.planning.plan import EmbeddingPlacement, Plan, Strategy, Workload
from headrace.planning.planner import (
    SLOT_COUNTS,
    Candidate,
    Request,
    conversion_bytes,
    minimum_bytes,
    plan_fastest,
    plan_strategy,
    refuse_below_minimum,
)

HIDDEN = 256


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


def pace_of(spec: StoredModel, *, load_per_compute: float, **changes: Any) -> Pace:
    """Return a machine on which a decode pass of one sequence computes for 1 s, reads for `load_per_compute`."""
    per_parameter = 1.0 / sum(block.active_parameters for block in spec.blocks)
    return dataclasses.replace(
        Pace(
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


def request_of(spec: StoredModel, budget_bytes: int, *, dtype: str = "bfloat16", **workload: int) -> Request:
    return Request(model=spec, workload=Workload(**workload), compute_dtype=dtype, budget_bytes=budget_bytes)


def with_budget(request: Request, budget_bytes: int) -> Request:
    return dataclasses.replace(request, budget_bytes=budget_bytes)


def everything_bytes(request: Request) -> int:
    """Return a budget in which all blocks and the embedding table can stay."""
    return minimum_bytes(request, Strategy.RESIDENT) + request.model.embedding.size_bytes + 4 * PAGE_BYTES


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
def cases(draw: st.DrawFn, *, slowdowns: bool = True) -> tuple[Request, Pace]:
    """Draw a model, some work, a machine, and any budget between nothing and plenty."""
    spec = draw(specs)
    dtype = draw(st.sampled_from(["bfloat16", "float32"]))
    request = dataclasses.replace(request_of(spec, 0, dtype=dtype), workload=draw(workloads))
    share = draw(st.floats(-0.1, 1.2))
    least, most = minimum_bytes(request), everything_bytes(request)
    slowdown = st.sampled_from([1.0, 1.2]) if slowdowns else st.just(1.0)
    pace = pace_of(
        spec,
        load_per_compute=draw(st.sampled_from([0.3, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0])),
        compute_slowdown=draw(slowdown),
        read_slowdown=draw(slowdown),
    )
    return with_budget(request, max(0, int(least + share * (most - least)))), pace


def planned(request: Request, pace: Pace) -> Candidate:
    try:
        return plan_fastest(request, pace)
    except BudgetError:
        assume(False)
        raise


fewer_examples = settings(max_examples=60, deadline=None)


# -- the budget --------------------------------------------------------------------------------------------------------


@given(cases(), st.sampled_from([*Strategy, None]))
@fewer_examples
def test_a_plan_never_exceeds_the_budget(case: tuple[Request, Pace], strategy: Strategy | None) -> None:
    request, pace = case
    if minimum_bytes(request, strategy) > request.budget_bytes:
        with pytest.raises(BudgetError):
            refuse_below_minimum(request, strategy)
        return
    plan, _ = plan_fastest(request, pace) if strategy is None else plan_strategy(request, strategy, pace)
    assert plan.memory.total_bytes <= plan.budget_bytes == request.budget_bytes
    check_books(request, plan)


def check_books(request: Request, plan: Plan) -> None:
    """Recount from the blocks what the plan says of itself."""
    sizes = [block.read_bytes for block in request.model.blocks]
    streamed = [size for size, stays in zip(sizes, plan.resident, strict=True) if not stays]
    assert plan.memory.resident_bytes == sum(sizes) - sum(streamed)
    assert plan.streamed_bytes_per_pass == sum(streamed)
    assert plan.slot_bytes == max(streamed, default=0)
    assert plan.memory.slots_bytes == plan.slots * plan.slot_bytes
    assert plan.workload == request.workload
    assert plan.compute_dtype == request.compute_dtype
    if plan.strategy is Strategy.RESIDENT:
        assert (plan.slots, streamed) == (0, [])
    elif plan.strategy is Strategy.SEQUENTIAL:
        assert plan.slots == 1 <= len(streamed)
    else:
        assert plan.slots in SLOT_COUNTS
        assert plan.slots <= len(streamed), "more slots than streamed blocks would be memory for nothing"
    table_stays = plan.embedding is EmbeddingPlacement.RESIDENT
    assert (plan.memory.embedding_bytes >= request.model.embedding.size_bytes) == table_stays
    if plan.embedding is EmbeddingPlacement.HEAD:
        assert request.model.tied
        assert all(s for s, block in zip(plan.resident, request.model.blocks, strict=True) if block.head_rows)


@given(cases(), st.sampled_from([*Strategy, None]))
@example(
    (request_of(model([100, 100, 100], vocab=7000), 0), pace_of(model([100]), load_per_compute=1.0)), Strategy.OVERLAP
)
@fewer_examples
def test_the_smallest_budget_works_and_one_page_less_does_not(
    case: tuple[Request, Pace], strategy: Strategy | None
) -> None:
    request, pace = case

    def plan(budget_bytes: int) -> Candidate:
        own = with_budget(request, budget_bytes)
        return plan_fastest(own, pace) if strategy is None else plan_strategy(own, strategy, pace)

    with pytest.raises(BudgetError) as refused:
        plan(0)
    required_bytes = refused.value.required_bytes
    assert required_bytes == minimum_bytes(request, strategy)
    assert plan(required_bytes).plan.memory.total_bytes == required_bytes
    refuse_below_minimum(with_budget(request, required_bytes), strategy)
    with pytest.raises(BudgetError) as refused:
        plan(required_bytes - PAGE_BYTES)
    assert refused.value.required_bytes == required_bytes
    assert f"{required_bytes} bytes" in str(refused.value)
    with pytest.raises(BudgetError, match="too small for made up") as refused:
        refuse_below_minimum(with_budget(request, required_bytes - 1), strategy)
    assert refused.value.required_bytes == required_bytes


def test_what_is_held_beside_the_blocks() -> None:
    spec = model([700, 700])
    request = request_of(spec, 0, dtype="float32", sequences=3, prompt_tokens=50, generate_tokens=20)
    beside = request.beside_blocks
    assert (beside.resident_bytes, beside.slots_bytes, beside.embedding_bytes) == (0, 0, 0)
    assert beside.kv_cache_bytes == spec.kv_cache_bytes(sequences=3, context_tokens=70, element_bytes=4)
    for new_tokens, context_tokens in ((50, 50), (1, 70)):
        assert beside.work_space_bytes >= spec.work_space_bytes(
            sequences=3, new_tokens=new_tokens, context_tokens=context_tokens, element_bytes=4
        )
    long = request_of(spec, 0, dtype="float32", prompt_tokens=1, generate_tokens=5000).beside_blocks
    assert long.work_space_bytes == spec.work_space_bytes(
        sequences=1, new_tokens=1, context_tokens=5001, element_bytes=4
    ), "the last token has the longest context"
    assert HIDDEN * (2 + 4) <= beside.fixed_bytes <= 3 * PAGE_BYTES, "the last norm, as it is stored and as it is used"
    assert beside.conversion_bytes == conversion_bytes(request)


def test_a_few_large_blocks_stay_where_slots_of_their_size_would_not_fit() -> None:
    """A head of six layers' size: two slots for it take twelve, keeping it takes six and two small slots."""
    spec = model([100] * 5, vocab=7000)
    layer, head = spec.blocks[0].read_bytes, spec.blocks[-1].read_bytes
    assert head > 4 * layer
    request = request_of(spec, 0)
    beside_bytes = request.beside_blocks.total_bytes
    assert minimum_bytes(request, Strategy.OVERLAP) < beside_bytes + head + 3 * layer < beside_bytes + 2 * head
    small = with_budget(request, minimum_bytes(request, Strategy.OVERLAP))
    plan, _ = plan_strategy(small, Strategy.OVERLAP, pace_of(spec, load_per_compute=2.0))
    assert plan.resident == (False,) * 5 + (True,)


def test_several_large_blocks_of_different_sizes_stay() -> None:
    spec = model([100, 6000, 2500, 100, 100], vocab=300)
    request = request_of(spec, 0)
    small = with_budget(request, minimum_bytes(request, Strategy.OVERLAP))
    plan, _ = plan_strategy(small, Strategy.OVERLAP, pace_of(spec, load_per_compute=2.0))
    assert plan.resident == (False, True, True, False, False, False)


# -- speed -------------------------------------------------------------------------------------------------------------


def fill_then_stream(request: Request) -> Plan | None:
    """Apply the rule that users apply by hand: two slots, the first blocks stay as long as they fit."""
    sizes = [block.read_bytes for block in request.model.blocks]
    beside = request.beside_blocks
    for number in range(len(sizes) - 2, -1, -1):
        memory = dataclasses.replace(beside, resident_bytes=sum(sizes[:number]), slots_bytes=2 * max(sizes[number:]))
        if memory.total_bytes <= request.budget_bytes:
            return Plan(
                strategy=Strategy.OVERLAP,
                resident=tuple(index < number for index in range(len(sizes))),
                slots=2,
                slot_bytes=max(sizes[number:]),
                embedding=EmbeddingPlacement.ROWS,
                compute_dtype=request.compute_dtype,
                memory=memory,
                budget_bytes=request.budget_bytes,
                workload=request.workload,
                streamed_bytes_per_pass=sum(sizes[number:]),
            )
    return None


@given(cases())
@fewer_examples
def test_the_planner_is_never_slower_than_filling_memory_and_streaming_the_rest(case: tuple[Request, Pace]) -> None:
    request, pace = case
    _, prediction = planned(request, pace)
    simple = fill_then_stream(request)
    if simple is not None:
        assert prediction.total_s <= predict(request.model, simple, pace).total_s * (1 + 1e-9)


def test_filling_memory_from_the_first_block_on_is_sometimes_best() -> None:
    spec = model([2500, 100, 2500, 700], vocab=20_000)
    request = request_of(spec, 0, prompt_tokens=1, generate_tokens=32)
    least, most = minimum_bytes(request), everything_bytes(request)
    request = with_budget(request, least + (most - least) * 10 // 24)
    pace = pace_of(spec, load_per_compute=0.8, compute_slowdown=1.2, read_slowdown=1.2)
    simple = fill_then_stream(request)
    assert simple is not None
    _, prediction = plan_fastest(request, pace)
    assert prediction.total_s <= predict(request.model, simple, pace).total_s * (1 + 1e-9)


@given(cases())
@fewer_examples
def test_the_planner_is_never_slower_than_any_strategy_alone(case: tuple[Request, Pace]) -> None:
    request, pace = case
    _, prediction = planned(request, pace)
    for strategy in Strategy:
        try:
            alone = plan_strategy(request, strategy, pace)
        except BudgetError:
            continue
        assert prediction.total_s <= alone.prediction.total_s * (1 + 1e-9)


@given(cases(), st.lists(st.floats(0, 1.05), min_size=3, max_size=6))
@settings(max_examples=80, deadline=None)
def test_more_memory_never_predicts_a_slower_run(case: tuple[Request, Pace], shares: list[float]) -> None:
    request, pace = case
    least, most = minimum_bytes(request), everything_bytes(request)
    fastest_s = math.inf
    for share in sorted(shares):
        _, prediction = plan_fastest(with_budget(request, int(least + share * (most - least))), pace)
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
    request = dataclasses.replace(request_of(spec, 0), workload=work)
    pace = pace_of(spec, load_per_compute=load_per_compute, compute_slowdown=slowdown, read_slowdown=slowdown)
    budget_bytes = minimum_bytes(request) + int(first_budget * spec.blocks[0].read_bytes)
    fastest_s = math.inf
    while budget_bytes < everything_bytes(request):
        _, prediction = plan_fastest(with_budget(request, budget_bytes), pace)
        assert prediction.total_s <= fastest_s * 1.01
        fastest_s = min(fastest_s, prediction.total_s)
        budget_bytes += spec.blocks[0].read_bytes


def best_of_everything(request: Request, pace: Pace) -> float:
    """Try every set of residents with every number of slots; seconds of the fastest."""
    blocks = request.model.blocks
    plan, prediction = plan_fastest(request, pace)
    best_s = prediction.total_s
    for slots in SLOT_COUNTS:
        for resident in itertools.product((True, False), repeat=len(blocks)):
            streamed = [b.read_bytes for b, stays in zip(blocks, resident, strict=True) if not stays]
            if len(streamed) < slots:
                continue
            held_bytes = sum(b.read_bytes for b in blocks) - sum(streamed) + slots * max(streamed)
            if request.beside_blocks.total_bytes + held_bytes <= request.budget_bytes:
                other = dataclasses.replace(plan, strategy=Strategy.OVERLAP, resident=resident, slots=slots)
                best_s = min(best_s, predict(request.model, other, pace).total_s)
    return best_s


@given(cases())
@settings(max_examples=15, deadline=None)
def test_the_planner_comes_close_to_trying_everything(case: tuple[Request, Pace]) -> None:
    request, pace = case
    assume(len(request.model.blocks) <= 6)
    _, prediction = planned(request, pace)
    assert prediction.total_s <= 1.05 * best_of_everything(request, pace)


def test_where_the_residents_lie_makes_a_difference() -> None:
    """Spread evenly is not enough: it also matters with which block the pattern begins."""
    spec = model([700] * 5, vocab=20_000)
    request = request_of(spec, 0, prompt_tokens=16, generate_tokens=8)
    least, most = minimum_bytes(request), everything_bytes(request)
    request = with_budget(request, least + (most - least) * 8 // 24)
    pace = pace_of(spec, load_per_compute=1.2, compute_slowdown=1.2, read_slowdown=1.2)
    _, prediction = plan_fastest(request, pace)
    assert prediction.total_s <= 1.03 * best_of_everything(request, pace)


# -- each strategy -----------------------------------------------------------------------------------------------------


@given(cases())
@fewer_examples
def test_everything_stays_where_everything_fits(case: tuple[Request, Pace]) -> None:
    request, pace = case
    plan, prediction = plan_fastest(with_budget(request, everything_bytes(request)), pace)
    assert plan.strategy is Strategy.RESIDENT
    assert all(plan.resident)
    expected = EmbeddingPlacement.HEAD if request.model.tied else EmbeddingPlacement.RESIDENT
    assert plan.embedding is expected
    assert prediction.binds == "compute"


def test_the_table_is_read_by_rows_where_only_the_blocks_fit() -> None:
    spec = model([700] * 4, vocab=20_000)
    request = request_of(spec, 0)
    pace = pace_of(spec, load_per_compute=2.0)
    blocks_only = with_budget(request, minimum_bytes(request, Strategy.RESIDENT))
    plan, _ = plan_strategy(blocks_only, Strategy.RESIDENT, pace)
    assert plan.embedding is EmbeddingPlacement.ROWS
    assert plan.memory.embedding_bytes == 0


def test_rows_are_taken_from_the_tied_head_only_where_all_of_it_stays() -> None:
    spec = model([700] * 3, vocab=20_000, tied=True)
    assert sum(block.head_rows is not None for block in spec.blocks) > 1
    pace = pace_of(spec, load_per_compute=2.0)
    request = request_of(spec, 0)
    seen = set()
    for budget_bytes in range(minimum_bytes(request), everything_bytes(request), 256 * PAGE_BYTES):
        plan, _ = plan_fastest(with_budget(request, budget_bytes), pace)
        check_books(request, plan)
        heads = [s for s, block in zip(plan.resident, spec.blocks, strict=True) if block.head_rows is not None]
        assert (plan.embedding is EmbeddingPlacement.HEAD) == all(heads)
        seen.add(plan.embedding)
    assert seen == {EmbeddingPlacement.HEAD, EmbeddingPlacement.ROWS}


@pytest.mark.parametrize("strategy", list(Strategy))
def test_each_strategy_on_request(strategy: Strategy) -> None:
    spec = model([700] * 6)
    request = request_of(spec, 0)
    plan, prediction = plan_strategy(
        with_budget(request, everything_bytes(request)), strategy, pace_of(spec, load_per_compute=2.0)
    )
    assert plan.strategy is strategy
    check_books(request, plan)
    assert (plan.streamed_blocks == 0) == (strategy is Strategy.RESIDENT)
    if strategy is Strategy.SEQUENTIAL:
        streamed_s = prediction.load_s_per_pass
        assert streamed_s > 0
        assert prediction.decode_s_per_pass == pytest.approx(streamed_s + prediction.compute_s_per_pass)


def test_overlap_is_taken_where_it_pays_and_residents_are_spread() -> None:
    spec = model([700] * 11, vocab=500)
    request = request_of(spec, 0, prompt_tokens=1)
    size = spec.blocks[0].read_bytes
    half = with_budget(request, request.beside_blocks.total_bytes + 7 * size)
    plan, prediction = plan_fastest(half, pace_of(spec, load_per_compute=2.0))
    assert plan.strategy is Strategy.OVERLAP
    assert plan.resident_blocks >= 4
    runs = [len(list(run)) for stays, run in itertools.groupby(plan.resident) if not stays]
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
    request = request_of(spec, 0)
    sizes = [block.read_bytes for block in spec.blocks]
    left_bytes = sum(sizes[index] for index in fitting) + PAGE_BYTES
    assert left_bytes < sizes[-1] < sizes[0], "neither the head nor a large layer fits"
    budget_bytes = request.beside_blocks.total_bytes + max(sizes) + left_bytes
    plan, _ = plan_strategy(
        with_budget(request, budget_bytes), Strategy.SEQUENTIAL, pace_of(spec, load_per_compute=1.0)
    )
    assert plan.resident == expected


@given(cases())
@fewer_examples
def test_leftover_memory_does_not_lie_idle(case: tuple[Request, Pace]) -> None:
    """The sequential plan, where every resident byte pays, keeps each streamed block out for want of memory."""
    request, pace = case
    assume(request.workload.generate_tokens > 1)
    try:
        plan, _ = plan_strategy(request, Strategy.SEQUENTIAL, pace)
    except BudgetError:
        assume(False)
    free_bytes = request.budget_bytes - plan.memory.total_bytes
    if plan.streamed_blocks > 1:
        streamed = [b.read_bytes for b, s in zip(request.model.blocks, plan.resident, strict=True) if not s]
        assert free_bytes < min(streamed)


# -- memory for conversion ---------------------------------------------------------------------------------------------


def test_weights_that_are_used_as_they_lie_need_no_conversion() -> None:
    spec = model([700, 700])
    assert conversion_bytes(request_of(spec, 0, dtype="bfloat16")) == 0
    largest_bytes = 700 * HIDDEN * 4
    for_float32 = conversion_bytes(request_of(spec, 0, dtype="float32"))
    assert 3000 * HIDDEN * 4 <= for_float32 < 3000 * HIDDEN * 4 + 4 * PAGE_BYTES, "the head is the largest module"
    small_head = request_of(model([700, 700], vocab=300), 0, dtype="float32")
    assert largest_bytes <= conversion_bytes(small_head) < largest_bytes + 4 * PAGE_BYTES
    copied = dataclasses.replace(request_of(spec, 0, dtype="bfloat16"), copies_weights=True)
    assert 3000 * HIDDEN * 2 <= conversion_bytes(copied) < 3000 * HIDDEN * 2 + 4 * PAGE_BYTES


def test_experts_are_put_together_even_where_no_dtype_changes() -> None:
    spec = model([64, 64], vocab=300, experts=8)
    together_bytes = 8 * 2 * 64 * HIDDEN * 2
    converted = conversion_bytes(request_of(spec, 0, dtype="bfloat16"))
    assert together_bytes <= converted < together_bytes + 8 * 2 * 64 + 4 * PAGE_BYTES


def test_the_memory_beside_the_blocks_is_counted_once_for_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of experts has tens of thousands of tensors: looking at all of them for each candidate took seconds."""
    counted: list[int] = []

    def count(request: Request) -> int:
        counted.append(1)
        return conversion_bytes(request)

    monkeypatch.setattr(planner, "conversion_bytes", count)
    spec = model([64] * 6, vocab=300, experts=4)
    request = request_of(spec, 1 << 40)
    plan_fastest(request, pace_of(spec, load_per_compute=1.2))
    assert len(counted) == 1


def test_measured_layers_count_instead_of_the_curve() -> None:
    spec = model([700] * 6)
    request = request_of(spec, 0)
    request = with_budget(request, minimum_bytes(request, Strategy.OVERLAP))
    slow = pace_of(spec, load_per_compute=1.0, layer=LayerTimes(prefill_s=5.0, decode_s=3.0))
    _, prediction = plan_fastest(request, slow)
    assert prediction.compute_s_per_pass >= 18
    assert prediction.binds == "compute"
