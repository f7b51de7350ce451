"""Choosing tokens: greedy, drawn with a seed, penalties, log-probabilities."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from headrace.inference.batching.sampling import Chosen, Decoding, NotFiniteError, Sampler, sample_all

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125]))


def draw(decoding: Decoding, times: int, seed: int = 1) -> Counter[int]:
    chooser = Sampler(decoding, seed, frozenset())
    return Counter(chooser.choose(LOGITS).token for _ in range(times))


def test_draws_have_the_models_distribution() -> None:
    found = draw(Decoding(temperature=1.0), 4000)
    for token, probability in enumerate((0.5, 0.25, 0.125, 0.125)):
        assert found[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_temperature_sharpens() -> None:
    found = draw(Decoding(temperature=0.5), 4000)
    squares = torch.tensor([0.5, 0.25, 0.125, 0.125]) ** 2
    assert found[0] / 4000 == pytest.approx(float(squares[0] / squares.sum()), abs=0.03)


def test_top_k_and_top_p_leave_out_the_tail() -> None:
    assert set(draw(Decoding(temperature=1.0, top_k=2), 300)) == {0, 1}
    assert set(draw(Decoding(temperature=1.0, top_p=0.6), 300)) == {0, 1}


def test_same_seed_same_tokens_whoever_shares_the_batch() -> None:
    def tokens(others: int) -> list[int]:
        mine = Sampler(Decoding(temperature=1.0), 9, frozenset())
        crowd = [Sampler(Decoding(temperature=1.0), seed, frozenset()) for seed in range(others)]
        rows = LOGITS.repeat(others + 1, 1)
        found = [sample_all([*crowd, mine], rows)[-1] for _ in range(30)]
        return [item.token for item in found if isinstance(item, Chosen)]

    assert tokens(0) == tokens(3)
    assert len(set(tokens(0))) > 1


def test_a_draw_survives_rounding() -> None:
    one, other = (Sampler(Decoding(temperature=1.0), 3, frozenset()) for _ in range(2))
    noise = 1e-6 * torch.randn(4, generator=torch.Generator().manual_seed(0))
    assert [one.choose(LOGITS).token for _ in range(200)] == [other.choose(LOGITS + noise).token for _ in range(200)]


def test_penalties_bias_and_least_length() -> None:
    chooser = Sampler(Decoding(presence_penalty=2.0), 0, frozenset())
    assert [chooser.choose(LOGITS).token for _ in range(2)] == [0, 1]
    chooser = Sampler(Decoding(frequency_penalty=0.5), 0, frozenset())
    assert [chooser.choose(LOGITS).token for _ in range(4)] == [0, 0, 1, 0]
    assert Sampler(Decoding(logit_bias=((3, 10.0),)), 0, frozenset()).choose(LOGITS).token == 3
    chooser = Sampler(Decoding(min_tokens=2), 0, frozenset({0}))
    assert [chooser.choose(LOGITS).token for _ in range(3)] == [1, 1, 0]


def test_log_probabilities_are_the_models_own() -> None:
    chosen = Sampler(Decoding(logprobs=2, temperature=0.1), 0, frozenset()).choose(LOGITS)
    assert chosen.logprob == pytest.approx(float(LOGITS[chosen.token]))
    assert [token for token, _ in chosen.likeliest] == [0, 1]
    assert Sampler(Decoding(logprobs=0), 0, frozenset()).choose(LOGITS).likeliest == ()


def test_logits_are_not_changed() -> None:
    before = LOGITS.clone()
    Sampler(Decoding(presence_penalty=1.0, logit_bias=((0, -5.0),), min_tokens=3), 0, frozenset({1})).choose(LOGITS)
    assert torch.equal(before, LOGITS)


def test_no_numbers_are_an_error_of_that_row_alone() -> None:
    rows = torch.stack([LOGITS, LOGITS * torch.nan, LOGITS])
    choosers = [Sampler(Decoding(), 0, frozenset()) for _ in range(3)]
    found = sample_all(choosers, rows)
    assert isinstance(found[1], NotFiniteError)
    assert [type(item) for item in (found[0], found[2])] == [Chosen, Chosen]
    assert sample_all([], LOGITS[:0]) == []
