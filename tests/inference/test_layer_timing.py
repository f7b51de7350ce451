"""What is timed takes turns, and no longer than it has to: on a stage of the tests'."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.inference import layer_timing
from headrace.planning.workload import Workload


class Stage:
    """A layer that takes so many seconds a token."""

    waits_on_host = True

    def __init__(self, token_s: float) -> None:
        self._token_s = token_s
        self.ran: list[tuple[int, int]] = []

    def run(self, sequences: int, tokens: int, past_tokens: int, *, wait: bool = False) -> layer_timing._Parts:
        self.ran.append((sequences, tokens))
        return layer_timing._Parts(sequences * tokens * self._token_s, 0.0)


@pytest.mark.parametrize(
    ("token_s", "sequences", "prefills"),
    [
        (2**-12, 1, [(1, 256)] * 4),
        (2**-8, 1, [(1, 256)]),
        (2**-12, 3, [(2, 256), *[(3, 256)] * 3]),
        (2**-9, 3, [(2, 256)]),
    ],
)
def test_long_prefills_are_not_repeated(token_s: float, sequences: int, prefills: list[tuple[int, int]]) -> None:
    stage: Any = Stage(token_s)
    work = Workload(sequences=sequences, prompt_tokens=256, generate_tokens=2)
    timed = layer_timing._timed_kind(stage, work, ())
    assert [own for own in stage.ran if own[1] > 1] == prefills
    assert timed.layer.prefill_s == pytest.approx(256 * sequences * token_s)
    assert timed.layer.decode_s == pytest.approx(sequences * token_s)
