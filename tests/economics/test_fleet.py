"""Fleets of made-up machines: sizes that follow from the service, promises kept, refusals that help."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest

from headrace.economics.fleet import Bill, Fleet, FleetAsked, Stock, plan_fleet
from headrace.economics.service import Promise, best_service
from headrace.errors import InvalidRequestError, MachineError
from headrace.machine.quantity import Quantity
from headrace.planning.scenario import Scenario
from headrace.planning.workload import Workload
from planning_cases import exact, made_up_machine, made_up_model

WORK = Workload(sequences=1, prompt_tokens=500, generate_tokens=500)
SCENARIO = Scenario.described(made_up_model(), made_up_machine(), WORK)
OFFLINE = Promise()


def fleet(scenario: Scenario = SCENARIO, **changes: Any) -> Fleet:
    asked = FleetAsked(
        scenario=scenario, copies=8e9, tokens_per_s=10.0, promise=Promise(tokens_per_s=10.0), training_tokens=1e12
    )
    return plan_fleet(replace(asked, **changes))


def test_devices_are_wanted_tokens_over_what_a_device_writes() -> None:
    made = fleet()
    rate = made.service.tokens_per_s_per_device
    assert made.devices.expected == pytest.approx(8e10 / rate.expected)
    assert made.devices.low < made.devices.expected < made.devices.high
    assert made.copies_per_device.expected == pytest.approx(rate.expected / 10)
    assert made.h100_equivalents.expected == pytest.approx(made.devices.expected)
    assert made.devices_per_copy_of_weights == 1
    assert made.private_devices == 8e9


def test_one_copy_takes_a_whole_group_of_devices() -> None:
    made = fleet(replace(SCENARIO, model=made_up_model(layers=256)), copies=1, tokens_per_s=1.0)
    assert made.devices.low == made.devices.expected == made.service.devices >= 2
    assert isinstance(made.rented, Bill)
    assert made.rented.usd_per_year.expected == pytest.approx(made.service.devices * 2.0 * 8760)


def test_twice_the_copies_or_the_speed_take_twice_the_devices() -> None:
    once = fleet(promise=OFFLINE).devices.expected
    assert fleet(promise=OFFLINE, copies=16e9).devices.expected == pytest.approx(2 * once)
    assert fleet(promise=OFFLINE, tokens_per_s=20.0).devices.expected == pytest.approx(2 * once)


def test_a_faster_promise_means_a_smaller_batch_and_more_devices() -> None:
    slow, fast = (fleet(promise=Promise(tokens_per_s=speed)) for speed in (10.0, 100.0))
    assert fast.service.sequences < slow.service.sequences
    assert fast.devices.expected > slow.devices.expected
    assert slow.service.reader_tokens_per_s.expected >= 10
    assert fast.service.reader_tokens_per_s.expected >= 100


def test_the_batch_is_the_largest_that_keeps_the_promise_or_pays() -> None:
    promise = Promise(tokens_per_s=60.0)
    best = best_service(SCENARIO, promise)
    other = best_service(SCENARIO, promise, sequences=best.sequences // 2)
    assert other.tokens_per_s_per_device.expected <= best.tokens_per_s_per_device.expected
    assert best.candidate.prediction.decode_s_per_pass <= 1 / 60
    assert best.candidate.plan.memory.total_bytes <= SCENARIO.budget_bytes


def test_a_late_first_token_is_not_accepted() -> None:
    best = best_service(SCENARIO, Promise(first_token_s=0.2))
    assert best.candidate.prediction.prefill_s <= 0.2
    assert best.sequences < best_service(SCENARIO, OFFLINE).sequences


def test_dollars_follow_rent_devices_and_speed() -> None:
    made = fleet()
    assert isinstance(made.rented, Bill)
    assert isinstance(made.owned, Bill)
    rate = made.service.tokens_per_s_per_device.expected
    assert made.rented.usd_per_750_words.expected == pytest.approx(2.0 / 3600 / rate * 1000)
    assert made.rented.usd_per_year.expected == pytest.approx(made.devices.expected * 2.0 * 8760)
    assert made.rented.human_times_dearer.expected == pytest.approx(75 / made.rented.usd_per_750_words.expected)
    assert made.rented.usd_per_million_prompt_tokens.expected < made.rented.usd_per_million_tokens.expected
    assert made.owned.usd_per_device_hour.low < made.owned.usd_per_device_hour.expected


def test_power_is_below_the_rated_one_and_the_site_takes_more() -> None:
    made = fleet()
    assert made.device_power_w is not None
    assert made.site_power_w is not None
    assert made.joules_per_token is not None
    rated = made.devices.expected * 700
    assert 0.43 * rated <= made.device_power_w.expected <= 0.86 * rated * 1.001
    assert made.site_power_w.expected > 1.25 * made.device_power_w.expected
    assert made.joules_per_token.expected == pytest.approx(made.device_power_w.expected / 8e10, rel=1e-3)


def test_a_fleet_that_streams_draws_anything_between_idle_and_full() -> None:
    large = replace(SCENARIO, model=made_up_model(layers=3000))
    made = fleet(large, promise=OFFLINE, sequences=8)
    assert made.device_power_w is not None
    assert made.service.candidate.prediction.binds in {"link", "disk"}
    assert made.device_power_w.high / made.device_power_w.low > 5


def test_share_of_the_stock_and_the_crossover() -> None:
    stock = Stock(h100_equivalents=Quantity(20e6, 10e6, 40e6, "a test"), date="2025-12")
    made = fleet(stock=stock)
    assert made.stock_share is not None
    assert made.stock_share.expected == pytest.approx(made.devices.expected / 20e6)
    assert made.stock_share.high > 2 * made.stock_share.expected * 0.99
    assert made.crossover_tokens == 3e12
    assert made.tokens_per_day == pytest.approx(8e10 * 86_400 * 2)  # as much is read as written
    assert made.crossover_days == pytest.approx(3e12 / (8e10 * 86_400 * 2))
    assert made.crossover_tokens_in_money == pytest.approx(3e12 * made.inference_share / 0.4)
    assert 0 < made.inference_share < 1


def test_without_training_tokens_twenty_per_parameter_are_assumed() -> None:
    assert fleet(training_tokens=None).training_tokens == pytest.approx(20 * SCENARIO.model.parameters)


def test_a_model_larger_than_a_device_is_spread_and_weights_are_not_shared_for_nothing() -> None:
    made = fleet(replace(SCENARIO, model=made_up_model(layers=256)))  # 104 GB
    assert made.devices_per_copy_of_weights >= 2
    assert made.private_devices == 2 * 8e9


def test_what_does_not_fit_names_the_smallest_change() -> None:
    machine = made_up_machine(devices=1, host_bytes=10e9)
    machine = replace(machine, disk=replace(machine.require_disk(), size_bytes=1e9))
    alone = replace(SCENARIO, model=made_up_model(layers=256)).on(machine)
    with pytest.raises(MachineError, match=r"fits in no way(.|\n)*2 of these devices instead of 1"):
        fleet(alone)


def test_what_is_too_slow_says_how_fast_it_is_and_what_would_do() -> None:
    with pytest.raises(MachineError, match=r"100000 tokens/s per reader .* and \d+ is the most.*lower --slo"):
        fleet(promise=Promise(tokens_per_s=1e5))


def test_an_unknown_rent_is_said_and_the_rest_reckoned() -> None:
    machine = made_up_machine()
    machine = replace(machine, processor=replace(machine.processor, rent_usd_per_h=None, power_w=None))
    made = fleet(SCENARIO.on(machine))
    assert isinstance(made.rented, str)
    assert "no rent" in made.rented
    assert isinstance(made.owned, str)
    assert made.device_power_w is None
    assert made.devices.expected > 0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_counts_and_rates_that_cannot_be_meant_are_refused(value: float) -> None:
    for name in ("copies", "tokens_per_s", "training_tokens"):
        changed: dict[str, Any] = {name: value}
        with pytest.raises(InvalidRequestError, match="must be more than 0 and finite"):
            fleet(**changed)
    with pytest.raises(InvalidRequestError, match="must be more than 0 and finite"):
        Promise(tokens_per_s=value)
    with pytest.raises(InvalidRequestError, match="must be more than 0 and finite"):
        Promise(first_token_s=value)


def test_a_dear_device_makes_a_dear_page() -> None:
    machine = made_up_machine()
    dear = replace(machine, processor=replace(machine.processor, rent_usd_per_h=exact(4.0)))
    one, two = fleet().rented, fleet(SCENARIO.on(dear)).rented
    assert isinstance(one, Bill)
    assert isinstance(two, Bill)
    assert two.usd_per_750_words.expected == pytest.approx(2 * one.usd_per_750_words.expected)


def test_a_fleet_is_sized_in_under_two_seconds() -> None:
    began = time.process_time()
    fleet(SCENARIO.on(made_up_machine(nodes=9)))
    assert time.process_time() - began < 2.0
