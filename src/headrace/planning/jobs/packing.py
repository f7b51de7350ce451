"""Which tokens a pass carries: every sequence in flight one token, prompts in chunks in the room that is left.

One scheduler, used by the runtime and by the prediction of a job, so that both pack the same passes. It knows numbers
of tokens only. Keys and values of a sequence lie together in one range of a pool of positions, reserved for its whole
length when it is admitted: so nobody who was admitted is ever thrown out again, and who does not fit waits.

A *prefix* is the common beginning of several sequences. It is computed once, as a sequence that samples nothing, and
copied into the range of each that begins with it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.errors import BudgetError


class Need(NamedTuple):
    """What one sequence asks for, in tokens. `new_tokens` 0 is a prefix, which is computed and kept."""

    prompt_tokens: int
    new_tokens: int
    prefix: Hashable | None = None
    """the prefix that it begins with"""
    prefix_tokens: int = 0
    anew_at: int = 0
    """tokens that it may grow to before its keys and values are all computed anew; 0: never"""

    @property
    def positions(self) -> int:
        """Positions of the pool it takes; the last token that is generated is never fed back."""
        return self.prompt_tokens + max(0, self.new_tokens - 1)


class Copy(NamedTuple):
    """Positions [source, source + tokens) of the pool go to [target, target + tokens), before the pass."""

    source: int
    target: int
    tokens: int


class Turn(NamedTuple):
    """What one sequence puts into a pass: tokens [first, first + tokens) of itself; position 0 lies at `start`."""

    key: Hashable
    first: int
    tokens: int
    start: int
    samples: bool
    """whether the last of these tokens yields a new one"""
    whole: int = 0
    """tokens that the sequence is computed with: its prompt's, or all that it had when it was computed anew"""


class PackedPass(NamedTuple):
    """One pass over the weights."""

    copies: list[Copy]
    turns: list[Turn]
    idle_tokens: int = 0
    """computed for nothing beside those of the turns, of rows whose sequence is done"""

    @property
    def tokens(self) -> int:
        """Tokens of the pass."""
        return sum(turn.tokens for turn in self.turns)


