"""How long a job of many requests takes, and how to pack it: sequences in flight, tokens per pass, positions of cache.

The forecast plays the very scheduler that the runtime uses, pass by pass, and gives each pass its time: what its
tokens take to compute at this machine's rates against what the plan streams, by the simulator of passes. The packing is
chosen by a closed form over all that fits the budget, the best few of which are then played through.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from headrace.errors import BudgetError
from headrace.model.model import Model
from headrace.planning.block_times import BlockTimes, distinct_rows
from headrace.planning.infeasible import minimum_bytes, refuse_below_minimum
from headrace.planning.jobs.groups import GroupScheduler, in_groups, size_of
from headrace.planning.jobs.packing import Need, PackedPass, PassScheduler, PositionPool
from headrace.planning.memory import MemoryAccount
from headrace.planning.pass_times import least_s
from headrace.planning.plan import EmbeddingPlacement, Plan
from headrace.planning.planner import plan_fastest, plan_strategy
from headrace.planning.prediction import Candidate
from headrace.planning.rates import Rates
from headrace.planning.scenario import Scenario
from headrace.planning.simulation.one_copy import PassSchedule, pass_seconds
from headrace.planning.strategies import Strategy
from headrace.planning.workload import Group, Grouped, JobMemory, Packed, Workload

MOST_SEQUENCES = 1024
PASS_TOKENS = (16, 32, 64, 128, 256, 512, 1024)
GROUP_TOKENS = (64, 256, 1024)
"""tokens of a group's first pass"""
POSITIONS_SLACK = 1.15
"""ranges of unlike lengths do not fill a pool to the last position"""
PLAYED_TURNS_MAX = 300_000
"""longer jobs are forecast from a part of their sequences"""
PLAYED_PACKINGS = 6
SAME = 1.01


class PassLoad(NamedTuple):
    """What one packed pass asks for."""

    tokens: int
    samples: int
    turns: int
    """sequences in the pass"""
    keys: int
    """positions that are attended to, summed over sequences"""
    products: int
    """queries times keys, summed over sequences with several tokens"""
    idle: int = 0
    """tokens computed for nothing, of rows whose sequence is done"""

    @classmethod
    def of(cls, packed: PackedPass) -> PassLoad:
        """Count a packed pass."""
        tokens = samples = keys = products = 0
        for turn in packed.turns:
            length = turn.first + turn.tokens
            tokens += turn.tokens
            samples += turn.samples
            keys += length
            if turn.tokens > 1:
                products += turn.tokens * length
        return cls(tokens, samples, len(packed.turns), keys, products, packed.idle_tokens)


@dataclass(frozen=True, kw_only=True)
class PackedCosts:
    """Seconds, measured on this machine, of what a packed pass does beside matrix products."""

    turn_s: float
    """per layer and sequence"""
    key_s: float
    """per layer and position that one query attends to"""
    product_s: float
    """per layer, query and key of a chunk"""
    sample_s: float
    """per sampled token, its logits and its text included"""
    bookkeeping_s: float
    """per sequence and pass, outside of the model"""


class Filling(Enum):
    """How passes are filled with tokens of several sequences."""

    RAGGED = "ragged"
    """each with as many as come, laid end to end"""
    GROUPS = "groups"
    """with one token of each in a group, after as many as the shortest prompt has"""
    EQUAL_PROMPTS = "groups of equal prompts"


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a job is packed into passes."""

    sequences: int
    """in flight at most"""
    pass_tokens: int
    """tokens of a pass at most"""
    positions: int
    """of keys and values, in all"""
    filling: Filling = Filling.RAGGED
    groups: tuple[Group, ...] = ()
    """the largest of each number of sequences, where passes are filled with groups"""
    group_passes: int = 0
    """of all groups"""

    def scheduler(self, prefixes: Mapping[Hashable, Need]) -> PassScheduler | GroupScheduler:
        """What fills the passes."""
        if self.filling is Filling.RAGGED:
            return PassScheduler(
                most_sequences=self.sequences,
                pass_tokens=self.pass_tokens,
                pool=PositionPool(self.positions),
                prefixes=prefixes,
            )
        return GroupScheduler(
            most_sequences=self.sequences,
            pass_tokens=self.pass_tokens,
            equal_prompts=self.filling is Filling.EQUAL_PROMPTS,
        )


class JobForecast(NamedTuple):
    """What a job will take."""

    total_s: float
    passes: int
    tokens: int
    """computed, shared beginnings once"""
    generated_tokens: int
    first_pass_s: float

    @property
    def tokens_per_pass(self) -> float:
        """Mean."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def generated_per_s(self) -> float:
        """Answer tokens per second."""
        return self.generated_tokens / self.total_s if self.total_s else 0.0


