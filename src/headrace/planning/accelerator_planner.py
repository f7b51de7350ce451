"""Compare the ways to run a model on an accelerator by simulated time, and take the fastest that fits both budgets.

A block lives in the device's memory, in host memory (copied in every pass), on the disk (read and copied in every pass)
or, computed by the processor, in host memory for good. There are far too many arrangements to simulate them all: they
are ranked by the longest of what a pass needs of each resource, and the best are simulated, then those that differ from
the best of these a little. The simplest rule, to fill the device's memory and to stream the rest through two slots, is
always among them, and so is everything without the processor where that may compute.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from headrace.errors import BudgetError
from headrace.planning.accelerator_arrangements import (
    SPREAD_RULES,
    SpreadRule,
    arrangements,
    cpu_layer_counts,
    first,
    slot_counts_of,
    smallest_placements,
    stores,
    two_slots_bytes,
)
from headrace.planning.accelerator_floor import AcceleratorFloor
from headrace.planning.accelerator_memory import AcceleratorRequest, Arrangement, slot_bytes
from headrace.planning.accelerator_pace import AcceleratorPace, predict_on_accelerator
from headrace.planning.plan import TRAVELLING, AcceleratorPlan, Placement, Plan, Strategy
from headrace.planning.planner import Candidate, placements
from headrace.units import format_bytes

BLOCKS_SIMULATED = 1000
"""Plans of so many blocks in all are simulated in a round, but LEAST_SIMULATED plans in any case."""

LEAST_SIMULATED = 12

ROUNDS_OF_VARIATION = 2
"""of looking for something better that is like the best so far"""

RESIDENTS_VARIED = 5
"""numbers of residents that are tried in variations: the best arrangement's own, and so many less one below that"""

_SAME = 1 - 1e-9
"""Times that differ by less are equal: of equals the first, that is the simplest, is taken."""


def minimum_bytes_on_accelerator(request: AcceleratorRequest, strategy: Strategy | None = None) -> int:
    """The least memory of the device in which this model can do this work, by one strategy or at all.

    With the host memory that there is, and layers computed by the processor where the request allows them; raises
    BudgetError where the host has too little for any plan.
    """
    least = _least(request, strategy)
    if least is None:
        raise _refusal(request, strategy)
    return least.device_bytes


def refuse_below_minimum_on_accelerator(request: AcceleratorRequest, strategy: Strategy | None) -> None:
    """Raise BudgetError, with the smallest budget that would do (of the device, or of the host), when nothing fits."""
    least = _least(request, strategy)
    if least is None or least.device_bytes > request.budget_bytes:
        raise _refusal(request, strategy)


def plan_on_accelerator(request: AcceleratorRequest, strategy: Strategy, pace: AcceleratorPace) -> Candidate:
    """Return the fastest plan of one strategy.

    Raises BudgetError, with the smallest budget that would do (of the device, or of the host), when none fits.
    """
    if pace.processor_layer is None:
        request = replace(request, allow_cpu=False)
    best = _Search(request, strategy, pace).best()
    if best is None:
        raise _refusal(request, strategy)
    return best


def plan_fastest_on_accelerator(request: AcceleratorRequest, pace: AcceleratorPace) -> Candidate:
    """Return the fastest plan of any strategy; raises BudgetError when not even the smallest fits."""
    if pace.processor_layer is None:
        request = replace(request, allow_cpu=False)
    found = [_Search(request, strategy, pace).best() for strategy in Strategy]
    best = _fastest(candidate for candidate in found if candidate is not None)
    if best is None:
        raise _refusal(request, None)
    return best


