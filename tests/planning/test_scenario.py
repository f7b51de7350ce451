"""Questions that make no sense are refused."""

from __future__ import annotations

import dataclasses

import pytest

from headrace.errors import InvalidRequestError
from headrace.model.layout import PAGE_BYTES
from planning_scenarios import accelerator_scenario, model


def test_a_ring_that_carries_nothing_is_refused() -> None:
    scenario = accelerator_scenario(model([100]))
    with pytest.raises(InvalidRequestError, match="ring"):
        dataclasses.replace(scenario, ring_chunks=1)
    with pytest.raises(InvalidRequestError, match="ring"):
        dataclasses.replace(scenario, chunk_bytes=PAGE_BYTES - 1)
