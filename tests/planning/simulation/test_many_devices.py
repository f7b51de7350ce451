"""Closed forms against executed schedules: first and later passes to 1e-9 but where a test says why not."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn import missed_experts, passes_for
from headrace.machine.engine import PRESENT, Engine
from headrace.machine.machine import Machine, Tier
from headrace.model.model import LayerGroup, Model
from headrace.planning.arrangement import Arrangement
from headrace.planning.cost import WorkCost, work_cost
from headrace.planning.machine_rates import MachineRates, quantities
from headrace.planning.simulation import SimulatedWork, simulate_work
from headrace.planning.simulation.many_devices import DECODE_PASSES
from headrace.planning.workload import Speculation, Workload
from planning_examples import dense_model, moe_model, server

SHAPE = dense_model(name="forty", layers=40)
ONE_LAYER = 1 / 40
works = st.builds(
    Workload,
    sequences=st.sampled_from([1, 4, 16, 64]),
    prompt_tokens=st.sampled_from([1, 16, 512, 4000]),
    generate_tokens=st.just(32),
)


def both(
    arrangement: Arrangement,
    work: Workload,
    *,
    model: Model = SHAPE,
    machine: Machine | None = None,
    engine: Engine = PRESENT,
    passes: int = DECODE_PASSES,
) -> tuple[WorkCost, SimulatedWork]:
    place = machine or server()
    constants = quantities(place, engine, arrangement, weight_format="bf16")
    rates = MachineRates.of({name: constant.expected for name, constant in constants.items()})
    closed = work_cost(model, place, arrangement, work, rates)
    return closed, simulate_work(model, place, arrangement, work, rates, passes=passes)


def agree(closed: WorkCost, played: SimulatedWork, *, decode: float, prefill: float) -> None:
    assert played.decode_s_per_pass == pytest.approx(closed.decode_s_per_pass, rel=decode)
    assert played.prefill_s == pytest.approx(closed.prefill_s, rel=prefill)


@given(works)
@settings(deadline=None, max_examples=20)
def test_resident_is_exact(work: Workload) -> None:
    agree(*both(Arrangement(strategy="resident"), work), decode=1e-9, prefill=1e-9)


@given(works, st.sampled_from([Tier.HOST, Tier.DISK]), st.sampled_from([0.0, 0.25, 0.5]))
@settings(deadline=None, max_examples=30)
def test_in_sequence_is_exact(work: Workload, source: Tier, held: float) -> None:
    arrangement = Arrangement(strategy="sequential", source=source, overlap=False, slots=1, resident_share=held)
    agree(*both(arrangement, work), decode=1e-9, prefill=1e-9)


@given(works, st.sampled_from([Tier.HOST, Tier.DISK]), st.sampled_from([2, 3, 4]))
@settings(deadline=None, max_examples=40)
def test_equal_layers_overlapped_agree_in_the_steady_state(work: Workload, source: Tier, slots: int) -> None:
    arrangement = Arrangement(strategy="overlap", source=source, slots=slots, resident_share=0.0)
    agree(*both(arrangement, work), decode=1e-9, prefill=1e-9)


@given(works, st.sampled_from([0.25, 0.5, 0.75]))
@settings(deadline=None, max_examples=30)
def test_partly_resident_agrees(work: Workload, held: float) -> None:
    arrangement = Arrangement(strategy="overlap", source=Tier.HOST, slots=3, resident_share=held)
    evenly = held != 0.25  # three of four travel: the stretches between them differ by a layer
    agree(*both(arrangement, work), decode=1e-9, prefill=1e-9 if evenly else ONE_LAYER)


@given(works, st.sampled_from([0.25, 0.5, 1.0]))
@settings(deadline=None, max_examples=30)
def test_the_host_s_share_agrees(work: Workload, share: float) -> None:
    """Runs of layers that the host computes come between those that travel: three slots do not bridge all of them."""
    arrangement = Arrangement(
        strategy="hybrid", source=Tier.HOST, slots=3, resident_share=0.25 * (share < 1), cpu_share=share
    )
    agree(*both(arrangement, work), decode=0.01, prefill=0.08)


@given(works, st.sampled_from([0.0, 0.5, 1.0]))
@settings(deadline=None, max_examples=20)
def test_a_cache_on_the_host_travels_too(work: Workload, held: float) -> None:
    """Two layers' caches at once hold back the weights behind them: 8 % where loading and computing are even."""
    slots = 3 if held < 1 else 0
    arrangement = Arrangement(strategy="overlap", source=Tier.HOST, slots=slots, resident_share=held, kv_tier=Tier.HOST)
    closed, played = both(arrangement, work)
    assert played.decode_s_per_pass == pytest.approx(closed.decode_s_per_pass, rel=0.08)
    assert played.decode_s_per_pass >= closed.decode_s_per_pass * (1 - 1e-9)
    without, _ = both(dataclasses.replace(arrangement, kv_tier=Tier.DEVICE), work)
    if work.sequences == 64 and work.prompt_tokens >= 2000:
        assert closed.decode_s_per_pass > 2 * without.decode_s_per_pass


