"""Compare the ways to run a model by simulated time, and take the fastest that fits.

A block lives in the device's memory, in host memory (copied in every pass), on the disk (read and, to an accelerator,
copied in every pass) or, computed by the CPU for an accelerator, in host memory for good. Where the host's CPU
computes, all numbers of residents are tried, but for those that a lower bound shows to be slower. On an accelerator
there are far too many arrangements to simulate them all: they are ranked by that bound, and the best are simulated,
then those that differ from the best of these a little. The simplest rule, to fill the device's memory and to stream the
rest through as few slots as can be, is always among them, and so is everything without layers of the CPU. So is what a
smaller budget allows, so more memory does not make a plan slower.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from headrace.errors import BudgetError, HeadraceError, MachineError
from headrace.planning.infeasible import described_refusal, lack_of, refusal
from headrace.planning.memory import ArrangedMemory, MemoryAccount, described_memory
from headrace.planning.pass_times import LowerBound
from headrace.planning.placements import (
    SPREAD_RULES,
    SpreadRule,
    all_arrangements,
    arrangements,
    cpu_layer_counts,
    first,
    resident_choices,
    slot_counts_of,
    smallest_arrangements,
    stores,
    two_slots_bytes,
)
from headrace.planning.plan import TRAVELLING, Arrangement, Placement, Plan
from headrace.planning.prediction import Candidate, first_pass_s, predict
from headrace.planning.scenario import Scenario
from headrace.planning.splits import candidates
from headrace.planning.strategies import RUNNABLE, Strategy

BLOCKS_SIMULATED = 1000
"""Plans of so many blocks in all are simulated in a round, but MIN_SIMULATED plans in any case."""

MIN_SIMULATED = 12

ROUNDS_OF_VARIATION = 2
"""of looking for something better that is like the best so far"""

RESIDENTS_VARIED = 5
"""numbers of residents that are tried in variations: the best arrangement's own, and so many less one below that"""

MARGIN = 0.02
"""by which a plan with more moving parts must be faster to be recommended"""

_SAME = 1 - 1e-9
"""Times that differ by less are equal: of equals the first, that is the simplest, is taken."""


def plan_strategy(scenario: Scenario, strategy: Strategy) -> Candidate:
    """Return the fastest plan of one strategy.

    Raises BudgetError, with the smallest budget of the device or of the host that would suffice, when none fits.
    """
    if not scenario.is_calibrated or strategy not in RUNNABLE:
        return _described(scenario, strategy)
    return _plan_strategy(_account(scenario), strategy)


def plan_fastest(scenario: Scenario) -> Candidate:
    """Return the recommended plan of what the runtime runs; raises BudgetError when not even the smallest fits."""
    account = _account(scenario)
    found: list[Candidate] = []
    than_s = math.inf
    for strategy in RUNNABLE:
        candidate = _Search(account, strategy).best(than_s)
        if candidate is not None:
            found.append(candidate)
            if not moving_parts(candidate.plan):  # what moves anything must be faster by the margin
                than_s = candidate.prediction.total_s * (1 - MARGIN)
    best = simplest_of_the_fast(found)
    if best is None:
        raise refusal(account, None)
    return best


Compared = Mapping[Strategy, Candidate | BudgetError]


def compare(scenario: Scenario, only: Strategy | None = None) -> Compared:
    """Every strategy's fastest plan, or why there is none; on measured hardware of those that the runtime runs."""
    strategies = RUNNABLE if scenario.is_calibrated else tuple(Strategy)
    account = _account(scenario) if scenario.is_calibrated else None
    found: dict[Strategy, Candidate | BudgetError] = {}
    for strategy in strategies if only is None else (only,):
        try:
            if account is not None and strategy in RUNNABLE:
                found[strategy] = _plan_strategy(account, strategy)
            else:
                found[strategy] = _described(scenario, strategy)
        except BudgetError as error:
            found[strategy] = error
    return found


def _account(scenario: Scenario) -> MemoryAccount:
    """Count once for all strategies; without what the CPU could compute where that was not measured."""
    if scenario.known_rates.cpu_layer is None:
        scenario = replace(scenario, allow_cpu=False)
    return MemoryAccount(scenario)


def _plan_strategy(account: MemoryAccount, strategy: Strategy) -> Candidate:
    best = _Search(account, strategy).best()
    if best is None:
        raise refusal(account, strategy)
    return best