class PassTimes:
    """Seconds of a packed pass under a plan. Playing passes is slow, so it is done once on a grid of loads."""

    def __init__(self, model: Model, plan: Plan, rates: Rates, costs: PackedCosts, *, pass_tokens: int) -> None:
        self._model, self._rates, self._costs, self._plan = model, rates, costs, plan
        self._layers = sum(block.head_rows is None for block in model.blocks)
        self._products: dict[tuple[int, int], float] = {}
        self.load_s = plan.streamed_bytes_per_pass / rates.read_bytes_per_s
        self._grid: list[tuple[float, float]] = []
        """compute seconds -> seconds of a steady pass"""
        if plan.streamed_blocks:
            counts = sorted({max(1, round(pass_tokens ** (step / 7))) for step in range(8)})
            scales = [1.0] * len(counts) + [4.0]
            for tokens, scale in zip([*counts, counts[-1]], scales, strict=True):
                self._grid.append(self._steady(tokens, scale))
            self._grid.sort()

    def compute_s(self, load: PassLoad) -> float:
        """Seconds to compute a pass, when nothing is waited for."""
        key = (load.tokens + load.idle, load.samples + load.idle)
        products_s = self._products.get(key)
        if products_s is None:
            products_s = sum(self._blocks(key[0], max(1, key[1])))
            self._products[key] = products_s
        costs = self._costs
        rows_s = 0.0
        if self._plan.embedding is EmbeddingPlacement.ROWS:
            rows_s = self._rates.row_s * distinct_rows(self._model.vocab_size, load.tokens)
        attention_s = costs.turn_s * load.turns + costs.key_s * load.keys + costs.product_s * load.products
        outside_s = costs.sample_s * load.samples + costs.bookkeeping_s * load.turns
        return products_s + self._rates.pass_overhead_s + rows_s + self._layers * attention_s + outside_s

    def seconds(self, load: PassLoad) -> float:
        """Seconds of a pass among others like it."""
        compute_s = self.compute_s(load)
        if not self._grid:
            return compute_s
        place = min(max(1, bisect.bisect_left(self._grid, (compute_s, 0.0))), len(self._grid) - 1)
        (low, low_s), (high, high_s) = self._grid[place - 1], self._grid[place]
        if high <= low:
            return max(high_s, compute_s)
        share = max(0.0, (compute_s - low) / (high - low))
        return max(low_s + share * (high_s - low_s), compute_s)

    def first_s(self, load: PassLoad) -> float:
        """Seconds of the first pass, which also brings what stays."""
        whole = sum(block.read_bytes for block in self._model.blocks) / self._rates.read_bytes_per_s
        slowdowns = self._rates.read_slowdown, self._rates.compute_slowdown
        return max(self.seconds(load), least_s(whole, self.compute_s(load), *slowdowns))

    def _blocks(self, tokens: int, samples: int) -> list[float]:
        return [self._rates.block_seconds(block, tokens=tokens, head_tokens=samples) for block in self._model.blocks]

    def _steady(self, tokens: int, scale: float) -> tuple[float, float]:
        blocks = [seconds * scale for seconds in self._blocks(tokens, tokens)]
        reads = [block.read_bytes / self._rates.read_bytes_per_s for block in self._model.blocks]
        rates = self._rates
        schedule = PassSchedule(
            blocks=tuple(BlockTimes(read_s, time_s, time_s) for read_s, time_s in zip(reads, blocks, strict=True)),
            placements=self._plan.placements,
            slots=self._plan.slots,
            overlap=self._plan.strategy is not Strategy.SEQUENTIAL,
            decode_passes=5,
            pass_overhead_s=rates.pass_overhead_s,
            compute_slowdown=rates.compute_slowdown,
            read_slowdown=rates.read_slowdown,
            read_latency_s=rates.read_latency_s,
            stall_penalty_s=rates.stall_penalty_s,
        )
        return sum(blocks) + rates.pass_overhead_s, pass_seconds(schedule).decode_s_per_pass


