"""The physics gates hold for the code as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from physics_gates import GATES


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.__name__)
def test_gate(gate: Callable[[], None]) -> None:
    gate()