def recommended(compared: Compared) -> Candidate | None:
    """The fastest by the time of the whole work: a plan with more moving parts must win by more than MARGIN."""
    return simplest_of_the_fast(item for item in compared.values() if isinstance(item, Candidate))


def simplest_of_the_fast(candidates: Iterable[Candidate]) -> Candidate | None:
    """The fastest, where more moving parts, and then more devices, are worth it."""
    best: Candidate | None = None
    for item in sorted(candidates, key=lambda each: (moving_parts(each.plan), each.plan.parallelism.devices)):
        if best is None or item.prediction.total_s < best.prediction.total_s * _needed(item.plan, best.plan):
            best = item
    return best


def _needed(plan: Plan, other: Plan) -> float:
    """Share of the other plan's time that this one may take at most, to be preferred."""
    return _SAME if moving_parts(plan) == moving_parts(other) else 1 - MARGIN


def moving_parts(plan: Plan) -> int:
    """Things that a plan does beyond computing with resident weights."""
    divided = plan.parallelism
    return sum(
        (
            Placement.HOST in plan.placements,
            Placement.DISK in plan.placements,
            Placement.CPU in plan.placements,
            plan.cache_on_host,
            plan.expert_hit_rate is not None,
            divided.tensor > 1,
            divided.two_dimensional,
            divided.pipeline > 1,
            divided.sharded,
        )
    )


def described_plan(scenario: Scenario, strategy: Strategy, arrangement: Arrangement) -> Plan:
    """The plan of an arrangement on a described machine."""
    memory = described_memory(scenario, arrangement)
    layers_bytes = sum(group.count * group.layer.size_bytes for group in scenario.model.groups)
    return _made(
        scenario,
        strategy,
        arrangement,
        memory,
        compute_dtype=scenario.model.weight_format,
        slot_bytes=math.ceil(memory.device.slots_bytes / max(1, arrangement.slots)),
        streamed_bytes=math.ceil(arrangement.streamed_share * layers_bytes),
    )


def _made(
    scenario: Scenario,
    strategy: Strategy,
    arrangement: Arrangement,
    memory: ArrangedMemory,
    *,
    compute_dtype: str,
    slot_bytes: int,
    streamed_bytes: int,
) -> Plan:
    return Plan(
        strategy=strategy,
        device=scenario.device,
        slot_bytes=slot_bytes,
        embedding=memory.embedding,
        compute_dtype=compute_dtype,
        memory=memory.device,
        budget_bytes=scenario.budget_bytes,
        host_memory=memory.host,
        host_budget_bytes=scenario.host_budget_bytes,
        workload=scenario.workload,
        streamed_bytes_per_pass=streamed_bytes,
        disk_bytes=memory.disk_bytes,
        **arrangement._asdict(),
    )


def described_candidates(scenario: Scenario, strategy: Strategy) -> Iterator[Candidate | HeadraceError]:
    """Each arrangement of a described machine with its closed form, or what it lacks: memory, or a link."""
    for arrangement in candidates(scenario, strategy):
        lack = lack_of(scenario, arrangement)
        if lack is not None:
            yield lack
            continue
        plan = described_plan(scenario, strategy, arrangement)
        try:
            yield Candidate(plan, predict(plan, scenario))
        except MachineError as error:
            yield error


def _described(scenario: Scenario, strategy: Strategy) -> Candidate:
    """The best arrangement of a described machine by its closed form."""
    tried = list(described_candidates(scenario, strategy))
    best = simplest_of_the_fast(item for item in tried if isinstance(item, Candidate))
    if best is None:
        raise described_refusal(scenario, strategy, [item for item in tried if not isinstance(item, Candidate)])
    return best