def forecast(
    needs: Mapping[Hashable, Need],
    prefixes: Mapping[Hashable, Need],
    packing: Packing,
    times: PassTimes,
    *,
    answer_share: float = 1.0,
) -> JobForecast:
    """Play a job. `answer_share`: how much of the tokens that they may have answers use, on average."""
    part, scale = _part_of(needs)
    scheduler = packing.scheduler(prefixes)
    for key in longest_first(part):
        scheduler.add(key, part[key])
    total_s = first_s = 0.0
    passes = tokens = generated = 0
    while (packed := scheduler.pack()) is not None:
        load = PassLoad.of(packed)
        seconds = times.seconds(load)
        if not passes:
            seconds = first_s = times.first_s(load)
        total_s, passes = total_s + seconds, passes + 1
        tokens, generated = tokens + load.tokens, generated + load.samples
        scheduler.advance()
        if answer_share < 1:
            for turn in packed.turns:
                if turn.samples:
                    asked = part[turn.key]
                    produced = turn.first + turn.tokens - asked.prompt_tokens + 1
                    if produced >= asked.new_tokens * answer_share:
                        scheduler.finish(turn.key)
    steady_s = (total_s - first_s) * scale
    return JobForecast(
        first_s + steady_s, round(passes * scale), round(tokens * scale), round(generated * scale), first_s
    )


def choose_packing(
    scenario: Scenario,
    costs: PackedCosts,
    needs: Mapping[Hashable, Need],
    prefixes: Mapping[Hashable, Need],
    *,
    sequences: int | None = None,
    pass_tokens: int | None = None,
    strategy: Strategy | None = None,
    answer_share: float = 1.0,
    filling: Filling = Filling.RAGGED,
) -> tuple[Packing, Candidate, JobForecast]:
    """Return the packing and the plan with the shortest forecast.

    `sequences` and `pass_tokens` fix what the user decided. Raises BudgetError where no packing fits.
    """
    scenario = scenario.without_layer
    rates = scenario.known_rates
    packings = _packings(needs, sequences, pass_tokens, filling)
    fitting = []
    for packing in packings:
        asked = _packed(scenario, packing, needs, packing.sequences, 2)
        if minimum_bytes(asked, strategy) <= scenario.budget_bytes:
            fitting.append((_rough_s(asked, packing, costs, needs), packing))
    if not fitting:
        smallest = min(packings, key=lambda item: (item.positions, item.pass_tokens))
        asked = _packed(scenario, smallest, needs, 1, 2)
        refuse_below_minimum(asked, strategy)
        raise BudgetError("no packing of this job fits the budget")
    fitting.sort(key=lambda item: (item[0], item[1].positions))
    best: tuple[Packing, Candidate, JobForecast] | None = None
    for _, packing in fitting[:PLAYED_PACKINGS]:
        passes, mean_tokens = _rough_passes(packing, needs)
        asked = _packed(scenario, packing, needs, max(1, round(mean_tokens)), max(2, round(passes)))
        found = plan_fastest(asked) if strategy is None else plan_strategy(asked, strategy)
        times = PassTimes(scenario.model, found.plan, rates, costs, pass_tokens=packing.pass_tokens)
        played = forecast(needs, prefixes, packing, times, answer_share=answer_share)
        if best is None or played.total_s * SAME < best[2].total_s:
            best = packing, found, played
    assert best is not None
    return best


def least_memory(needs: Mapping[Hashable, Need], pass_tokens: int | None, filling: Filling) -> JobMemory:
    """What passes must hold at least."""
    longest = max(need.positions for need in needs.values())
    tokens = min(16, pass_tokens or 16)
    if filling is Filling.RAGGED:
        return Packed(positions=longest, pass_tokens=tokens, samples=1, longest=longest)
    alone = Packing(sequences=1, pass_tokens=tokens, positions=longest, filling=filling)
    return Grouped(_with_groups(alone, needs).groups)


def _packings(
    needs: Mapping[Hashable, Need], sequences: int | None, pass_tokens: int | None, filling: Filling
) -> list[Packing]:
    count = len(needs)
    positions = [need.positions for need in needs.values()]
    largest, mean, total = max(positions), sum(positions) / count, sum(positions)
    most = min(MOST_SEQUENCES, count)
    in_flight = (
        [min(sequences, count)]
        if sequences is not None
        else sorted({min(2**power, most) for power in range(math.ceil(math.log2(most)) + 1)} | {most})
    )
    packings = []
    for number in in_flight:
        held = min(total, max(largest, math.ceil(number * mean * POSITIONS_SLACK)))
        usual = PASS_TOKENS if filling is Filling.RAGGED else GROUP_TOKENS
        wanted = (pass_tokens,) if pass_tokens is not None else usual
        for tokens in sorted({max(number, item) for item in wanted}):
            packing = Packing(sequences=number, pass_tokens=tokens, positions=held, filling=filling)
            packings.append(packing if filling is Filling.RAGGED else _with_groups(packing, needs))
    return packings


