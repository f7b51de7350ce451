"""Prices of hours, tokens and pages, against figures worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from headrace.errors import InvalidRequestError, MachineError
from headrace.machine.machine import Processor
from headrace.machine.quantity import Interval, Quantity
from headrace.planning import price


def exact(value: float) -> Quantity:
    return Quantity.of(value, "a test")


PROCESSOR = Processor(
    name="made up",
    kind="gpu",
    memory_bytes=80e9,
    memory_bytes_per_s=exact(2e12),
    flops={"bf16": exact(1e15)},
    achievable=exact(0.8),
    power_w=exact(700),
    rent_usd_per_h=Quantity(2.0, 1.0, 4.0, "a test"),
    price_usd=exact(30_000),
)
TERMS = price.Terms(
    years=exact(4),
    utilisation=exact(0.5),
    pue=exact(1.2),
    usd_per_kwh=exact(0.1),
    server_share=exact(0.0),
    server_w=exact(0.0),
)


def test_a_page_cost_six_cents_and_one_of_a_model_a_thousand_times_as_large_sixty_dollars() -> None:
    assert price.page_price(0.06) == 0.06
    assert price.page_price(0.06, factor=1000) == 60.0
    assert price.page_price(0.06, words=1500) == 0.12


def test_crossover_is_three_times_the_training_tokens() -> None:
    assert price.crossover_tokens(300e9) == 900e9
    assert price.crossover_tokens(15e12) == 45e12
    # Inference that reaches a quarter of training's share of peak costs as much after a quarter of the tokens.
    assert price.crossover_tokens(300e9, training_share=0.4, inference_share=0.1) == pytest.approx(225e9)
    assert price.days_until(900e9, tokens_per_day=100e9) == 9.0


def test_an_owned_hour_is_depreciation_and_power() -> None:
    owned = price.owned_usd_per_h(PROCESSOR, terms=TERMS, drawn_share=exact(1.0))
    by_hand = 30_000 / (4 * 8760 * 0.5) + 0.7 * 1.2 * 0.1
    assert owned.expected == pytest.approx(by_hand)
    assert owned.low == pytest.approx(by_hand)
    assert owned.high == pytest.approx(by_hand)


def test_each_term_of_owning_can_be_changed_and_moves_the_price_its_way() -> None:
    base = price.owned_usd_per_h(PROCESSOR, terms=TERMS).expected
    assert price.owned_usd_per_h(PROCESSOR, terms=replace(TERMS, years=exact(2))).expected > base
    assert price.owned_usd_per_h(PROCESSOR, terms=replace(TERMS, utilisation=exact(1.0))).expected < base
    assert price.owned_usd_per_h(PROCESSOR, terms=replace(TERMS, usd_per_kwh=exact(0.3))).expected > base
    assert price.owned_usd_per_h(PROCESSOR, terms=replace(TERMS, pue=exact(2.0))).expected > base
    assert price.owned_usd_per_h(PROCESSOR, terms=replace(TERMS, server_share=exact(1.0))).expected > 1.8 * base
    assert price.owned_usd_per_h(PROCESSOR, terms=replace(TERMS, server_w=exact(700))).expected > base


def test_default_terms_state_their_sources_and_widen_the_price() -> None:
    terms = price.DEFAULT_TERMS
    assert all(getattr(terms, name).source for name in terms.__dataclass_fields__)
    owned = price.owned_usd_per_h(PROCESSOR)
    assert owned.low < 0.8 * owned.expected
    assert owned.high > 1.25 * owned.expected


def test_dollars_per_million_tokens_and_per_page() -> None:
    usd = price.usd_per_million_tokens(exact(3.6), exact(1000))
    assert usd.expected == pytest.approx(1.0)
    assert price.usd_per_page(usd).expected == pytest.approx(0.001)
    # A factor of two either way in the rent, and in the speed, leaves more than two and less than four.
    wide = price.usd_per_million_tokens(Quantity(3.6, 1.8, 7.2, "a test"), Interval(expected=1000, low=500, high=2000))
    assert 2 < wide.high / wide.expected < 4
    assert 2 < wide.expected / wide.low < 4


def test_energy_follows_the_busy_share_and_is_an_interval_while_streaming() -> None:
    assert price.power_share(0.0).expected == pytest.approx(0.43)
    assert price.power_share(1.0).expected == pytest.approx(0.86)
    busy = price.joules_per_token(exact(700), exact(100), devices=8, drawn_share=exact(0.5))
    assert busy.expected == pytest.approx(28.0)
    waits = price.joules_per_token(exact(700), exact(1), drawn_share=price.STREAMING_POWER_SHARE)
    assert (waits.low, waits.high) == pytest.approx((70.0, 700.0))


def test_input_tokens_are_priced_by_the_speed_at_which_they_are_read() -> None:
    assert price.usd_per_million_tokens(exact(2.0), exact(20_000)).expected == pytest.approx(0.02778, rel=1e-3)


@pytest.mark.parametrize("usd", [-0.01, math.nan, math.inf])
def test_prices_that_cannot_be_meant_are_refused(usd: float) -> None:
    with pytest.raises(InvalidRequestError, match="price"):
        price.page_price(usd)


@pytest.mark.parametrize("rate", [0.0, math.nan, -1.0, math.inf])
def test_tokens_per_day_that_cannot_be_meant_are_refused(rate: float) -> None:
    with pytest.raises(InvalidRequestError, match="per day"):
        price.days_until(1.0, tokens_per_day=rate)


def test_a_speed_of_zero_a_share_of_zero_and_negative_tokens_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="tokens per second"):
        price.usd_per_million_tokens(exact(1), exact(0))
    with pytest.raises(InvalidRequestError, match="share"):
        price.crossover_tokens(1e9, inference_share=0.0)
    with pytest.raises(InvalidRequestError, match="training tokens"):
        price.crossover_tokens(-1.0)
    with pytest.raises(InvalidRequestError, match="busy"):
        price.power_share(1.5)


def test_terms_that_cannot_be_meant_are_refused() -> None:
    for name, value in (("years", 0.0), ("utilisation", 1.5), ("pue", 0.5), ("years", 1000.0)):
        changed = {name: exact(value)}
        with pytest.raises(InvalidRequestError):
            price.Terms(**changed)
    with pytest.raises(MachineError):
        price.Terms(years=exact(math.nan))


def test_what_is_not_known_of_a_device_is_named() -> None:
    with pytest.raises(MachineError, match="rent"):
        price.rent_usd_per_h(replace(PROCESSOR, rent_usd_per_h=None))
    with pytest.raises(MachineError, match="no price"):
        price.owned_usd_per_h(replace(PROCESSOR, price_usd=None))
    with pytest.raises(MachineError, match="rated power"):
        price.owned_usd_per_h(replace(PROCESSOR, power_w=None))
