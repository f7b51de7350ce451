"""Rectangular passes: one group of sequences after another, all of a group at the same position in every pass.

For models whose tokens cannot be laid end to end. Nothing is padded: a group's first pass computes as many tokens of
each prompt as the shortest has, and longer prompts go on token by token beside the answers of the others. The interface
is that of `PassScheduler`, and runtime and prediction fill the same passes here too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from headrace.planning.jobs.packing import Need, PackedPass, Turn
from headrace.planning.workload import Group

NOBODY = Group(0, 0, 0)


def in_groups(
    needs: Mapping[Hashable, Need], *, most_sequences: int, pass_tokens: int, equal_prompts: bool
) -> list[list[Hashable]]:
    """Put sequences of like lengths together.

    A prompt longer than the first of its group joins where that takes no more passes than a group of its own would.
    """
    groups: list[list[Hashable]] = []
    shortest = end = room = 0
    for key in sorted(needs, key=lambda key: needs[key][:2]):
        need = needs[key]
        joins = need.prompt_tokens == shortest or (not equal_prompts and need.positions - end <= need.new_tokens)
        if groups and joins and len(groups[-1]) < room:
            groups[-1].append(key)
            end = max(end, need.positions)
        else:
            groups.append([key])
            shortest, end = need.prompt_tokens, need.positions
            room = min(most_sequences, max(1, pass_tokens // shortest))
    return groups


def size_of(needs: Iterable[Need]) -> Group:
    """What a group of these sequences takes."""
    members = list(needs)
    return Group(len(members), min(need.prompt_tokens for need in members), max(need.positions for need in members))


@dataclass(kw_only=True)
class GroupScheduler:
    """Fills passes with groups of at most `most_sequences`, whose first pass has `pass_tokens` tokens or one prompt.

    In a turn, `start` is the sequence's row in its group. Rows whose sequence is done are computed for nothing until
    the group ends. `equal_prompts`: only prompts of one length share a group, for models that compute prompts whole.
    """

    most_sequences: int
    pass_tokens: int
    equal_prompts: bool = False
    _needs: dict[Hashable, Need] = field(default_factory=dict)
    _groups: deque[list[Hashable]] | None = None
    _rows: dict[Hashable, int] = field(default_factory=dict)
    """of the present group's sequences that are not done"""
    _size: Group = NOBODY
    _computed: int = 0
    """tokens of each of its sequences"""
    _packed: PackedPass | None = None

    def add(self, key: Hashable, need: Need) -> None:
        """Let a sequence wait for its turn; all have to be added before the first pass."""
        assert self._groups is None, "a sequence was added after the first pass"
        self._needs[key] = need

    def pack(self) -> PackedPass | None:
        """The next pass, or None when all is done. `advance` must follow before the next `pack`."""
        assert self._packed is None, "a pass was packed and not advanced"
        if not self._rows and not self._begin_group():
            return None
        first, tokens = self._computed, 1 if self._computed else self._size.first_tokens
        turns = [
            Turn(key, first, tokens, row, samples=first + tokens >= self._needs[key].prompt_tokens)
            for key, row in self._rows.items()
        ]
        self._packed = PackedPass([], turns, idle_tokens=(self._size.sequences - len(turns)) * tokens)
        return self._packed

    def advance(self) -> None:
        """The pass that was packed is computed. Sequences that have all their tokens are done."""
        assert self._packed is not None, "there is no pass to advance"
        self._computed += self._packed.turns[0].tokens
        for turn in self._packed.turns:
            if self._computed >= self._needs[turn.key].positions:
                self.finish(turn.key)
        self._packed = None

    def finish(self, key: Hashable) -> None:
        """A sequence is done, perhaps before it has all tokens that it may have."""
        self._rows.pop(key, None)

    def _begin_group(self) -> bool:
        if self._groups is None:
            self._groups = deque(
                in_groups(
                    self._needs,
                    most_sequences=self.most_sequences,
                    pass_tokens=self.pass_tokens,
                    equal_prompts=self.equal_prompts,
                )
            )
        if not self._groups:
            return False
        group = self._groups.popleft()
        self._rows = {key: row for row, key in enumerate(group)}
        self._size = size_of(self._needs[key] for key in group)
        self._computed = 0
        return True
