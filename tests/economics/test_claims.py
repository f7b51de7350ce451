"""The claims' arithmetic against figures worked out by hand; verdicts that follow when assumptions change."""

from __future__ import annotations

import math

import pytest

from headrace.economics.claims.claims import ASSUMPTIONS, CLAIMS, Checked, check_claims
from headrace.errors import InvalidRequestError


def check(name: str, **overrides: float) -> Checked:
    (checked,) = check_claims(name, overrides=overrides)
    return checked


def value(name: str, key: str, **overrides: float) -> float:
    return check(name, **overrides).outcome.values[key]


def verdict(name: str, **overrides: float) -> str:
    return check(name, **overrides).outcome.verdict


EXPECTED = [
    ("page-price", "usd_per_750_words", 0.06, 0.0),
    ("page-price-1000x", "usd_per_750_words", 60.0, 0.0),
    ("page-price-1000x", "usd_per_word", 0.08, 1e-12),
    ("growth", "ratio", 1496, 0.02),
    ("writer-price", "hours", 60 / 32.27, 1e-9),
    ("crossover", "tokens", 900e9, 0.0),
    ("crossover", "days", 9.0, 0.0),
    ("crossover", "tokens_in_money", 225e9, 1e-9),
    ("resident-cost", "usd_per_1k_tokens", 0.024, 0.01),
    ("streamed-cost", "usd_per_1k_tokens", 0.35, 0.02),
    ("streamed-cost-4bit", "usd_per_1k_tokens", 0.055, 0.01),
    ("hundreds-to-fit", "devices V100-32", 11, 0.0),
    ("hundreds-to-fit", "devices V100-16", 22, 0.0),
    ("hundreds-to-fit", "devices A100-40", 9, 0.0),
    ("hundreds-to-fit", "devices A100-80", 5, 0.0),
    ("hundreds-to-fit", "devices H200", 3, 0.0),
    ("hundreds-to-fit", "devices B200", 2, 0.0),
    ("hundreds-to-fit", "training devices V100-32", 88, 0.0),
    ("hundreds-to-fit", "training devices V100-16", 175, 0.0),
    ("one-copy-1000x", "devices V100-32", 10_938, 0.03),
    ("one-copy-1000x", "devices H100", 4_375, 0.03),
    ("one-copy-1000x", "devices GB300", 1_216, 0.03),
    ("one-copy-1000x", "copies_in_summit", 442 / 350, 0.03),
    ("streaming-latency", "s_per_token_1", 32.0, 0.02),
    ("streaming-latency", "s_per_token_4", 10.3, 0.02),
    ("overlap", "tokens_per_pass", 125e12 / 12e9, 1e-9),
    ("overlap", "kv_cache_bytes", 101e12, 0.01),
    ("overlap", "kv_over_weights", 290, 0.02),
    ("larger-is-slower", "floor_s V100-32", 0.036, 0.03),
    ("larger-is-slower", "floor_s A100-80", 0.039, 0.03),
    ("larger-is-slower", "floor_s H100", 0.024, 0.03),
    ("larger-is-slower", "floor_s B200", 0.024, 0.08),
    ("larger-is-slower", "floor_s GB300", 0.036, 0.03),
    ("larger-is-slower", "overhead_low_s", 0.005, 0.05),
    ("larger-is-slower", "overhead_1000x_high_s", 0.303, 0.05),
    ("world-stock", "h100_equivalents", 19.7e6, 0.01),
    ("world-stock", "power_w", 12.4e9, 0.01),
    ("copies-llama70b", "devices", 11.4e6, 0.01),
    ("copies-llama70b", "times_stock", 1.3, 0.03),
    ("copies-deepseek-r1", "devices", 13.7e6, 0.01),
    ("copies-deepseek-r1", "times_stock", 1.8, 0.03),
    ("copies-llama405b", "devices", 61e6, 0.01),
    ("copies-llama405b", "times_stock", 7.0, 0.03),
    ("copies-1000x", "devices", 26.5e9, 0.03),
    ("copies-1000x", "times_stock", 3000, 0.05),
    ("agent-sessions", "times_low", 200, 0.01),
    ("agent-sessions", "times_high", 400, 0.01),
]


@pytest.mark.parametrize(("name", "key", "expected", "tolerance"), EXPECTED)
def test_the_arithmetic_gives_the_known_figures(name: str, key: str, expected: float, tolerance: float) -> None:
    assert value(name, key) == pytest.approx(expected, rel=tolerance, abs=0.0)


