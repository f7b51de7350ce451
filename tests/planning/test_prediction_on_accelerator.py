"""Predictions of blocks that travel over a link: what binds, and which of the constants count."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from headrace.model.stored_model import StoredModel
from headrace.planning.plan import EmbeddingPlacement, Plan
from headrace.planning.planner import plan_strategy
from headrace.planning.prediction import Candidate, Prediction, predict, timeline_of
from headrace.planning.rates import LayerTimes, Rates
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from headrace.planning.timeline import Lane
from planning_scenarios import (
    CHUNK_BYTES,
    CPU,
    DEVICE,
    DISK,
    HOST,
    accelerator_rates,
    accelerator_scenario,
    budgets,
    model,
)

SHORT = model([700] * 3, vocab=600)


def case(
    rates: Rates,
    placements: str,
    *,
    spec: StoredModel = SHORT,
    pinned: bool = True,
    ring_chunks: int = 4,
    chunk_bytes: int = CHUNK_BYTES,
    **changes: Any,
) -> tuple[Plan, Scenario]:
    """Blocks at v(ideo memory), h(ost), d(isk) and c(omputed by the CPU) through two slots."""
    letters = {"v": DEVICE, "h": HOST, "d": DISK, "c": CPU}
    scenario = budgets(accelerator_scenario(spec), 2.0, 9.0).at(rates)
    plan, _ = plan_strategy(scenario, Strategy.RESIDENT)
    chosen = tuple(letters[letter] for letter in placements)
    other = dataclasses.replace(plan, **{"strategy": Strategy.OVERLAP, "slots": 2, "placements": chosen, **changes})
    return other, dataclasses.replace(scenario, pinned=pinned, ring_chunks=ring_chunks, chunk_bytes=chunk_bytes)


def prediction_of(rates: Rates, placements: str, **changes: Any) -> Prediction:
    """Predict a `case`."""
    return predict(*case(rates, placements, **changes))


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
    first_reads = []
    for chunks in (2, 8):
        plan, scenario = case(rates, "dddd", ring_chunks=chunks)
        events = timeline_of(Candidate(plan, predict(plan, scenario)), scenario).events
        first_reads.append(next(event for event in events if event.lane is Lane.READ))
    assert first_reads[0].end_s > 1.1 * first_reads[1].end_s
    few, whole = (prediction_of(rates, "dddd", **own) for own in ({"ring_chunks": 2}, {"chunk_bytes": 1 << 30}))
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
