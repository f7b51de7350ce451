"""Curves behind the pictures: one thing varied, the rest of the scenario kept.

Points that do not fit are left out. Every point has its low and high end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from headrace.errors import HeadraceError
from headrace.machine.quantity import Interval, interval_of
from headrace.model.scaling import scaled
from headrace.planning.break_even import fastest_source
from headrace.planning.closed_form import ClosedForm
from headrace.planning.described_rates import quantities
from headrace.planning.plan import Arrangement, arranged
from headrace.planning.planner import plan_strategy
from headrace.planning.prediction import Candidate, prediction_interval
from headrace.planning.price import price
from headrace.planning.scenario import Scenario
from headrace.planning.splits import with_devices
from headrace.planning.strategies import Strategy

MAX_TOKENS = 1 << 17
SIZE_FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
DEVICE_COUNTS = (1, 2, 4, 8, 16, 32, 64)
_MAX_DEVICES = 1 << 17
_ON_ONE_DEVICE = (Strategy.RESIDENT, Strategy.OVERLAP)
_ON_MANY = (Strategy.PIPELINE, Strategy.TENSOR, Strategy.TENSOR_2D, Strategy.TENSOR_OVERLAP, Strategy.SHARDED)
_HOLDING = (Strategy.RESIDENT, Strategy.TENSOR, Strategy.TENSOR_PIPELINE, Strategy.PIPELINE)


Points = Sequence[tuple[float, Interval]]
"""of a line: what varies, and the value there"""


def against_tokens(scenario: Scenario, *, steps: int = 35) -> dict[str, Points]:
    """Seconds per pass against tokens per pass: streamed with and without overlap, and resident where that fits."""
    ways: list[tuple[str, Arrangement]] = []
    layers, source = scenario.model.num_layers, fastest_source(scenario)
    if source is not None:
        streamed = arranged(layers, resident=0, source=source)
        ways.append((f"streamed from {source.value}, overlapped", streamed))
        ways.append((f"streamed from {source.value}, in turn", streamed._replace(slots=1)))
    for found in _planned(scenario, (Strategy.RESIDENT, Strategy.TENSOR)):
        held = found.plan.arrangement
        width = held.parallelism.tensor
        name = f"split over {width} devices" if width > 1 else "resident on one device"
        ways.append((name, held._replace(parallelism=replace(held.parallelism, replicas=1))))
    return {name: list(_passes(scenario, arrangement, steps=steps)) for name, arrangement in ways}


def against_size(scenario: Scenario) -> Points:
    """Dollars per 750 words against parameters: the model scaled, each on the fewest of these devices that hold it."""
    points = []
    for factor in SIZE_FACTORS:
        model = scaled(scenario.model, factor)
        found = _cheapest(replace(scenario, model=model))
        if found is not None:
            points.append((float(model.parameters), found))
    return points


def against_devices(scenario: Scenario) -> Mapping[str, Points]:
    """Seconds per token of one sequence's batch against the number of devices, by strategy."""
    curves: dict[str, list[tuple[float, Interval]]] = {}
    for count in DEVICE_COUNTS:
        machine = with_devices(scenario.described_machine, count)
        if machine is None:
            continue
        asked = scenario.on(machine)
        for found in _planned(asked, _ON_ONE_DEVICE if count == 1 else _ON_MANY):
            if count == 1 or found.plan.parallelism.devices == count:
                seconds = prediction_interval(found, asked).decode_s_per_pass
                curves.setdefault(found.plan.strategy.value, []).append((float(count), seconds))
    return curves


def _passes(scenario: Scenario, arrangement: Arrangement, *, steps: int) -> Iterator[tuple[float, Interval]]:
    constants = quantities(scenario, arrangement)
    for step in range(steps):
        tokens = MAX_TOKENS ** (step / (steps - 1))
        yield (
            tokens,
            interval_of(
                constants,
                lambda values, tokens=tokens: (  # type: ignore[misc]
                    ClosedForm.of(scenario, arrangement, values).tokens_s(tokens, scenario.workload)
                ),
            ),
        )


def _cheapest(scenario: Scenario) -> Interval | None:
    """The lowest price of the strategies that run on as many devices as it takes."""
    for doublings in range(_MAX_DEVICES.bit_length()):
        machine = with_devices(scenario.described_machine, 2**doublings)
        if machine is None:
            continue
        asked, prices = scenario.on(machine), []
        for found in _planned(asked, _HOLDING):
            total_s = prediction_interval(found, asked).total_s
            usd = price(machine, found.plan, total_s, binds=found.prediction.binds).usd_per_750_words
            prices += [] if usd is None else [usd]
        if prices:
            return min(prices, key=lambda usd: usd.expected)
    return None


def _planned(scenario: Scenario, strategies: Iterable[Strategy]) -> Iterator[Candidate]:
    """The plans of those strategies that fit."""
    for strategy in strategies:
        with contextlib.suppress(HeadraceError):
            yield plan_strategy(scenario, strategy)