@given(works, st.sampled_from([2, 4, 8]), st.booleans())
@settings(deadline=None, max_examples=30)
def test_split_by_width_is_exact(work: Workload, width: int, two_dimensional: bool) -> None:
    arrangement = Arrangement(strategy="tensor", tensor=width, two_dimensional=two_dimensional)
    agree(*both(arrangement, work), decode=1e-9, prefill=1e-9)


@given(works, st.sampled_from([2, 4, 8]))
@settings(deadline=None, max_examples=20)
def test_a_split_copy_that_streams_agrees(work: Workload, width: int) -> None:
    arrangement = Arrangement(strategy="tensor+overlap", source=Tier.HOST, slots=3, resident_share=0.0, tensor=width)
    agree(*both(arrangement, work), decode=1e-9, prefill=1e-9)


@given(works, st.sampled_from([2, 3, 4, 5, 8]), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=40)
def test_a_pipeline_agrees(work: Workload, stages: int, batches: int, width: int) -> None:
    """Many passes: after a long prefill the stages need some until each waits only for the slowest."""
    if stages * width > 8:
        return
    batches = min(batches, work.sequences)
    arrangement = Arrangement(strategy="pipeline", pipeline=stages, micro_batches=batches, tensor=width)
    agree(*both(arrangement, work, passes=DECODE_PASSES if batches == 1 else 40), decode=1e-9, prefill=1e-9)


@given(works, st.sampled_from([2, 4, 8]), st.sampled_from([Tier.HOST, Tier.DISK]))
@settings(deadline=None, max_examples=20)
def test_sharded_devices_agree(work: Workload, devices: int, source: Tier) -> None:
    if work.sequences < devices:
        return
    arrangement = Arrangement(
        strategy="sharded", source=source, slots=3, resident_share=0.0, replicas=devices, sharded=True
    )
    agree(*both(arrangement, work), decode=1e-9, prefill=1e-9)


def test_shared_uplinks_bind_in_both() -> None:
    machine = server()
    links = dict(machine.links)
    links["bridge"] = dataclasses.replace(links["host"], name="bridge", bytes_per_s=links["host"].bytes_per_s.times(2))
    links["host"] = dataclasses.replace(links["host"], uplink="bridge")
    shared = dataclasses.replace(machine, links=links)
    arrangement = Arrangement(
        strategy="sharded", source=Tier.HOST, slots=3, resident_share=0.0, replicas=8, sharded=True
    )
    work = Workload(sequences=8, generate_tokens=32)
    alone, _ = both(arrangement, work)
    closed, played = both(arrangement, work, machine=shared)
    agree(closed, played, decode=1e-9, prefill=1e-9)
    assert closed.decode_s_per_pass > 2.5 * alone.decode_s_per_pass


def test_unequal_layers_agree() -> None:
    """Three small layers before the others, as in DeepSeek-V3."""
    small = dataclasses.replace(next(SHAPE.layers()), feed_forward_parameters=10**7, feed_forward_bytes=2e7)
    model = dataclasses.replace(SHAPE, groups=(LayerGroup(layer=small, count=3), *SHAPE.groups))
    arrangement = Arrangement(strategy="overlap", source=Tier.HOST, slots=3, resident_share=0.0)
    agree(*both(arrangement, Workload(generate_tokens=32), model=model), decode=1e-9, prefill=ONE_LAYER)


@given(works, st.sampled_from([Tier.HOST, Tier.DISK]), st.sampled_from([0.0, 0.5, 1.0]))
@settings(deadline=None, max_examples=20)
def test_experts_fetched_on_demand_are_exact(work: Workload, source: Tier, hit_rate: float) -> None:
    arrangement = Arrangement(strategy="experts", source=source, expert_hit_rate=hit_rate)
    agree(*both(arrangement, work, model=moe_model()), decode=1e-9, prefill=1e-9)


@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
@pytest.mark.parametrize("hit_rate", [0.0, 0.5, 1.0])
def test_missed_experts_are_those_of_the_closed_form(tokens: int, hit_rate: float) -> None:
    layer = next(moe_model().layers())
    drawn = missed_experts(layer, tokens=tokens, hit_rate=hit_rate, draws=4000, seed=7)
    assert drawn == pytest.approx(layer.experts_touched(tokens) * (1 - hit_rate), abs=0.05)


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.8, 1.0])
def test_accepted_drafts_are_those_of_the_closed_form(acceptance: float) -> None:
    speculation = Speculation(draft_tokens=4, acceptance=acceptance)
    passes = passes_for(speculation, tokens=50_000, seed=3)
    assert 50_000 / passes == pytest.approx(speculation.tokens_per_pass, rel=0.02)


def test_copies_and_computing_in_turn_agree() -> None:
    in_turn = dataclasses.replace(PRESENT, overlaps_copies=False, overlaps_hops=False)
    arrangement = Arrangement(strategy="overlap", source=Tier.HOST, slots=2, resident_share=0.0)
    closed, played = both(arrangement, Workload(sequences=64, generate_tokens=32), engine=in_turn)
    agree(closed, played, decode=1e-6, prefill=1e-6)


def test_the_timeline_shows_reads_and_computing() -> None:
    _, played = both(Arrangement(strategy="overlap", source=Tier.DISK, slots=2, resident_share=0.0), Workload())
    lanes = {event.lane.value for event in played.timeline.events}
    assert {"read", "compute"} <= lanes