def _with_groups(packing: Packing, needs: Mapping[Hashable, Need]) -> Packing:
    """The packing with what its groups take."""
    keys = in_groups(
        needs,
        most_sequences=packing.sequences,
        pass_tokens=packing.pass_tokens,
        equal_prompts=packing.filling is Filling.EQUAL_PROMPTS,
    )
    sizes = [size_of(needs[key] for key in group) for group in keys]
    largest: dict[int, Group] = {}
    for size in sizes:
        other = largest.get(size.sequences, size)
        first, positions = max(size.first_tokens, other.first_tokens), max(size.positions, other.positions)
        largest[size.sequences] = Group(size.sequences, first, positions)
    return replace(
        packing,
        positions=max(group.sequences * group.positions for group in sizes),
        groups=tuple(largest.values()),
        group_passes=sum(group.passes for group in sizes),
    )


def _packed(scenario: Scenario, packing: Packing, needs: Mapping[Hashable, Need], tokens: int, passes: int) -> Scenario:
    longest = max(need.positions for need in needs.values())
    return replace(
        scenario,
        workload=Workload(sequences=tokens, prompt_tokens=1, generate_tokens=passes),
        packed=Grouped(packing.groups)
        if packing.groups
        else Packed(
            positions=packing.positions, pass_tokens=packing.pass_tokens, samples=packing.sequences, longest=longest
        ),
    )


def _rough_passes(packing: Packing, needs: Mapping[Hashable, Need]) -> tuple[float, float]:
    """Number of passes and mean tokens of one: answers go on abreast, and the last ones alone."""
    new = [need.new_tokens for need in needs.values()]
    computed = sum(need.prompt_tokens - need.prefix_tokens for need in needs.values()) + sum(new)
    if packing.groups:
        return float(packing.group_passes), computed / packing.group_passes
    passes = max(sum(new) / packing.sequences + 0.5 * max(new) * (len(new) > packing.sequences), float(max(new)))
    passes = max(passes, computed / packing.pass_tokens)
    return passes, computed / passes


def _rough_s(asked: Scenario, packing: Packing, costs: PackedCosts, needs: Mapping[Hashable, Need]) -> float:
    model, rates = asked.model, asked.known_rates
    sizes = [block.read_bytes for block in model.blocks]
    room = asked.budget_bytes - MemoryAccount(asked).without_blocks_bytes
    streamed = 0 if sum(sizes) <= room else min(sum(sizes), sum(sizes) - (room - 2 * max(sizes)))
    passes, tokens = _rough_passes(packing, needs)
    layers = sum(block.head_rows is None for block in model.blocks)
    in_flight = min(packing.sequences, len(needs))
    keys = sum(need.positions for need in needs.values()) / len(needs) * 0.75
    compute_s = sum(
        rates.block_seconds(block, tokens=tokens, head_tokens=in_flight) for block in model.blocks
    ) + layers * in_flight * (costs.turn_s + costs.key_s * keys)
    compute_s += rates.pass_overhead_s + in_flight * (costs.sample_s + costs.bookkeeping_s)
    return passes * least_s(streamed / rates.read_bytes_per_s, compute_s, rates.read_slowdown, rates.compute_slowdown)


def _part_of(needs: Mapping[Hashable, Need]) -> tuple[Mapping[Hashable, Need], float]:
    """A part of a long job that can be played in a moment, and by how much the whole is longer."""
    turns = sum(need.new_tokens for need in needs.values())
    if turns <= PLAYED_TURNS_MAX:
        return needs, 1.0
    # Drawn at random, the same in every start: files have patterns that every n-th line would hit or miss.
    drawn = random.Random(0).sample(list(needs), max(1, len(needs) * PLAYED_TURNS_MAX // turns))
    part = {key: needs[key] for key in drawn}
    return part, turns / sum(need.new_tokens for need in part.values())


def longest_first(needs: Mapping[Hashable, Need]) -> Sequence[Hashable]:
    """The order in which sequences are best begun: long answers first, so that the end is not one of them alone."""
    return sorted(needs, key=lambda key: -needs[key].new_tokens)
