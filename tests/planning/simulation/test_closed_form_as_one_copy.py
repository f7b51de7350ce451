"""Closed forms of one device against the simulation that plays measured rates, given the same seconds per layer."""

from __future__ import annotations

import functools
import itertools

import pytest

from headrace.machine.catalogue import find_machine
from headrace.model.catalogue import find_model
from headrace.planning.block_times import BlockTimes
from headrace.planning.closed_form import ClosedForm, WorkCost
from headrace.planning.plan import TRAVELLING, Arrangement, Placement
from headrace.planning.planner import compare
from headrace.planning.prediction import Candidate
from headrace.planning.scenario import Scenario
from headrace.planning.simulation.one_copy import PassSchedule, Simulated, simulate
from headrace.planning.strategies import Strategy
from headrace.planning.workload import Workload

ON_ONE_DEVICE = (Strategy.RESIDENT, Strategy.SEQUENTIAL, Strategy.OVERLAP, Strategy.HYBRID, Strategy.CPU)
MODELS = ("llama-3-8b", "llama-3.1-70b", "mixtral-8x7b", "gpt-3")
"""of equal layers: of others the forms take means"""
PLACES = ("rtx-4090", "laptop", "h100", "1xv100-32@dgx-2", "m2-ultra")
WORKS = (
    Workload(sequences=8, prompt_tokens=200, generate_tokens=100),
    Workload(sequences=64, prompt_tokens=1000, generate_tokens=50),
)


def closed(scenario: Scenario, arrangement: Arrangement) -> WorkCost:
    return ClosedForm.of(scenario, arrangement).work(scenario.workload)


def played(scenario: Scenario, arrangement: Arrangement) -> Simulated:
    """The same seconds per layer, each layer in one piece, the head and what a pass adds as one more block."""
    form = ClosedForm.of(scenario, arrangement)
    _, first, later = form.passes_of(scenario.workload)
    share = arrangement.streamed_share or 1.0
    blocks = []
    for layer, placement in zip(scenario.model.layers(), arrangement.placements, strict=False):
        if placement is Placement.CPU:
            prefill_s, decode_s = (form.host_layer_s(layer, carried) for carried in (first, later))
        else:
            prefill_s, decode_s = (sum(form.layer_seconds(layer, carried)) for carried in (first, later))
        link_s, disk_s, _ = form.load_seconds(layer, later)
        travels = placement in TRAVELLING
        blocks.append(
            BlockTimes(
                read_s=disk_s / share if travels else 0.0,
                prefill_s=prefill_s,
                decode_s=decode_s,
                copy_s=link_s / share if travels else 0.0,
                pieces=1,
            )
        )
    prefill_s, decode_s = (form.ends_s(carried) for carried in (first, later))
    blocks.append(BlockTimes(read_s=0.0, prefill_s=prefill_s, decode_s=decode_s))
    schedule = PassSchedule(
        blocks=tuple(blocks),
        placements=arrangement.placements,
        slots=arrangement.slots,
        overlap=arrangement.overlap,
        decode_passes=12,
    )
    return simulate(schedule)


@functools.cache
def plans() -> list[tuple[str, Scenario, Arrangement]]:
    found = []
    for name, place, work in itertools.product(MODELS, PLACES, WORKS):
        scenario = Scenario.described(find_model(name), find_machine(place), work)
        for strategy, item in compare(scenario).items():
            if strategy in ON_ONE_DEVICE and isinstance(item, Candidate):
                arrangement = item.plan.arrangement
                if arrangement.parallelism.devices == 1 and not arrangement.cache_on_host:
                    found.append((f"{name} on {place}, {work.sequences}: {strategy.value}", scenario, arrangement))
    assert len(found) > 100
    return found


def is_even(arrangement: Arrangement) -> bool:
    """Whether as many layers stay between any two that travel."""
    return not arrangement.travelling or (len(arrangement.placements) - 1) % arrangement.travelling == 0


def test_a_steady_pass_is_the_same() -> None:
    differing = []
    for name, scenario, arrangement in plans():
        form_s = closed(scenario, arrangement).decode_s_per_pass
        played_s = played(scenario, arrangement).decode_s_per_pass
        assert played_s >= form_s * (1 - 1e-11), "no order is faster than the longest of its parts"
        if played_s > form_s * (1 + 1e-11):
            differing.append(name)
            assert not is_even(arrangement)
            assert played_s < 1.12 * form_s
    # 25 of 32 layers travel, and computing takes as long as loading: two slots do not reach over the layers that stay.
    assert differing == ["llama-3-8b on laptop, 64: overlap"]


def test_a_first_pass_is_the_same_but_for_a_part_of_a_layer_where_some_stay() -> None:
    for name, scenario, arrangement in plans():
        form_s, played_s = closed(scenario, arrangement).prefill_s, played(scenario, arrangement).prefill_s
        layers_apart = 0.0 if is_even(arrangement) else 0.5 / scenario.model.num_layers
        assert played_s == pytest.approx(form_s, rel=1e-9 + layers_apart), name
