"""The arrangements of a model's blocks over device, host and disk that fit what may be held on either side.

Layers that the processor computes are chosen first, evenly among all layers. Of the other blocks the device keeps as
many as fit beside the slots; of those that travel the host stores as many as fit there, and the ones that come from the
disk lie evenly among them: while the disk brings one, the link brings others.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from headrace.planning.accelerator_memory import AcceleratorRequest, Arrangement
from headrace.planning.plan import Placement, Strategy
from headrace.planning.planner import fill_remaining, keep_largest, spread_evenly

SLOT_COUNTS = (2, 3, 4, 6, 8)

RESIDENT_COUNTS = 3
"""numbers of residents to consider: as many as fit, and so many less one below that"""

SpreadRule = Callable[[Sequence[int], int], tuple[bool, ...]]
"""how to choose a number of residents among blocks of these sizes"""


def evenly(sizes: Sequence[int], number: int) -> tuple[bool, ...]:
    """Spread them: while a resident block is computed, those that travel get ahead."""
    return spread_evenly(len(sizes), number)


def first(sizes: Sequence[int], number: int) -> tuple[bool, ...]:
    """As one does who fills the memory and streams the rest."""
    return (True,) * number + (False,) * (len(sizes) - number)


def last(sizes: Sequence[int], number: int) -> tuple[bool, ...]:
    """The head and what comes before it."""
    return (False,) * (len(sizes) - number) + (True,) * number


SPREAD_RULES: tuple[SpreadRule, ...] = (evenly, first, keep_largest, last)


def arrangements(
    request: AcceleratorRequest,
    slot_counts: Sequence[int],
    *,
    cpu_layers: int,
    cache_on_host: bool,
    ways: Sequence[SpreadRule] = SPREAD_RULES,
) -> Iterator[Arrangement]:
    """Arrangements that fit both budgets, with so many layers computed by the processor."""
    computed = cpu_layers_of(request, cpu_layers)
    others = [index for index, chosen in enumerate(computed) if not chosen]
    room_bytes, host_room_bytes = _rooms(request, computed, cache_on_host=cache_on_host)
    if host_room_bytes < 0:
        return
    sizes = [request.blocks.device[index] for index in others]
    for slots in slot_counts:
        for stays in _residents(sizes, room_bytes, slots, ways):
            resident = {index for index, flag in zip(others, stays, strict=True) if flag}
            travelling = [index for index in others if index not in resident]
            for stored in stores(request, travelling, host_room_bytes):
                yield Arrangement(_places(computed, resident, stored), slots, cache_on_host)


def smallest_placements(
    request: AcceleratorRequest, strategy: Strategy, *, ignore_host_budget: bool = False
) -> list[Arrangement]:
    """For each number of layers of the processor the arrangement that takes least of the device's memory.

    Only those that the host has room for. One of them is the smallest of all that `arrangements` yields for whatever
    budget of the device. They keep keys and values on the host only where that takes less than two slots and the whole
    cache on the device.
    """
    found = []
    enough_bytes = two_slots_bytes(request)
    for cache_on_host in (False, True) if request.allow_host_cache else (False,):
        for number in cpu_layer_counts(request):
            computed = cpu_layers_of(request, number)
            places = _fewest_bytes(request, computed, strategy)
            if places is None:
                continue
            arrangement = Arrangement(places, slot_counts_of(strategy)[0], cache_on_host)
            if cache_on_host and request.device_memory(arrangement).total_bytes >= enough_bytes:
                continue
            if ignore_host_budget or request.host_memory(arrangement).total_bytes <= request.host_budget_bytes:
                found.append(arrangement)
    return found


def two_slots_bytes(request: AcceleratorRequest) -> int:
    """The device's memory with two slots, as few residents as can be, and all keys and values.

    With as much of it, none of them need to wait on the host.
    """
    places = _fewest_bytes(request, cpu_layers_of(request, 0), Strategy.OVERLAP)
    assert places is not None  # a model has a layer and a head at least
    return request.device_memory(Arrangement(places, min(SLOT_COUNTS))).total_bytes


def cpu_layer_counts(request: AcceleratorRequest) -> range:
    """Numbers of layers that the processor may compute: all there are."""
    layers = sum(block.layer_index is not None for block in request.model.blocks)
    return range(layers + 1 if request.allow_cpu else 1)


def cpu_layers_of(request: AcceleratorRequest, number: int) -> tuple[bool, ...]:
    """Choose so many layers, evenly among all; never the head."""
    is_layer = [block.layer_index is not None for block in request.model.blocks]
    chosen = iter(spread_evenly(sum(is_layer), number))
    return tuple(layer and next(chosen) for layer in is_layer)


def stores(request: AcceleratorRequest, travelling: Sequence[int], room_bytes: int) -> Iterator[frozenset[int]]:
    """Which of the travelling blocks wait in host memory: as many as there is room for, or none."""
    sizes = [request.blocks.host[index] for index in travelling]
    ascending = sorted(range(len(sizes)), key=sizes.__getitem__)
    most = bisect.bisect_right(list(itertools.accumulate(sizes[index] for index in ascending)), room_bytes)
    for from_disk in range(len(sizes) - most, len(sizes)):
        stored = [not flag for flag in spread_evenly(len(sizes), from_disk)]
        left_bytes = room_bytes - sum(itertools.compress(sizes, stored))
        if left_bytes >= 0:
            filled = fill_remaining(tuple(stored), ascending, sizes, left_bytes, most=from_disk)
            yield frozenset(itertools.compress(travelling, filled))
            break
    yield frozenset()


def _rooms(request: AcceleratorRequest, computed: Sequence[bool], *, cache_on_host: bool) -> tuple[int, int]:
    """Bytes for blocks on the device and for stores on the host, beside what is held in any case."""
    bare = Arrangement(_places(computed), 0, cache_on_host)
    return (
        request.budget_bytes - request.device_memory(bare).total_bytes,
        request.host_budget_bytes - request.host_memory(bare).total_bytes,
    )


def _places(
    computed: Sequence[bool], resident: Iterable[int] = (), stored: Iterable[int] = ()
) -> tuple[Placement, ...]:
    """Blocks that the processor does not compute come from the disk, but for these two kinds."""
    places = [Placement.CPU if on_cpu else Placement.DISK for on_cpu in computed]
    for index in resident:
        places[index] = Placement.DEVICE
    for index in stored:
        places[index] = Placement.HOST
    return tuple(places)


def slot_counts_of(strategy: Strategy) -> tuple[int, ...]:
    """Numbers of slots to consider, the smallest first; none where nothing travels."""
    if strategy is Strategy.RESIDENT:
        return (0,)
    return (1,) if strategy is Strategy.SEQUENTIAL else SLOT_COUNTS


def _residents(
    sizes: Sequence[int], room_bytes: int, slots: int, ways: Sequence[SpreadRule]
) -> Iterator[tuple[bool, ...]]:
    """Which blocks stay on the device: as many as fit beside the slots and a few less, filled up with smaller ones."""
    count = len(sizes)
    if not slots:
        if sum(sizes) <= room_bytes:
            yield (True,) * count
        return
    ascending = sorted(range(count), key=sizes.__getitem__)
    smallest = list(itertools.accumulate((sizes[index] for index in ascending), initial=slots * min(sizes)))
    # More slots than travelling blocks would be memory for nothing: where there are too few blocks, nothing is found.
    most = min(count - slots, bisect.bisect_right(smallest, room_bytes) - 1)
    seen = set()
    for way in ways:
        fitting = 0
        for number in range(most, -1, -1):
            stays = way(sizes, number)
            slot_bytes = max(size for size, flag in zip(sizes, stays, strict=True) if not flag)
            left_bytes = room_bytes - sum(itertools.compress(sizes, stays)) - slots * slot_bytes
            if left_bytes < 0:
                continue
            most_more = count - slots - number
            for filled in (
                stays,
                fill_remaining(stays, ascending[::-1], sizes, left_bytes, most=most_more),
                fill_remaining(stays, ascending, sizes, left_bytes, most=most_more),
            ):
                if filled not in seen:
                    seen.add(filled)
                    yield filled
            fitting += 1
            if fitting == RESIDENT_COUNTS:
                break


def _fewest_bytes(
    request: AcceleratorRequest, computed: Sequence[bool], strategy: Strategy
) -> tuple[Placement, ...] | None:
    """Places that take least of the device's memory; None where too few blocks are left for the slots.

    Where a few blocks are much larger than the others, keeping them takes less than slots of their size.
    """
    others = [index for index, chosen in enumerate(computed) if not chosen]
    slots = slot_counts_of(strategy)[0]
    if not slots:
        return _places(computed, others)
    if len(others) < slots:
        return None
    descending = sorted(others, key=lambda index: -request.blocks.device[index])
    sizes = [request.blocks.device[index] for index in descending]
    held = itertools.accumulate(sizes, initial=0)
    totals = [bytes_held + slots * size for bytes_held, size in zip(held, sizes, strict=False)]
    number = min(range(len(sizes) - slots + 1), key=totals.__getitem__)
    return _places(computed, descending[:number])