VERDICTS = [
    ("page-price", {}, "holds"),
    ("page-price", {"api_usd_per_1k": 0.02}, "false"),
    ("page-price-1000x", {}, "holds, if"),
    ("page-price-1000x", {"price_exponent": 0.5}, "false"),
    ("growth", {}, "holds"),
    ("growth", {"growth": 100}, "false"),
    ("writer-price", {}, "holds"),
    ("writer-price", {"claimed_usd_per_page_1000x": 5}, "false"),
    ("mostly-inference", {}, "holds"),
    ("mostly-inference", {"tokens_per_day": 1e9}, "false"),
    ("streamed-cost", {}, "above"),
    ("streamed-cost", {"v100_rent_usd_per_h": 0.2}, "below"),
    ("streamed-cost-4bit", {}, "about the 2021 price"),
    ("hundreds-to-fit", {}, "false"),
    ("hundreds-to-fit", {"gpt3_weights_bytes": 35e12}, "holds"),
    ("one-copy-1000x", {}, "borderline then, false now"),
    ("one-copy-1000x", {"summit_devices": 10_000}, "holds then, false now"),
    ("largest-clusters", {}, "holds then, false now"),
    ("largest-clusters", {"largest_cluster_devices": 50_000}, "holds then, holds now"),
    ("streaming-latency", {}, "holds"),
    ("streaming-latency", {"stream_bytes_per_s": 2e12}, "false"),
    ("overlap", {}, "holds from 10,417 tokens"),
    ("pipeline-latency", {}, "holds"),
    ("width-exchange", {}, "half right: its share grows with fewer neurons"),
    ("larger-is-slower", {}, "holds, mildly"),
    ("larger-is-slower", {"larger_layers": 96}, "false"),
    ("copies-llama70b", {}, "holds: 1.3 times"),
    ("copies-llama70b", {"readers": 1e9}, "false"),
    ("copies-deepseek-r1", {}, "holds: 1.8 times"),
    ("copies-llama405b", {}, "holds: 7.1 times"),
    ("copies-1000x", {}, "holds: 3,0"),
    ("agent-sessions", {"readers": 1e6}, "false"),
]


@pytest.mark.parametrize(("name", "overrides", "expected"), VERDICTS)
def test_verdicts_follow_from_the_numbers(name: str, overrides: dict[str, float], expected: str) -> None:
    assert verdict(name, **overrides).startswith(expected)


def test_every_claim_is_checked_with_its_assumptions_and_every_assumption_is_used() -> None:
    rows = check_claims()
    assert [row.claim.name for row in rows] == list(CLAIMS)
    for row in rows:
        assert row.outcome.verdict
        assert len(row.outcome.arithmetic) > 20
        assert row.assumptions
        assert all(math.isfinite(number) for number in row.outcome.values.values())
        assert all(item.source for item in row.assumptions.values())
    used = {name for row in rows for name in row.assumptions}
    assert used == set(ASSUMPTIONS)


def test_a_replaced_assumption_says_so_and_leaves_the_others() -> None:
    row = check("page-price", api_usd_per_1k=0.02)
    assert row.assumptions["api_usd_per_1k"] == (0.02, "set by you")
    assert row.assumptions["tokens_per_750_words"].value == 1000
    assert row.outcome.values["usd_per_750_words"] == 0.02


def test_assumptions_that_are_looked_up_follow_others() -> None:
    weights = value("one-copy-1000x", "devices H100")
    assert value("one-copy-1000x", "devices H100", growth=100) == pytest.approx(weights / 10, rel=0.1)


def test_the_cost_model_agrees_with_what_was_measured() -> None:
    """Not to be mistaken for accuracy: only that the rows stand on a model of the right size."""
    measured = check("streamed-cost").assumptions
    assert measured["v100_opt175b_predicted_tokens_per_s"].value == pytest.approx(2.0, rel=0.3)
    assert value("copies-llama70b", "predicted_tokens_per_s_per_device") == pytest.approx(7007, rel=0.6)
    assert value("copies-llama405b", "predicted_tokens_per_s_per_device") == pytest.approx(1302, rel=0.6)


def test_unknown_names_offer_what_was_perhaps_meant() -> None:
    with pytest.raises(InvalidRequestError, match="did you mean page-price"):
        check("page-prise")
    with pytest.raises(InvalidRequestError, match="did you mean api_usd_per_1k"):
        check("page-price", api_usd_per_k=0.02)


def test_an_assumption_that_the_claim_does_not_use_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="page-price does not use readers; it uses: tokens_per_750_words"):
        check("page-price", readers=1e9)


@pytest.mark.parametrize("number", [0.0, -1.0, math.nan, math.inf])
def test_assumptions_that_cannot_be_meant_are_refused(number: float) -> None:
    with pytest.raises(InvalidRequestError, match="above 0"):
        check("page-price", api_usd_per_1k=number)