class _Search:
    """The search for the fastest plan of one strategy."""

    def __init__(self, account: MemoryAccount, strategy: Strategy) -> None:
        self.account = account
        self._scenario = scenario = account.scenario
        self._strategy = strategy
        self._round = max(MIN_SIMULATED, BLOCKS_SIMULATED // len(scenario.model.blocks))
        cache_stays = not scenario.allow_host_cache or scenario.budget_bytes >= two_slots_bytes(self.account)
        self._caches = (False,) if cache_stays else (False, True)
        self._bounds = {cache: LowerBound(scenario, strategy, cache_on_host=cache) for cache in self._caches}

    def best(self, than_s: float = math.inf) -> Candidate | None:
        """The fastest, or None where nothing fits or nothing is faster than `than_s`."""
        if self._scenario.on_cpu:
            tried: dict[Arrangement, Candidate] = {}
            self._try(all_arrangements(self.account, self._strategy), tried, than_s)
            return _fastest(tried.values())
        counts = cpu_layer_counts(self.account)
        without = self._among(counts[:1], than_s)
        if len(counts) == 1:
            return without
        if without is not None:
            than_s = min(than_s, without.prediction.total_s)
        own = self._among(self._steps(counts[1:]), than_s)
        return _fastest(found for found in (without, own) if found is not None)

    def _steps(self, counts: range) -> list[int]:
        """Numbers of the CPU's layers to consider: few, about every twelfth, and what takes least memory."""
        if self._strategy is Strategy.RESIDENT:
            return list(counts)
        chosen = set(counts[:4]) | set(counts[3 :: max(1, len(counts) // 12)]) | set(counts[-1:])
        smallest = list(filter(self.account.fits, smallest_arrangements(self.account, self._strategy)))
        if smallest:
            chosen.add(min(smallest, key=self._device_bytes).placements.count(Placement.CPU))
        return sorted(chosen & set(counts))

    def _among(self, counts: Sequence[int], than_s: float) -> Candidate | None:
        """The fastest with one of these numbers of layers computed by the CPU, if it is faster than `than_s`."""
        options: dict[Arrangement, float] = {}
        of_each_kind: dict[tuple[int, SpreadRule], Arrangement] = {}
        slot_counts = slot_counts_of(self._scenario, self._strategy)
        for cache_on_host, number, rule in itertools.product(self._caches, counts, SPREAD_RULES):
            for arrangement in arrangements(
                self.account, slot_counts, cpu_layers=number, cache_on_host=cache_on_host, rules=[rule]
            ):
                if arrangement not in options:
                    options[arrangement] = self._least_s(arrangement)
                rival = of_each_kind.setdefault((arrangement.slots, rule), arrangement)
                if options[arrangement] < options[rival]:
                    of_each_kind[arrangement.slots, rule] = arrangement
        ranked = sorted(options, key=lambda each: (options[each], each.travelling))
        tried = {arrangement: self._simulate(arrangement) for arrangement in self._simplest(counts)}
        self._try([*ranked[: self._round], *of_each_kind.values()], tried, than_s)
        best = _fastest(tried.values())
        for _ in range(ROUNDS_OF_VARIATION if tried else 0):
            like_it = dict.fromkeys(self._varied(next(each for each, found in tried.items() if found is best)))
            self._try(
                sorted(like_it, key=lambda each: (self._least_s(each), each.travelling))[: self._round], tried, than_s
            )
            before, best = best, _fastest(tried.values())
            if best is before:
                break
        return best

    def _simplest(self, counts: Sequence[int]) -> list[Arrangement]:
        """The first blocks stay, the rest goes through as few slots as can be: from host memory, or all from disk."""
        if counts[0] > 0:
            return []
        slot_counts = slot_counts_of(self._scenario, self._strategy)[:1]
        found = arrangements(self.account, slot_counts, cpu_layers=0, cache_on_host=self._caches[0], rules=[first])
        return list(itertools.islice(found, 2))

    def _varied(self, best: Arrangement) -> Iterator[Arrangement]:
        """Arrangements like this one: beginning elsewhere, or with a few residents, stores or CPU layers less.

        Or with more of the latter, since not all numbers of them were considered.
        """
        account, placements = self.account, best.placements
        others = [index for index, placement in enumerate(placements) if placement is not Placement.CPU]
        sizes = [account.block_bytes[index] for index in others]
        stored = placements.count(Placement.HOST) > 0
        most = placements.count(Placement.DEVICE)
        for number in range(most, max(-1, most - (RESIDENTS_VARIED if best.slots else 1)), -1):
            for stays in resident_choices(sizes, number):
                resident = {index for index, flag in zip(others, stays, strict=True) if flag}
                yield from self._with_stores(best, resident, [i for i in others if i not in resident], stored=stored)
        for slots in slot_counts_of(self._scenario, self._strategy):
            if slots <= best.travelling:
                yield from self._that_fit(best._replace(slots=slots))
        *layers, head = placements
        for shift in range(1, min(len(layers), self._round)):
            shifted = best._replace(placements=(*layers[shift:], *layers[:shift], head))
            # Which layers the CPU may compute is settled, for `smallest_arrangements` to know the least memory.
            if Placement.CPU not in layers or self._device_bytes(shifted) == self._device_bytes(best):
                yield from self._that_fit(shifted)
        for index in [index for index, own in enumerate(placements) if own is Placement.HOST][: self._round]:
            fewer_stored = (*placements[:index], Placement.DISK, *placements[index + 1 :])
            yield from self._that_fit(best._replace(placements=fewer_stored))
        travelling = [index for index, placement in enumerate(placements) if placement in TRAVELLING]
        from_disk = [placements[index] is Placement.DISK for index in travelling]
        for shift in range(1, len(travelling) // max(1, sum(from_disk))):
            moved = list(placements)
            for index, flag in zip(travelling, from_disk[shift:] + from_disk[:shift], strict=True):
                moved[index] = Placement.DISK if flag else Placement.HOST
            yield from self._that_fit(best._replace(placements=tuple(moved)))
        counts = cpu_layer_counts(account)
        number = placements.count(Placement.CPU)
        for near in {number + step for step in (-4, -2, -1, 1, 2, 4)} if number else ():
            if near > 0 and near in counts:
                yield from arrangements(account, (best.slots,), cpu_layers=near, cache_on_host=best.cache_on_host)

    def _with_stores(
        self, best: Arrangement, resident: set[int], travelling: list[int], *, stored: bool
    ) -> Iterator[Arrangement]:
        placements = [
            own if own is Placement.CPU else Placement.DEVICE if index in resident else Placement.DISK
            for index, own in enumerate(best.placements)
        ]
        bare = best._replace(placements=tuple(placements))
        room_bytes = self._scenario.host_budget_bytes - self.account.host(bare).total_bytes
        for index in next(stores(self.account, travelling, room_bytes)) if stored else ():
            placements[index] = Placement.HOST
        yield from self._that_fit(best._replace(placements=tuple(placements)))

    def _that_fit(self, arrangement: Arrangement) -> Iterator[Arrangement]:
        if self.account.fits(arrangement):
            yield arrangement

    def _device_bytes(self, arrangement: Arrangement) -> int:
        return self.account.device(arrangement).total_bytes

    def _least_s(self, arrangement: Arrangement) -> float:
        """The lower bound, rounded: equals are ranked by what travels, not by the order in which seconds were added."""
        return float(f"{self._bounds[arrangement.cache_on_host].total_s(arrangement):.11e}")

    def _may_be_faster(self, arrangement: Arrangement, than_s: float) -> bool:
        """By the lower bound; where the first pass is most of the work, by playing that one alone."""
        if self._least_s(arrangement) >= than_s * _SAME:
            return False
        first_s, further_s = self._bounds[arrangement.cache_on_host].parts_s(arrangement)
        if first_s < further_s or than_s == math.inf:
            return True
        return first_pass_s(self._plan(arrangement), self._scenario) + further_s < than_s * _SAME

    def _try(self, chosen: Iterable[Arrangement], tried: dict[Arrangement, Candidate], than_s: float) -> None:
        """Simulate those that may be faster than `than_s` and than what was tried before."""
        fastest_s = min([than_s, *(candidate.prediction.total_s for candidate in tried.values())])
        for arrangement in chosen:
            if arrangement not in tried and self._may_be_faster(arrangement, fastest_s):
                tried[arrangement] = candidate = self._simulate(arrangement)
                fastest_s = min(fastest_s, candidate.prediction.total_s)

    def _simulate(self, arrangement: Arrangement) -> Candidate:
        plan = self._plan(arrangement)
        return Candidate(plan, predict(plan, self._scenario))

    def _plan(self, arrangement: Arrangement) -> Plan:
        account, placements = self.account, arrangement.placements
        return _made(
            self._scenario,
            self._strategy,
            arrangement,
            account.of(arrangement),
            compute_dtype=self._scenario.compute_dtype,
            slot_bytes=account.slot_bytes(placements) if arrangement.slots else 0,
            streamed_bytes=account.streamed_bytes(placements),
        )


def _fastest(candidates: Iterable[Candidate]) -> Candidate | None:
    best: Candidate | None = None
    for candidate in candidates:
        if best is None or candidate.prediction.total_s < best.prediction.total_s * _SAME:
            best = candidate
    return best
