"""Greedy unless drawing was asked for; options without effect are refused."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.cli.sampling import Sampling
from headrace.errors import InvalidRequestError


@pytest.mark.parametrize("given", [{}, {"temperature": 0.0}, {"greedy": True}, {"greedy": True, "temperature": 0.0}])
def test_greedy_by_default_and_at_temperature_zero(given: dict[str, Any]) -> None:
    sampling = Sampling(**given)
    assert not sampling.draws
    assert sampling.generate_options() == {"do_sample": False, "num_beams": 1}
    assert sampling.describe() == "greedy"


def test_only_what_was_given_overrides_the_models_defaults() -> None:
    sampling = Sampling(temperature=0.7, top_k=5, seed=3)
    assert sampling.generate_options() == {"do_sample": True, "num_beams": 1, "temperature": 0.7, "top_k": 5}
    assert sampling.describe() == "sampling: temperature 0.7, top-k 5, seed 3, num-beams 1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1.0}, "not -1.0"),
        ({"temperature": float("nan")}, "not nan"),
        ({"top_p": 0.0}, "not 0.0"),
        ({"top_k": 0}, "not 0"),
        ({"num_beams": 0}, "not 0"),
        ({"seed": 1}, "no effect"),
        ({"temperature": 0.0, "top_p": 0.5}, "no effect"),
        ({"greedy": True, "top_k": 3}, "--greedy"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Sampling(**given)
