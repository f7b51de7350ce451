"""Common beginnings of a job's requests are found, in a table that does not grow with what is not shared."""

from __future__ import annotations

from headrace.inference.batching.common_prefixes import STEP_TOKENS, CommonPrefixes


def found(requests: list[list[int]]) -> list[int]:
    common = CommonPrefixes()
    for tokens in requests:
        common.see(tokens)
    return [best[0] if (best := common.best(tokens)) is not None else 0 for tokens in requests]


def test_system_prompt_of_all_requests() -> None:
    system = list(range(1000, 1200))
    lengths = found([[*system, number, number + 1] for number in range(20)])
    assert set(lengths) == {200 // STEP_TOKENS * STEP_TOKENS}


def test_two_kinds_of_requests() -> None:
    one, other = list(range(100, 180)), list(range(500, 660))
    assert found([[*(one if number % 2 else other), number] for number in range(40)]) == [160, 80] * 20


def test_nothing_shared() -> None:
    requests = [list(range(1000 * number, 1000 * number + 100)) for number in range(50)]
    assert set(found(requests)) == {0}
    common = CommonPrefixes()
    for tokens in requests:
        common.see(tokens)
    assert len(common._counts) <= 2 * len(requests)
    assert not common.any_shared


def test_a_prompt_is_never_shared_whole() -> None:
    """Its last token has to be computed, for the first token of the answer."""
    same = list(range(2 * STEP_TOKENS))
    assert set(found([same] * 10)) == {STEP_TOKENS}
