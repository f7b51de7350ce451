"""Closed forms against executed schedules: first and later passes to 1e-9 but where a test says why not."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn import missed_experts, passes_for
from headrace.machine.engine import PRESENT, Engine
from headrace.machine.machine import Machine
from headrace.model.model import LayerGroup, Model
from headrace.planning.closed_form import ClosedForm, WorkCost
from headrace.planning.plan import Arrangement, Parallelism, Placement, arranged
from headrace.planning.scenario import Scenario
from headrace.planning.simulation.many_devices import DECODE_PASSES, simulate_work
from headrace.planning.simulation.one_copy import Simulated
from headrace.planning.workload import Speculation, Workload
from planning_examples import dense_model, moe_model, server

SHAPE = dense_model(name="forty", layers=40)
ONE_LAYER = 1 / 40
HOST, DISK = Placement.HOST, Placement.DISK
HELD = arranged(40)
works = st.builds(
    Workload,
    sequences=st.sampled_from([1, 4, 16, 64]),
    prompt_tokens=st.sampled_from([1, 16, 512, 4000]),
    generate_tokens=st.just(32),
)


def streamed(
    source: Placement = HOST, *, slots: int = 3, resident: int = 0, cpu: int = 0, **division: int | bool
) -> Arrangement:
    parallelism = Parallelism(**division)  # type: ignore[arg-type]
    return arranged(40, resident=resident, cpu=cpu, source=source, slots=slots, parallelism=parallelism)


def split(**division: int | bool) -> Arrangement:
    return HELD._replace(parallelism=Parallelism(**division))  # type: ignore[arg-type]


def both(
    arrangement: Arrangement,
    work: Workload,
    *,
    model: Model = SHAPE,
    machine: Machine | None = None,
    engine: Engine = PRESENT,
    passes: int = DECODE_PASSES,
) -> tuple[WorkCost, Simulated]:
    scenario = Scenario(model=model, machine=machine or server(), workload=work, engine=engine, budget_bytes=0)
    form = ClosedForm.of(scenario, arrangement)
    return form.work(work), simulate_work(form, work, passes=passes)


def agree(closed: WorkCost, played: Simulated, *, decode: float, prefill: float) -> None:
    assert played.decode_s_per_pass == pytest.approx(closed.decode_s_per_pass, rel=decode)
    assert played.prefill_s == pytest.approx(closed.prefill_s, rel=prefill)


@given(works)
@settings(deadline=None, max_examples=20)
def test_resident_is_exact(work: Workload) -> None:
    agree(*both(HELD, work), decode=1e-9, prefill=1e-9)


@given(works, st.sampled_from([HOST, DISK]), st.sampled_from([0, 10, 20]))
@settings(deadline=None, max_examples=30)
def test_in_sequence_is_exact(work: Workload, source: Placement, held: int) -> None:
    agree(*both(streamed(source, slots=1, resident=held), work), decode=1e-9, prefill=1e-9)


@given(works, st.sampled_from([HOST, DISK]), st.sampled_from([2, 3, 4]))
@settings(deadline=None, max_examples=40)
def test_equal_layers_overlapped_agree_in_the_steady_state(work: Workload, source: Placement, slots: int) -> None:
    agree(*both(streamed(source, slots=slots), work), decode=1e-9, prefill=1e-9)


@given(works, st.sampled_from([10, 20, 30]))
@settings(deadline=None, max_examples=30)
def test_partly_resident_agrees(work: Workload, held: int) -> None:
    arrangement = streamed(resident=held)
    evenly = held != 10  # three of four travel: the stretches between them differ by a layer
    agree(*both(arrangement, work), decode=1e-9, prefill=1e-9 if evenly else ONE_LAYER)


@given(works, st.sampled_from([10, 20, 40]))
@settings(deadline=None, max_examples=30)
def test_the_host_s_share_agrees(work: Workload, own: int) -> None:
    """Runs of layers that the host computes come between those that travel: three slots do not bridge all of them."""
    arrangement = streamed(cpu=own, resident=10 * (own < 40))
    agree(*both(arrangement, work), decode=0.01, prefill=0.08)


@given(works, st.sampled_from([0, 20, 40]))
@settings(deadline=None, max_examples=20)
def test_a_cache_on_the_host_travels_too(work: Workload, held: int) -> None:
    """Three layers' caches at once hold back the weights behind them: 8 % where loading and computing are even."""
    arrangement = streamed(resident=held)._replace(cache_on_host=True)
    closed, played = both(arrangement, work)
    assert played.decode_s_per_pass == pytest.approx(closed.decode_s_per_pass, rel=0.08)
    assert played.decode_s_per_pass >= closed.decode_s_per_pass * (1 - 1e-9)
    without, _ = both(arrangement._replace(cache_on_host=False), work)
    if work.sequences == 64 and work.prompt_tokens >= 2000:
        assert closed.decode_s_per_pass > 2 * without.decode_s_per_pass