class _Search:
    """The search for the fastest plan of one strategy."""

    def __init__(self, request: AcceleratorRequest, strategy: Strategy, pace: AcceleratorPace) -> None:
        self._request = request
        self._strategy = strategy
        self._pace = pace
        self._round = max(LEAST_SIMULATED, BLOCKS_SIMULATED // len(request.model.blocks))
        fits_all = not request.allow_host_cache or request.budget_bytes >= two_slots_bytes(request)
        self._caches = (False,) if fits_all else (False, True)
        self._floors = {
            cache: AcceleratorFloor.of(request, strategy, pace, cache_on_host=cache) for cache in self._caches
        }

    def best(self) -> Candidate | None:
        """The fastest, or None where nothing fits."""
        counts = cpu_layer_counts(self._request)
        without = self._among(counts[:1], math.inf)
        if len(counts) == 1:
            return without
        than_s = math.inf if without is None else without.prediction.total_s
        own = self._among(self._steps(counts[1:]), than_s)
        return _fastest(found for found in (without, own) if found is not None)

    def _steps(self, counts: range) -> list[int]:
        """Numbers of the processor's layers to consider: few, about every twelfth, and what takes least memory."""
        if self._strategy is Strategy.RESIDENT:
            return list(counts)
        chosen = set(counts[:4]) | set(counts[3 :: max(1, len(counts) // 12)]) | set(counts[-1:])
        lean = [a for a in smallest_placements(self._request, self._strategy) if self._fits(a)]
        if lean:
            chosen.add(min(lean, key=self._device_bytes).places.count(Placement.CPU))
        return sorted(chosen & set(counts))

    def _among(self, counts: Sequence[int], than_s: float) -> Candidate | None:
        """The fastest with one of these numbers of layers computed by the processor, if it is faster than `than_s`."""
        options: dict[Arrangement, float] = {}
        of_each_kind: dict[tuple[int, SpreadRule], Arrangement] = {}
        for cache_on_host, number, way in itertools.product(self._caches, counts, SPREAD_RULES):
            slot_counts = slot_counts_of(self._strategy)
            for arrangement in arrangements(
                self._request, slot_counts, cpu_layers=number, cache_on_host=cache_on_host, ways=[way]
            ):
                if arrangement not in options:
                    options[arrangement] = self._estimate_s(arrangement)
                rival = of_each_kind.setdefault((arrangement.slots, way), arrangement)
                if options[arrangement] < options[rival]:
                    of_each_kind[arrangement.slots, way] = arrangement
        ranked = sorted(options, key=options.__getitem__)
        tried = {arrangement: self._simulate(arrangement) for arrangement in self._simplest(counts)}
        self._try([*ranked[: self._round], *of_each_kind.values()], tried, than_s)
        best = _fastest(tried.values())
        for _ in range(ROUNDS_OF_VARIATION if tried else 0):
            like_it = dict.fromkeys(self._varied(next(a for a, candidate in tried.items() if candidate is best)))
            self._try(sorted(like_it, key=self._estimate_s)[: self._round], tried, than_s)
            before, best = best, _fastest(tried.values())
            if best is before:
                break
        return best

    def _simplest(self, counts: Sequence[int]) -> list[Arrangement]:
        """The first blocks stay, the rest goes through as few slots as can be: from host memory, or all from disk."""
        if counts[0] > 0:
            return []
        slot_counts = slot_counts_of(self._strategy)[:1]
        found = arrangements(self._request, slot_counts, cpu_layers=0, cache_on_host=self._caches[0], ways=[first])
        return list(itertools.islice(found, 2))

    def _varied(self, best: Arrangement) -> Iterator[Arrangement]:
        """Arrangements like this one: beginning elsewhere, or with a few residents, stores or processor's layers less.

        Or with more of the latter, since not all numbers of them were considered.
        """
        request = self._request
        others = [index for index, place in enumerate(best.places) if place is not Placement.CPU]
        sizes = [request.blocks.device[index] for index in others]
        stored = best.places.count(Placement.HOST) > 0
        most = best.places.count(Placement.DEVICE)
        for number in range(most, max(-1, most - (RESIDENTS_VARIED if best.slots else 1)), -1):
            for stays in placements(sizes, number):
                resident = {index for index, flag in zip(others, stays, strict=True) if flag}
                yield from self._with_stores(best, resident, [i for i in others if i not in resident], stored=stored)
        for slots in slot_counts_of(self._strategy):
            if slots <= best.travelling:
                yield from self._that_fit(best._replace(slots=slots))
        *layers, head = best.places
        for shift in range(1, min(len(layers), self._round)):
            shifted = best._replace(places=(*layers[shift:], *layers[:shift], head))
            # Which layers the CPU may compute is settled, for `smallest_placements` to know the least memory.
            if Placement.CPU not in layers or self._device_bytes(shifted) == self._device_bytes(best):
                yield from self._that_fit(shifted)
        for index in [index for index, place in enumerate(best.places) if place is Placement.HOST][: self._round]:
            fewer_stored = (*best.places[:index], Placement.DISK, *best.places[index + 1 :])
            yield from self._that_fit(best._replace(places=fewer_stored))
        travelling = [index for index, place in enumerate(best.places) if place in TRAVELLING]
        from_disk = [best.places[index] is Placement.DISK for index in travelling]
        for shift in range(1, len(travelling) // max(1, sum(from_disk))):
            places = list(best.places)
            for index, flag in zip(travelling, from_disk[shift:] + from_disk[:shift], strict=True):
                places[index] = Placement.DISK if flag else Placement.HOST
            yield from self._that_fit(best._replace(places=tuple(places)))
        counts = cpu_layer_counts(request)
        number = best.places.count(Placement.CPU)
        for near in {number + step for step in (-4, -2, -1, 1, 2, 4)} if number else ():
            if near > 0 and near in counts:
                yield from arrangements(request, (best.slots,), cpu_layers=near, cache_on_host=best.cache_on_host)

    def _with_stores(
        self, best: Arrangement, resident: set[int], travelling: list[int], *, stored: bool
    ) -> Iterator[Arrangement]:
        places = [
            place if place is Placement.CPU else Placement.DEVICE if index in resident else Placement.DISK
            for index, place in enumerate(best.places)
        ]
        bare = best._replace(places=tuple(places))
        room_bytes = self._request.host_budget_bytes - self._request.host_memory(bare).total_bytes
        for index in next(stores(self._request, travelling, room_bytes)) if stored else ():
            places[index] = Placement.HOST
        yield from self._that_fit(best._replace(places=tuple(places)))

    def _that_fit(self, arrangement: Arrangement) -> Iterator[Arrangement]:
        if self._fits(arrangement):
            yield arrangement

    def _fits(self, arrangement: Arrangement) -> bool:
        host_bytes = self._request.host_memory(arrangement).total_bytes
        return (
            self._device_bytes(arrangement) <= self._request.budget_bytes
            and host_bytes <= self._request.host_budget_bytes
        )

    def _device_bytes(self, arrangement: Arrangement) -> int:
        return self._request.device_memory(arrangement).total_bytes

    def _estimate_s(self, arrangement: Arrangement) -> float:
        return self._floors[arrangement.cache_on_host].total_s(arrangement)

    def _try(self, chosen: Iterable[Arrangement], tried: dict[Arrangement, Candidate], than_s: float) -> None:
        """Simulate those that may be faster than `than_s` and than what was tried before."""
        fastest_s = min([than_s, *(candidate.prediction.total_s for candidate in tried.values())])
        for arrangement in chosen:
            if arrangement not in tried and self._estimate_s(arrangement) < fastest_s * _SAME:
                tried[arrangement] = candidate = self._simulate(arrangement)
                fastest_s = min(fastest_s, candidate.prediction.total_s)

    def _simulate(self, arrangement: Arrangement) -> Candidate:
        plan, request = self._plan(arrangement), self._request
        return Candidate(plan, predict_on_accelerator(request.model, plan, self._pace, pinned=request.pinned))

    def _plan(self, arrangement: Arrangement) -> Plan:
        request, places = self._request, arrangement.places
        memory = request.memory(arrangement)
        return Plan(
            strategy=self._strategy,
            resident=tuple(place is Placement.DEVICE for place in places),
            slots=arrangement.slots,
            slot_bytes=slot_bytes(request, places),
            embedding=memory.embedding,
            compute_dtype=request.compute_dtype,
            memory=memory.device,
            budget_bytes=request.budget_bytes,
            workload=request.workload,
            streamed_bytes_per_pass=sum(
                size for size, place in zip(request.blocks.device, places, strict=True) if place in TRAVELLING
            ),
            accelerator=AcceleratorPlan(
                device=request.device,
                places=places,
                host=memory.host,
                host_budget_bytes=request.host_budget_bytes,
                chunk_bytes=request.chunk_bytes,
                ring_chunks=request.ring_chunks,
                cache_on_host=arrangement.cache_on_host,
            ),
        )


def _fastest(candidates: Iterable[Candidate]) -> Candidate | None:
    best: Candidate | None = None
    for candidate in candidates:
        if best is None or candidate.prediction.total_s < best.prediction.total_s * _SAME:
            best = candidate
    return best


class _Least(NamedTuple):
    strategy: Strategy
    arrangement: Arrangement
    device_bytes: int


def _least(request: AcceleratorRequest, strategy: Strategy | None) -> _Least | None:
    """What takes least of the device's memory, of what the host has room for."""
    found = [
        _Least(one, arrangement, request.device_memory(arrangement).total_bytes)
        for one in ((strategy,) if strategy is not None else Strategy)
        for arrangement in smallest_placements(request, one)
    ]
    return min(found, key=lambda least: least.device_bytes, default=None)


def _refusal(request: AcceleratorRequest, strategy: Strategy | None) -> BudgetError:
    least = _least(request, strategy)
    if least is None:
        return BudgetError(
            f"{format_bytes(request.host_budget_bytes)} of host memory are too little to bring {request.model.name} to "
            f"{request.device}: what is read passes through {format_bytes(request.ring_bytes)} of it "
            f"({request.ring_bytes} bytes: {request.ring_chunks} chunks of {format_bytes(request.chunk_bytes)}). "
            "Give --host-memory that much.",
            required_bytes=request.ring_bytes,
        )
    use, work = request.device_memory(least.arrangement), request.workload
    parts = ", ".join(
        f"{label} {format_bytes(size)}"
        for label, size in (
            ("resident weights", use.resident_bytes),
            ("slots", use.slots_bytes),
            ("conversion", use.conversion_bytes),
            ("KV cache", use.kv_cache_bytes),
            ("work space", use.work_space_bytes),
            ("small tensors", use.fixed_bytes),
        )
        if size
    )
    instead = _more_on_the_host(request, strategy)
    return BudgetError(
        f"a budget of {format_bytes(request.budget_bytes)} on {request.device} is too small for {request.model.name} "
        f"({least.strategy.value}, {request.compute_dtype}, {work.sequences} x ({work.prompt_tokens} + "
        f"{work.generate_tokens}) tokens): it needs at least {format_bytes(use.total_bytes)} ({use.total_bytes} bytes: "
        f"{parts}). Give --memory that much, or ask for fewer sequences or tokens.{instead}",
        required_bytes=use.total_bytes,
    )


def _more_on_the_host(request: AcceleratorRequest, strategy: Strategy | None) -> str:
    """Say what host memory would do instead, if any would."""
    needed = [
        request.host_memory(arrangement).total_bytes
        for one in ((strategy,) if strategy is not None else Strategy)
        for arrangement in smallest_placements(request, one, ignore_host_budget=True)
        if request.device_memory(arrangement).total_bytes <= request.budget_bytes
    ]
    if not needed:
        return ""
    return f" With --host-memory of {format_bytes(min(needed))} or more, what the device has would do."
