"""Prices of devices that are bought, and of training against inference, against figures worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from headrace.economics.owning import DEFAULT_TERMS, Terms, crossover_tokens, owned_usd_per_h
from headrace.errors import InvalidRequestError, MachineError
from planning_cases import exact, made_up_processor

PROCESSOR = made_up_processor()
TERMS = Terms(
    years=exact(4),
    utilisation=exact(0.5),
    pue=exact(1.2),
    usd_per_kwh=exact(0.1),
    server_share=exact(0.0),
    server_w=exact(0.0),
)
ALL = exact(1.0)


def test_crossover_is_three_times_the_training_tokens() -> None:
    assert crossover_tokens(300e9) == 900e9
    assert crossover_tokens(15e12) == 45e12
    # Inference that reaches a quarter of training's share of peak costs as much after a quarter of the tokens.
    assert crossover_tokens(300e9, training_share=0.4, inference_share=0.1) == pytest.approx(225e9)
    with pytest.raises(InvalidRequestError, match="share"):
        crossover_tokens(1e9, inference_share=0.0)


def test_an_owned_hour_is_depreciation_and_power() -> None:
    owned = owned_usd_per_h(PROCESSOR, terms=TERMS, drawn=ALL)
    by_hand = 30_000 / (4 * 8760 * 0.5) + 0.7 * 1.2 * 0.1
    assert owned.expected == pytest.approx(by_hand)
    assert owned.low == pytest.approx(by_hand)
    assert owned.high == pytest.approx(by_hand)


def test_each_term_of_owning_can_be_changed_and_moves_the_price_its_way() -> None:
    def with_terms(terms: Terms) -> float:
        return owned_usd_per_h(PROCESSOR, terms=terms, drawn=exact(0.86)).expected

    base = with_terms(TERMS)
    assert with_terms(replace(TERMS, years=exact(2))) > base
    assert with_terms(replace(TERMS, utilisation=exact(1.0))) < base
    assert with_terms(replace(TERMS, usd_per_kwh=exact(0.3))) > base
    assert with_terms(replace(TERMS, pue=exact(2.0))) > base
    assert with_terms(replace(TERMS, server_share=exact(1.0))) > 1.8 * base
    assert with_terms(replace(TERMS, server_w=exact(700))) > base


def test_default_terms_state_their_sources_and_widen_the_price() -> None:
    assert all(getattr(DEFAULT_TERMS, name).source for name in Terms.__dataclass_fields__)
    owned = owned_usd_per_h(PROCESSOR, terms=DEFAULT_TERMS, drawn=ALL)
    assert owned.low < 0.8 * owned.expected
    assert owned.high > 1.25 * owned.expected


def test_terms_that_cannot_be_meant_are_refused() -> None:
    for name, value in (("years", 0.0), ("utilisation", 1.5), ("pue", 0.5), ("years", 1000.0)):
        changed = {name: exact(value)}
        with pytest.raises(InvalidRequestError):
            replace(DEFAULT_TERMS, **changed)
    with pytest.raises(MachineError):
        replace(DEFAULT_TERMS, years=exact(math.nan))


def test_what_is_not_known_of_a_device_is_named() -> None:
    for lacking, processor in (
        ("price", replace(PROCESSOR, price_usd=None)),
        ("rated power", replace(PROCESSOR, power_w=None)),
    ):
        with pytest.raises(MachineError, match=f"no {lacking}"):
            owned_usd_per_h(processor, terms=TERMS, drawn=ALL)
