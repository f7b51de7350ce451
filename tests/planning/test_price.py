"""Prices of tokens and pages on rented devices, and their energy, against figures worked out by hand."""

from __future__ import annotations

import pytest

from headrace.errors import InvalidRequestError
from headrace.machine.quantity import Interval, Quantity
from headrace.planning import price
from planning_cases import exact


def test_dollars_per_million_tokens_and_per_page() -> None:
    usd = price.usd_per_million_tokens(exact(3.6), exact(1000))
    assert usd.expected == pytest.approx(1.0)
    assert price.usd_per_page(usd).expected == pytest.approx(0.001)
    # A factor of two either way in the rent, and in the speed, leaves more than two and less than four.
    wide = price.usd_per_million_tokens(Quantity(3.6, 1.8, 7.2, "a test"), Interval(1000, 500, 2000))
    assert 2 < wide.high / wide.expected < 4
    assert 2 < wide.expected / wide.low < 4


def test_energy_follows_the_busy_share_and_is_an_interval_while_streaming() -> None:
    assert price.drawn_share("compute", 0.0).expected == pytest.approx(0.43)
    assert price.drawn_share("compute").expected == pytest.approx(0.86)
    busy = price.joules_per_token(exact(700), exact(100), exact(0.5), devices=8)
    assert busy.expected == pytest.approx(28.0)
    waits = price.joules_per_token(exact(700), exact(1), price.drawn_share("disk"))
    assert (waits.low, waits.high) == pytest.approx((70.0, 700.0))


def test_input_tokens_are_priced_by_the_speed_at_which_they_are_read() -> None:
    assert price.usd_per_million_tokens(exact(2.0), exact(20_000)).expected == pytest.approx(0.02778, rel=1e-3)


def test_a_speed_of_zero_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="tokens per second"):
        price.usd_per_million_tokens(exact(1), exact(0))