class PositionPool:
    """Ranges of [0, size), first fit; free neighbours are joined. Free and held always add up to the size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)] if size else []
        self._held: dict[int, int] = {}

    @property
    def held(self) -> int:
        """Positions that are taken."""
        return sum(self._held.values())

    def take(self, count: int) -> int | None:
        """The beginning of a free range of `count` positions; None where there is none."""
        for number, (start, length) in enumerate(self._free):
            if length >= count:
                if length == count:
                    del self._free[number]
                else:
                    self._free[number] = (start + count, length - count)
                self._held[start] = count
                return start
        return None

    def give_back(self, start: int) -> None:
        """Free a range that `take` returned."""
        self._free.append((start, self._held.pop(start)))
        self._free.sort()
        joined: list[tuple[int, int]] = []
        for begin, length in self._free:
            if joined and joined[-1][0] + joined[-1][1] == begin:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((begin, length))
        self._free = joined

    def check(self) -> None:
        """Raise AssertionError unless free and held ranges cover the pool exactly once."""
        ranges = sorted([*self._free, *self._held.items()])
        edge = 0
        for start, length in ranges:
            assert start == edge, "ranges of the pool overlap or leave a gap"
            assert length > 0, "an empty range"
            edge += length
        assert edge == self.size, "free and held positions do not add up"


@dataclass(eq=False)
class _Admitted:
    """A sequence with a range of the pool. `known` tokens of it exist, `cached` of them have keys and values."""

    key: Hashable
    need: Need
    start: int
    cached: int = 0
    known: int = 0
    waits_for: Hashable | None = None

    def compute_anew(self) -> None:
        """Let all tokens so far be a prompt that is still to be computed."""
        left = self.need.new_tokens - (self.known - self.need.prompt_tokens)
        self.need = self.need._replace(prompt_tokens=self.known, new_tokens=left)
        self.cached = 0


@dataclass(kw_only=True)
class PassScheduler:
    """Packs passes of at most `pass_tokens` tokens with at most `most_sequences` sequences in flight.

    `prefixes` says what the common beginnings are. Sequences are admitted in the order in which they were added.
    """

    most_sequences: int
    pass_tokens: int
    pool: PositionPool
    prefixes: Mapping[Hashable, Need] = field(default_factory=dict)
    _waiting: deque[tuple[Hashable, Need]] = field(default_factory=deque)
    _running: dict[Hashable, _Admitted] = field(default_factory=dict)
    _kept: dict[Hashable, _Admitted] = field(default_factory=dict)
    _users: Counter[Hashable] = field(default_factory=Counter)
    _packed: PackedPass | None = None

    def __post_init__(self) -> None:
        if self.most_sequences < 1 or self.pass_tokens < self.most_sequences:
            raise ValueError(f"{self.most_sequences} sequences do not fit into passes of {self.pass_tokens} tokens")
        for need in self.prefixes.values():
            if need.prefix is not None:
                self._users[need.prefix] += 1

    @property
    def in_flight(self) -> int:
        """Sequences that are being computed; prefixes do not count."""
        return sum(item.need.new_tokens > 0 for item in self._running.values())

    @property
    def waiting(self) -> int:
        """Sequences that were not admitted yet."""
        return len(self._waiting)

    def add(self, key: Hashable, need: Need) -> None:
        """Let a sequence wait for its turn; raises BudgetError for one that the pool could never hold."""
        if need.positions > self.pool.size:
            raise BudgetError(
                f"{need.prompt_tokens} + {need.new_tokens} tokens need {need.positions} positions of KV cache; "
                f"there are {self.pool.size}"
            )
        if need.prefix is not None and need.prefix in self.prefixes:
            self._users[need.prefix] += 1
        else:
            need = need._replace(prefix=None, prefix_tokens=0)
        self._waiting.append((key, need))

    def pack(self) -> PackedPass | None:
        """The next pass, or None when all is done. `advance` must follow before the next `pack`."""
        assert self._packed is None, "a pass was packed and not advanced"
        self._admit()
        copies = self._copies()
        turns: list[Turn] = []
        room = self.pass_tokens
        for item in self._running.values():  # first those that generate: they are never held up
            if item.waits_for is None and item.cached == item.known - 1 and item.cached >= item.need.prompt_tokens:
                turns.append(Turn(item.key, item.cached, 1, item.start, samples=True, whole=item.known))
                room -= 1
        for item in self._running.values():
            if room <= 0:
                break
            if item.waits_for is None and item.cached < item.need.prompt_tokens:
                tokens = min(room, item.need.prompt_tokens - item.cached)
                ends = item.cached + tokens == item.need.prompt_tokens
                samples = ends and item.need.new_tokens > 0
                whole = item.need.prompt_tokens
                turns.append(Turn(item.key, item.cached, tokens, item.start, samples=samples, whole=whole))
                room -= tokens
        if not turns:
            assert not self._waiting, "sequences wait although nothing is in flight"
            assert not self._running, "sequences in flight have nothing to compute"
            self._forget_prefixes()
            return None
        self._packed = PackedPass(copies, turns)
        return self._packed

    def advance(self) -> None:
        """The pass that was packed is computed. Sequences that have all their tokens give their range back."""
        assert self._packed is not None, "there is no pass to advance"
        for turn in self._packed.turns:
            item = self._running.get(turn.key)
            if item is None:
                continue
            item.cached += turn.tokens
            if turn.samples:
                item.known = item.cached + 1
                if item.known - item.need.prompt_tokens >= item.need.new_tokens:
                    self.finish(turn.key)
                elif item.known == item.need.anew_at:
                    item.compute_anew()
            elif item.need.new_tokens == 0 and item.cached == item.need.prompt_tokens:
                self._kept[turn.key] = self._running.pop(turn.key)
        self._packed = None

    def finish(self, key: Hashable) -> None:
        """A sequence is done before it has all tokens that it may have; one that is done already stays so."""
        item = self._running.pop(key, None)
        if item is not None:
            self.pool.give_back(item.start)

    def _admit(self) -> None:
        in_flight = self.in_flight
        while self._waiting and in_flight < self.most_sequences:
            key, need = self._waiting[0]
            shared = self._with_prefix(need)
            if shared is None or not self._place(key, shared):
                if self._running or not self._forget_prefixes():
                    return
                continue
            self._waiting.popleft()
            in_flight += 1

    def _with_prefix(self, need: Need) -> Need | None:
        """See to it that a sequence's prefix is there or on its way, or let it do without; None: it has to wait."""
        prefix = need.prefix
        if prefix is None or prefix in self._kept or prefix in self._running:
            return need
        wanted = self.prefixes[prefix]
        if self._users[prefix] > 1 and wanted.positions + need.positions <= self.pool.size:
            own = self._with_prefix(wanted)
            if own is not None and self._place(prefix, own):
                return need
            if self._running:
                return None
        self._users[prefix] -= 1
        alone = need._replace(prefix=None, prefix_tokens=0)
        if self._waiting and self._waiting[0][1] is need:
            self._waiting[0] = (self._waiting[0][0], alone)
        return alone

    def _place(self, key: Hashable, need: Need) -> bool:
        start = self.pool.take(need.positions)
        if start is None:
            return False
        self._running[key] = _Admitted(key, need, start, known=need.prompt_tokens, waits_for=need.prefix)
        return True

    def _copies(self) -> list[Copy]:
        """Let those go on whose prefix is there; a prefix without further users gives its range back."""
        copies = []
        for item in self._running.values():
            if item.waits_for is not None and item.waits_for in self._kept:
                source = self._kept[item.waits_for]
                copies.append(Copy(source.start, item.start, item.need.prefix_tokens))
                item.cached = item.need.prefix_tokens
                self._users[item.waits_for] -= 1
                item.waits_for = None
        for key in [key for key in self._kept if self._users[key] <= 0]:
            # The copies above are made before the pass, and the range's next sequence writes to it in a later one.
            self.pool.give_back(self._kept.pop(key).start)
        return copies

    def _forget_prefixes(self) -> bool:
        """Make room by giving up prefixes that are kept for later; whether there were any."""
        found = bool(self._kept)
        for key in list(self._kept):
            self.pool.give_back(self._kept.pop(key).start)
        return found