@given(works, st.sampled_from([2, 4, 8]), st.booleans())
@settings(deadline=None, max_examples=30)
def test_split_by_width_is_exact(work: Workload, width: int, two_dimensional: bool) -> None:
    arrangement = split(tensor=width, two_dimensional=two_dimensional)
    agree(*both(arrangement, work), decode=1e-9, prefill=1e-9)


@given(works, st.sampled_from([2, 4, 8]))
@settings(deadline=None, max_examples=20)
def test_a_split_copy_that_streams_agrees(work: Workload, width: int) -> None:
    agree(*both(streamed(tensor=width), work), decode=1e-9, prefill=1e-9)


@given(works, st.sampled_from([2, 3, 4, 5, 8]), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=40)
def test_a_pipeline_agrees(work: Workload, stages: int, batches: int, width: int) -> None:
    """Many passes: after a long prefill the stages need some until each waits only for the slowest."""
    if stages * width > 8:
        return
    batches = min(batches, work.sequences)
    arrangement = split(pipeline=stages, micro_batches=batches, tensor=width)
    agree(*both(arrangement, work, passes=DECODE_PASSES if batches == 1 else 40), decode=1e-9, prefill=1e-9)


@given(works, st.sampled_from([2, 4, 8]), st.sampled_from([HOST, DISK]))
@settings(deadline=None, max_examples=20)
def test_sharded_devices_agree(work: Workload, devices: int, source: Placement) -> None:
    if work.sequences < devices:
        return
    agree(*both(streamed(source, replicas=devices, sharded=True), work), decode=1e-9, prefill=1e-9)


def test_shared_uplinks_bind_in_both() -> None:
    machine = server()
    links = dict(machine.links)
    links["bridge"] = dataclasses.replace(links["host"], name="bridge", bytes_per_s=links["host"].bytes_per_s.times(2))
    links["host"] = dataclasses.replace(links["host"], uplink="bridge")
    shared = dataclasses.replace(machine, links=links)
    arrangement = streamed(replicas=8, sharded=True)
    work = Workload(sequences=8, generate_tokens=32, prompt_tokens=16)
    alone, _ = both(arrangement, work)
    closed, played = both(arrangement, work, machine=shared)
    agree(closed, played, decode=1e-9, prefill=1e-9)
    assert closed.decode_s_per_pass > 2.5 * alone.decode_s_per_pass


def test_unequal_layers_agree() -> None:
    """Three small layers before the others, as in DeepSeek-V3."""
    small = dataclasses.replace(next(SHAPE.layers()), feed_forward_parameters=10**7, feed_forward_bytes=2e7)
    model = dataclasses.replace(SHAPE, groups=(LayerGroup(layer=small, count=3), *SHAPE.groups))
    arrangement = arranged(43, resident=0, slots=3)
    agree(
        *both(arrangement, Workload(generate_tokens=32, prompt_tokens=16), model=model), decode=1e-9, prefill=ONE_LAYER
    )


@given(works, st.sampled_from([HOST, DISK]), st.sampled_from([0.0, 0.5, 1.0]))
@settings(deadline=None, max_examples=20)
def test_experts_fetched_on_demand_are_exact(work: Workload, source: Placement, hit_rate: float) -> None:
    arrangement = arranged(32)._replace(expert_hit_rate=hit_rate, expert_source=source)
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
    arrangement = streamed(slots=2)
    closed, played = both(arrangement, Workload(sequences=64, generate_tokens=32, prompt_tokens=16), engine=in_turn)
    agree(closed, played, decode=1e-6, prefill=1e-6)


def test_the_timeline_shows_reads_and_computing() -> None:
    _, played = both(streamed(DISK, slots=2), Workload(prompt_tokens=16, generate_tokens=32))
    lanes = {event.lane.value for event in played.timeline.events}
    assert {"read", "compute"} <= lanes
