"""The scheduler of passes: nobody is lost, nothing is computed twice, ranges of the pool never overlap."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import BudgetError
from headrace.planning.jobs.packing import Need, PassScheduler, PositionPool


def test_a_sequence_that_grows_beyond_a_length_is_computed_anew_once() -> None:
    scheduler = PassScheduler(most_sequences=1, pass_tokens=3, pool=PositionPool(9))
    scheduler.add("a", Need(3, 7, anew_at=6))
    turns = []
    while (packed := scheduler.pack()) is not None:
        turns += [(turn.first, turn.tokens, turn.samples, turn.whole) for turn in packed.turns]
        scheduler.advance()
    before = [(0, 3, True, 3), (3, 1, True, 4), (4, 1, True, 5)]
    anew = [(0, 3, False, 6), (3, 3, True, 6)]
    assert turns == [*before, *anew, (6, 1, True, 7), (7, 1, True, 8), (8, 1, True, 9)]
    assert scheduler.pool.held == 0


def play(scheduler: PassScheduler, needs: dict[Hashable, Need]) -> list[int]:
    """Run a job to its end, checking every pass; returns the tokens of the passes."""
    for key, need in needs.items():
        scheduler.add(key, need)
    sampled: dict[Hashable, int] = dict.fromkeys(needs, 0)
    content: dict[int, tuple[Hashable, int]] = {}
    passes = []

    def origin(key: Hashable, place: int) -> tuple[Hashable, int]:
        """Positions of a common beginning are the prefix's, whoever computed them."""
        need = scheduler.prefixes.get(key) or needs[key]
        while need.prefix in scheduler.prefixes and place < need.prefix_tokens:
            key = need.prefix
            need = scheduler.prefixes[key]
        return key, place

    while (packed := scheduler.pack()) is not None:
        scheduler.pool.check()
        assert 0 < packed.tokens <= scheduler.pass_tokens
        assert sum(turn.samples for turn in packed.turns) <= scheduler.most_sequences
        for copy in packed.copies:
            for place in range(copy.tokens):
                content[copy.target + place] = content[copy.source + place]
        for turn in packed.turns:
            for place in range(turn.first):  # all that came before is in the pool
                assert content[turn.start + place] == origin(turn.key, place)
            for place in range(turn.first, turn.first + turn.tokens):
                content[turn.start + place] = origin(turn.key, place)
            if turn.samples:
                sampled[turn.key] += 1
        passes.append(packed.tokens)
        scheduler.advance()
    assert sampled == {key: need.new_tokens for key, need in needs.items()}
    assert scheduler.pool.held == 0
    return passes


lengths = st.tuples(st.integers(1, 30), st.integers(1, 8))


@settings(max_examples=200, deadline=None)
@given(
    needs=st.lists(st.tuples(lengths, st.sampled_from(["", "short", "long"])), min_size=1, max_size=20),
    most_sequences=st.integers(1, 6),
    more_tokens=st.integers(0, 40),
    more_positions=st.integers(0, 120),
)
def test_every_job_ends_with_every_token(
    needs: list[tuple[tuple[int, int], str]], most_sequences: int, more_tokens: int, more_positions: int
) -> None:
    prefixes: dict[Hashable, Need] = {"short": Need(5, 0), "long": Need(12, 0, "short", 5)}
    made: dict[Hashable, Need] = {}
    for number, ((prompt, new), prefix) in enumerate(needs):
        shared = prefixes[prefix].prompt_tokens if prefix and prefixes[prefix].prompt_tokens < prompt else 0
        made[number] = Need(prompt, new, prefix if shared else None, shared)
    largest = max(need.positions for need in made.values())
    scheduler = PassScheduler(
        most_sequences=most_sequences,
        pass_tokens=most_sequences + more_tokens,
        pool=PositionPool(largest + more_positions),
        prefixes=prefixes,
    )
    play(scheduler, made)


def test_prefix_is_computed_once() -> None:
    needs: dict[Hashable, Need] = {number: Need(21, 2, "system", 20) for number in range(10)}
    scheduler = PassScheduler(
        most_sequences=4, pass_tokens=64, pool=PositionPool(150), prefixes={"system": Need(20, 0)}
    )
    assert sum(play(scheduler, needs)) == 20 + 10 * (1 + 1)


def test_sequences_join_and_leave_at_any_pass() -> None:
    needs: dict[Hashable, Need] = {"a": Need(1, 5), "b": Need(1, 2), "c": Need(1, 2)}
    scheduler = PassScheduler(most_sequences=2, pass_tokens=2, pool=PositionPool(100))
    assert play(scheduler, needs) == [2, 2, 2, 2, 1]


def test_long_prompts_are_cut_beside_decoding() -> None:
    scheduler = PassScheduler(most_sequences=2, pass_tokens=8, pool=PositionPool(100))
    assert play(scheduler, {"short": Need(1, 4), "long": Need(20, 2)}) == [8, 8, 7, 2]


def test_finished_early_gives_its_range_back() -> None:
    scheduler = PassScheduler(most_sequences=1, pass_tokens=4, pool=PositionPool(12))
    scheduler.add("a", Need(3, 10))
    scheduler.add("b", Need(3, 10))
    scheduler.pack()
    scheduler.finish("a")
    scheduler.advance()
    packed = scheduler.pack()
    assert packed is not None
    assert [turn.key for turn in packed.turns] == ["b"]


def test_too_long_for_the_pool_is_refused() -> None:
    scheduler = PassScheduler(most_sequences=1, pass_tokens=4, pool=PositionPool(12))
    with pytest.raises(BudgetError, match="need 13 positions"):
        scheduler.add("a", Need(4, 10))
    with pytest.raises(ValueError, match="do not fit"):
        PassScheduler(most_sequences=5, pass_tokens=4, pool=PositionPool(12))
