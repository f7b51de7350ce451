"""Predictions: a case worked out by hand, what binds, and the tokens at which computing takes as long as loading."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.errors import MachineError
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.model.safetensors_index import ShardFile, TensorEntry, TensorIndex
from headrace.model.stored_model import StoredModel, build_stored_model
from headrace.planning.block_times import block_times, distinct_rows, pass_overheads
from headrace.planning.measured_rates import cpu_rates
from headrace.planning.pass_times import LowerBound
from headrace.planning.plan import Arrangement, EmbeddingPlacement, Placement, Plan, TierMemory
from headrace.planning.prediction import Candidate, break_even_tokens, predict, timeline_of
from headrace.planning.rates import LayerTimes, Rates
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from headrace.planning.timeline import Lane
from headrace.planning.workload import Workload
from measured_machines import computer

HIDDEN, VOCAB, LAYERS = 64, 128, 3
LAYER_PARAMETERS = 256 * HIDDEN
HEAD_PARAMETERS = VOCAB * HIDDEN
DEVICE, DISK = Placement.DEVICE, Placement.DISK


def model() -> StoredModel:
    """Three layers of one 256 x 64 matrix and a head of 128 x 64, 16 bit, each at the beginning of a page."""
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    shapes |= {f"model.layers.{layer}.mlp.up_proj.weight": (256, HIDDEN) for layer in range(LAYERS)}
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    entries, end = {}, 4096
    for name, shape in shapes.items():
        size_bytes = 2 * math.prod(shape)
        entries[name] = TensorEntry(name, "BF16", shape, 0, end, size_bytes)
        end += size_bytes
    raw = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
    }
    index = TensorIndex(
        directory=Path("model"), files=(ShardFile(Path("model/0"), end, 0, 0, 0),), entries=MappingProxyType(entries)
    )
    return build_stored_model("made up", raw, index)


SPEC = model()
LAYER_BYTES, HEAD_BYTES = 2 * LAYER_PARAMETERS, 2 * HEAD_PARAMETERS
ALL_FROM_DISK = (DISK,) * (LAYERS + 1)


def plan_of(
    strategy: Strategy = Strategy.OVERLAP,
    *,
    placements: tuple[Placement, ...] = (DISK,) * (LAYERS + 1),
    slots: int = 2,
    **workload: int,
) -> Plan:
    return Plan(
        strategy=strategy,
        placements=placements,
        slots=slots,
        slot_bytes=LAYER_BYTES,
        embedding=EmbeddingPlacement.ROWS,
        compute_dtype="bfloat16",
        memory=TierMemory(),
        budget_bytes=0,
        workload=Workload(**{"prompt_tokens": 16, "generate_tokens": 32, **workload}),
        streamed_bytes_per_pass=0,
    )


def scenario_of(rates: Rates, **workload: int) -> Scenario:
    return Scenario(
        model=SPEC,
        workload=Workload(**{"prompt_tokens": 16, "generate_tokens": 32, **workload}),
        compute_dtype="bfloat16",
        budget_bytes=1 << 40,
        rates=rates,
    )


def curve_of(*points: tuple[int, float]) -> ComputeCurve:
    return ComputeCurve(
        compute_dtype="bfloat16", stored_dtype="BF16", points=tuple(CurvePoint(*point) for point in points)
    )


def rates_of(*points: tuple[int, float], read_bytes_per_s: float = float(LAYER_BYTES), **changes: Any) -> Rates:
    """Return a rates with a curve through (tokens, seconds per layer); by default a layer is read in one second."""
    curve = curve_of(*((tokens, seconds / LAYER_PARAMETERS) for tokens, seconds in points))
    return dataclasses.replace(
        Rates(read_bytes_per_s=read_bytes_per_s, curve=curve, block_overhead_s=0.0, pass_overhead_s=0.0), **changes
    )


def test_the_model_is_as_described() -> None:
    assert [block.read_bytes for block in SPEC.blocks] == [LAYER_BYTES] * LAYERS + [HEAD_BYTES]
    assert HEAD_BYTES * 2 == LAYER_BYTES


# -- a case worked out by hand -----------------------------------------------------------------------------------------


def test_the_seconds_of_each_block() -> None:
    rates = rates_of((1, 0.25), (8, 2.0), block_overhead_s=0.125, pass_overhead_s=7.0)
    layer, *_, head = block_times(scenario_of(rates, sequences=2, prompt_tokens=4), ALL_FROM_DISK)
    assert layer[:3] == pytest.approx((1.0, 2.0 + 0.125, 0.5 + 0.125))
    assert head[:3] == pytest.approx((0.5, 0.25, 0.25)), "the head sees one position of each sequence, in prefill too"


def test_a_sequential_run_by_hand() -> None:
    """Read 3 and 0.5 s; compute three times 0.5 s and 0.25 s, in prefill of four tokens 2 s and 0.25 s; 0.1 beside."""
    rates = rates_of((1, 0.5), (4, 2.0), pass_overhead_s=0.1)
    plan = plan_of(Strategy.SEQUENTIAL, slots=1, sequences=1, prompt_tokens=4, generate_tokens=11)
    prediction = predict(plan, scenario_of(rates))
    assert prediction.prefill_s == pytest.approx(3.5 + 6.25 + 0.1)
    assert prediction.decode_s_per_pass == pytest.approx(3.5 + 1.75 + 0.1)
    assert prediction.load_s_per_pass == pytest.approx(3.5)
    assert prediction.compute_s_per_pass == pytest.approx(1.85)
    assert prediction.total_s == pytest.approx(9.85 + 10 * 5.35)
    assert prediction.tokens_per_s == pytest.approx(1 / 5.35)
    assert prediction.possible_decode_s == pytest.approx(3.5)
    assert prediction.binds == "both"


def test_an_overlapped_run_by_hand() -> None:
    """The same with two slots: the link never rests but for want of a slot."""
    rates = rates_of((1, 0.5), (4, 2.0))
    prediction = predict(plan_of(sequences=1, prompt_tokens=4, generate_tokens=11), scenario_of(rates))
    # First pass: the first layer is there at 1, and then computing (2 s a layer) never waits: 1 + 2 + 2 + 2 + 0.25.
    assert prediction.prefill_s == pytest.approx(7.25)
    assert prediction.decode_s_per_pass == pytest.approx(3.5), "all of it reading"
    assert prediction.total_s == pytest.approx(7.25 + 35)
    assert prediction.binds == "disk"


def test_a_resident_run_by_hand() -> None:
    rates = rates_of((1, 0.5), (4, 2.0))
    plan = plan_of(Strategy.RESIDENT, placements=(DEVICE,) * 4, slots=0, sequences=1, prompt_tokens=4)
    scenario = scenario_of(rates)
    prediction = predict(plan, scenario)
    assert prediction.prefill_s == pytest.approx(7.25), "the first pass brings the weights"
    assert prediction.decode_s_per_pass == pytest.approx(1.75)
    assert prediction.load_s_per_pass == 0
    assert prediction.binds == "compute"
    assert prediction.break_even_tokens_per_pass == 0
    events = timeline_of(Candidate(plan, prediction), scenario).events
    assert {event.pass_index for event in events if event.lane is Lane.READ} == {0}


def test_all_sequences_count_in_tokens_per_second() -> None:
    rates = rates_of((1, 0.5), (4, 0.5))
    prediction = predict(plan_of(sequences=4, prompt_tokens=1), scenario_of(rates))
    assert prediction.tokens_per_s == pytest.approx(4 / prediction.decode_s_per_pass)


def test_a_single_token_takes_no_decode_pass() -> None:
    prediction = predict(plan_of(generate_tokens=1), scenario_of(rates_of((1, 0.5))))
    assert prediction.total_s == prediction.prefill_s


@pytest.mark.parametrize(("read_s", "binds"), [(2.0, "disk"), (0.1, "compute")])
def test_what_binds(read_s: float, binds: str) -> None:
    rates = rates_of((1, 0.5), read_bytes_per_s=LAYER_BYTES / read_s)
    assert predict(plan_of(), scenario_of(rates)).binds == binds


# -- the rates of a run ------------------------------------------------------------------------------------------------


def test_what_was_timed_takes_the_place_of_the_curve() -> None:
    timed = rates_of(
        (1, 0.5),
        layers=(LayerTimes(prefill_s=9.0, decode_s=3.0),),
        head_curve=curve_of((1, 4.0 / HEAD_PARAMETERS)),
        block_overhead_s=0.125,
    )
    layer, *_, head = block_times(scenario_of(timed), ALL_FROM_DISK)
    assert layer[:3] == pytest.approx((1.0, 9.0, 3.0))
    assert head[:3] == pytest.approx((0.5, 4.0, 4.0))


def test_the_rates_of_a_machine() -> None:
    curve = curve_of((1, 1e-9))
    machine = computer(
        [curve],
        read_bytes_per_s=2e9,
        block_overhead_s=0.25,
        pass_overhead_s=0.5,
        slowdown_while_reading=1.25,
        slowdown_of_reading=1.5,
        read_latency_s=0.125,
    )
    rates = cpu_rates(machine, SPEC, compute_dtype="bfloat16")
    assert rates == Rates(
        read_bytes_per_s=2e9,
        curve=curve,
        block_overhead_s=0.25,
        pass_overhead_s=0.5,
        compute_slowdown=1.25,
        read_slowdown=1.5,
        read_latency_s=0.125,
    )
    for limit, rate in ((1e9, 1e9), (3e9, 2e9)):
        limited = cpu_rates(machine, SPEC, compute_dtype="bfloat16", read_limit_bytes_per_s=limit)
        assert limited == dataclasses.replace(rates, read_bytes_per_s=rate)
    with pytest.raises(MachineError, match="no measurement of float32"):
        cpu_rates(machine, SPEC, compute_dtype="float32")


def test_what_lies_beside_the_blocks_of_a_pass() -> None:
    """Four prompts of three tokens look up 12 rows of 128, of which 11.5 are distinct on average; a step four."""
    work = Workload(sequences=4, prompt_tokens=3, generate_tokens=32)
    rates = rates_of((1, 0.5), pass_overhead_s=0.5, row_s=0.01)
    first, further = pass_overheads(SPEC, work, rates, EmbeddingPlacement.ROWS)
    assert first == pytest.approx(0.5 + 0.01 * VOCAB * (1 - (1 - 1 / VOCAB) ** 12))
    assert further == pytest.approx(0.5 + 0.01 * VOCAB * (1 - (1 - 1 / VOCAB) ** 4))
    assert pass_overheads(SPEC, work, rates, EmbeddingPlacement.HEAD) == (0.5, 0.5)
    rates = dataclasses.replace(rates, first_pass_overhead_s=2.0)
    assert pass_overheads(SPEC, work, rates, EmbeddingPlacement.HEAD) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "rows"), [(1, 7, 1.0), (2, 1, 1.0), (2, 2, 1.5), (10**6, 1000, 999.5)]
)
def test_distinct_rows(vocabulary: int, tokens: int, rows: float) -> None:
    assert distinct_rows(vocabulary, tokens) == pytest.approx(rows, rel=1e-4)


def test_rows_of_the_embedding_are_counted_where_the_plan_reads_them() -> None:
    """One sequence: a row each pass, one second; eight tokens of prompt: about eight."""
    rates = rates_of((1, 0.5), row_s=1.0, first_pass_overhead_s=0.25)
    plan = plan_of(placements=(DEVICE,) * (LAYERS + 1), slots=0, sequences=1, prompt_tokens=8)
    with_rows = predict(plan, scenario_of(rates))
    without = predict(dataclasses.replace(plan, embedding=EmbeddingPlacement.RESIDENT), scenario_of(rates))
    assert with_rows.decode_s_per_pass - without.decode_s_per_pass == pytest.approx(1.0)
    assert with_rows.compute_s_per_pass - without.compute_s_per_pass == pytest.approx(1.0)
    assert with_rows.prefill_s - without.prefill_s == pytest.approx(distinct_rows(VOCAB, 8))


def test_a_sequential_run_pays_for_every_request_by_hand() -> None:
    """Four requests a pass, each 0.25 s until bytes come and 0.125 s until the processor is at speed."""
    rates = rates_of((1, 0.5), read_latency_s=0.25, stall_penalty_s=0.125)
    plan = plan_of(Strategy.SEQUENTIAL, slots=1, sequences=1, prompt_tokens=1, generate_tokens=3)
    prediction = predict(plan, scenario_of(rates))
    assert prediction.decode_s_per_pass == pytest.approx(3.5 + 1.75 + 4 * 0.375)
    assert prediction.prefill_s == pytest.approx(3.5 + 1.75 + 4 * 0.375)
    assert prediction.compute_s_per_pass == pytest.approx(1.75)
    assert prediction.load_s_per_pass == pytest.approx(3.5)


# -- break-even --------------------------------------------------------------------------------------------------------


def test_break_even_in_proportion_is_the_ratio() -> None:
    """Where time is proportional to tokens: 3.5 s of reading over 0.035 s of computing for a token."""
    rates = rates_of((1, 0.01))
    prediction = predict(plan_of(), scenario_of(rates))
    assert prediction.break_even_tokens_per_pass == pytest.approx(3.5 / 0.035, rel=0.01)


def test_break_even_follows_the_textbook() -> None:
    """16-bit weights: arithmetic per second over bytes per second, whatever the model (formulas.md, section 3)."""
    flops_per_s, bytes_per_s = 52e12, 1e10
    rates = rates_of((1, LAYER_PARAMETERS * 2 / flops_per_s), read_bytes_per_s=bytes_per_s)
    prediction = predict(plan_of(), scenario_of(rates))
    assert prediction.break_even_tokens_per_pass == pytest.approx(flops_per_s / bytes_per_s, rel=0.01)


@pytest.mark.parametrize(
    ("placements", "share"),
    [((DISK,) * 4, 1.0), ((DEVICE, DISK, DISK, DISK), 2.5 / 3.5), ((DEVICE, DEVICE, DEVICE, DISK), 0.5 / 3.5)],
)
def test_what_stays_need_not_be_hidden(placements: tuple[Placement, ...], share: float) -> None:
    rates = rates_of((1, 0.01))
    prediction = predict(plan_of(placements=placements), scenario_of(rates))
    assert prediction.break_even_tokens_per_pass == pytest.approx(share * 100, rel=0.01)


def rising(values: list[float]) -> list[float]:
    total = 0.0
    return [total := total + value for value in values]


@given(
    tokens=st.sets(st.integers(1, 512), min_size=1, max_size=6).map(sorted),
    steps=st.lists(st.floats(0.001, 1.0), min_size=6, max_size=6),
    read_s=st.floats(0.001, 50.0),
    overheads=st.tuples(st.floats(0, 0.01), st.floats(0, 0.01)),
    sequences=st.integers(1, 64),
    correction=st.floats(0.5, 2.0),
)
@settings(deadline=None)
def test_at_break_even_computing_takes_as_long_as_loading(
    tokens: list[int],
    steps: list[float],
    read_s: float,
    overheads: tuple[float, float],
    sequences: int,
    correction: float,
) -> None:
    points = list(zip(tokens, rising(steps)[: len(tokens)], strict=True))
    rates = rates_of(*points, read_bytes_per_s=LAYER_BYTES / read_s)
    rates = dataclasses.replace(rates, block_overhead_s=overheads[0], pass_overhead_s=overheads[1])
    load_s = 3.5 * read_s
    uncorrected_s = compute_seconds(rates, sequences)
    compute_s = correction * uncorrected_s  # as a timed layer shows it
    result = break_even_tokens(scenario_of(rates), sequences, load_s=load_s, compute_s=compute_s)
    factor = compute_s / uncorrected_s
    least_s = factor * compute_seconds(rates, 1)
    if least_s >= load_s:
        assert result == pytest.approx(load_s / least_s), "below one token: the share of a token's time"
        assert result <= 1
        return
    assert result >= 1
    assert factor * compute_seconds(rates, result) == pytest.approx(load_s, rel=0.01)


def compute_seconds(rates: Rates, tokens: float) -> float:
    """Compute a pass of `tokens` tokens, from the curve, written out."""
    per_parameter = rates.known_curve.seconds_per_parameter(tokens)
    layers_s = LAYERS * (rates.block_overhead_s + LAYER_PARAMETERS * per_parameter)
    return rates.pass_overhead_s + layers_s + HEAD_PARAMETERS * per_parameter


def test_break_even_beyond_all_sense_ends() -> None:
    rates = rates_of((1, 1e-12), read_bytes_per_s=1e-3)
    result = predict(plan_of(), scenario_of(rates)).break_even_tokens_per_pass
    assert 2**40 < result < math.inf


# -- bounds ------------------------------------------------------------------------------------------------------------


@given(
    placements=st.tuples(*[st.sampled_from([DEVICE, DISK])] * 4),
    slots=st.integers(1, 4),
    strategy=st.sampled_from([Strategy.OVERLAP, Strategy.SEQUENTIAL]),
    layer_s=st.tuples(st.floats(0.01, 5), st.floats(0.01, 5)),
    read_s=st.floats(0.01, 5),
    overhead_s=st.sampled_from([0.0, 0.3]),
    work=st.tuples(st.integers(1, 4), st.integers(1, 16), st.integers(1, 40)),
    slowdowns=st.tuples(st.sampled_from([1.0, 1.3, 2.0]), st.sampled_from([1.0, 1.3, 2.0])),
    waits_s=st.tuples(st.sampled_from([0.0, 0.07]), st.sampled_from([0.0, 0.05])),
    first_s=st.sampled_from([None, 0.0, 0.8]),
)
@settings(deadline=None)
def test_no_prediction_is_faster_than_bytes_and_arithmetic_allow(
    placements: tuple[Placement, ...],
    slots: int,
    strategy: Strategy,
    layer_s: tuple[float, float],
    read_s: float,
    overhead_s: float,
    work: tuple[int, int, int],
    slowdowns: tuple[float, float],
    waits_s: tuple[float, float],
    first_s: float | None,
) -> None:
    sequences, prompt, generate = work
    assume(DISK in placements)
    plan = plan_of(
        strategy,
        placements=placements,
        slots=slots,
        sequences=sequences,
        prompt_tokens=prompt,
        generate_tokens=generate,
    )
    rates = rates_of((1, min(layer_s)), (64, max(layer_s)), read_bytes_per_s=LAYER_BYTES / read_s)
    rates = dataclasses.replace(
        rates,
        pass_overhead_s=overhead_s,
        first_pass_overhead_s=first_s,
        read_slowdown=slowdowns[0],
        compute_slowdown=slowdowns[1],
        read_latency_s=waits_s[0],
        stall_penalty_s=waits_s[1],
    )
    prediction = predict(plan, scenario_of(rates))
    sizes = [block.read_bytes for block in SPEC.blocks]
    streamed_s = (
        sum(size for size, place in zip(sizes, placements, strict=True) if place is DISK) / rates.read_bytes_per_s
    )
    assert prediction.load_s_per_pass == pytest.approx(streamed_s)
    assert prediction.possible_decode_s == max(prediction.load_s_per_pass, prediction.compute_s_per_pass)
    assert prediction.decode_s_per_pass >= prediction.possible_decode_s * (1 - 1e-9)
    ahead_s = slots * read_s / 2 if slowdowns[1] > 1 else 0.0  # of the two passes looked at: reading further ones
    waits = sum(waits_s) * placements.count(DISK)
    most_s = prediction.load_s_per_pass + prediction.compute_s_per_pass + ahead_s + waits
    assert prediction.decode_s_per_pass <= most_s * (1 + 1e-9)
    assert prediction.prefill_s >= sum(sizes) / rates.read_bytes_per_s * (1 - 1e-9)
    assert prediction.total_s == pytest.approx(prediction.prefill_s + (generate - 1) * prediction.decode_s_per_pass)
    scenario = dataclasses.replace(scenario_of(rates), workload=plan.workload)
    bound = LowerBound(scenario, strategy).total_s(Arrangement(placements, slots))
    assert bound <= prediction.total_s * (1 + 1e-9)
    if strategy is Strategy.SEQUENTIAL:
        assert bound == pytest.approx(prediction.total_s)
