"""Groups of sequences: every token computed once and in order, no more passes than one by one, forecast as played."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from headrace.planning.jobs.forecast import Filling, PassTimes, choose_packing, forecast
from headrace.planning.jobs.groups import GroupScheduler, in_groups, size_of
from headrace.planning.jobs.packing import Need
from headrace.planning.memory import MemoryAccount
from headrace.planning.workload import Group, Grouped
from planning.test_forecast import COSTS, RATES, SPEC, needs_of, scenario, smallest

LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=20)


@given(lengths=LENGTHS, most=st.integers(1, 6), tokens=st.integers(1, 60), equal=st.booleans(), ends=st.integers(0, 5))
def test_every_sequence_gets_its_tokens_in_order(
    lengths: list[tuple[int, int]], most: int, tokens: int, equal: bool, ends: int
) -> None:
    needs: dict[Hashable, Need] = {number: Need(*pair) for number, pair in enumerate(lengths)}
    scheduler = GroupScheduler(most_sequences=most, pass_tokens=tokens, equal_prompts=equal)
    for key, need in needs.items():
        scheduler.add(key, need)
    computed, sampled = dict.fromkeys(needs, 0), dict.fromkeys(needs, 0)
    passes = 0
    while (packed := scheduler.pack()) is not None:
        passes += 1
        assert len({(turn.first, turn.tokens) for turn in packed.turns}) == 1
        assert len({turn.start for turn in packed.turns}) == len(packed.turns) <= most
        assert packed.turns[0].first or packed.tokens <= max(tokens, packed.turns[0].tokens)
        if equal and not packed.turns[0].first:
            assert {needs[turn.key].prompt_tokens for turn in packed.turns} == {packed.turns[0].tokens}
        scheduler.advance()
        for turn in packed.turns:
            assert turn.first == computed[turn.key]
            computed[turn.key] += turn.tokens
            sampled[turn.key] += turn.samples
            if turn.key == ends and sampled[turn.key]:
                scheduler.finish(turn.key)
    for key, need in needs.items():
        assert sampled[key] == (1 if key == ends else need.new_tokens)
        assert computed[key] == need.prompt_tokens + sampled[key] - 1
    assert passes <= sum(need.new_tokens for need in needs.values())


def test_like_lengths_go_together() -> None:
    needs: dict[Hashable, Need] = {"a": Need(10, 8), "b": Need(13, 8), "c": Need(60, 8), "d": Need(10, 2)}
    options = {"most_sequences": 4, "pass_tokens": 100}
    assert in_groups(needs, **options, equal_prompts=False) == [["d", "a", "b"], ["c"]]
    assert in_groups(needs, **options, equal_prompts=True) == [["d", "a"], ["b"], ["c"]]
    assert in_groups(needs, most_sequences=4, pass_tokens=20, equal_prompts=False) == [["d", "a"], ["b"], ["c"]]
    assert size_of([needs["a"], needs["b"]]) == Group(2, 10, 20)


def test_a_packing_in_groups_fits_and_is_forecast_as_it_is_played() -> None:
    needs = needs_of(50)
    for extra in (0, 4 << 20):
        asked = scenario(smallest() + extra)
        packing, candidate, played = choose_packing(asked, COSTS, needs, {}, filling=Filling.GROUPS)
        assert candidate.plan.memory.total_bytes <= asked.budget_bytes
        times = PassTimes(SPEC, candidate.plan, RATES, COSTS, pass_tokens=packing.pass_tokens)
        assert forecast(needs, {}, packing, times) == played
        assert played.passes == packing.group_passes
        assert played.generated_tokens == sum(need.new_tokens for need in needs.values())


def test_memory_is_that_of_the_largest_group() -> None:
    def held(*groups: Group) -> int:
        return MemoryAccount(replace(scenario(1), packed=Grouped(groups))).without_blocks_bytes

    small, large = Group(2, 8, 20), Group(16, 30, 4000)
    assert held(small) < held(large) == held(small, large)
