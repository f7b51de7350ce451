"""The arrangements of a model's blocks over device, host and disk that fit what may be held on either side.

Where the host's CPU computes, blocks stay in its memory or come from the disk: every number of residents is
considered, spread in several ways. On an accelerator, layers that the CPU computes are chosen first, evenly among all
layers. Of the other blocks the device keeps as many as fit together with the slots; of those that travel the host
stores as many as fit there, and the ones that come from the disk lie evenly among them: while the disk brings one, the
link brings others.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from headrace.planning.memory import MemoryAccount
from headrace.planning.plan import Arrangement, Placement, spread_evenly
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy

SLOT_COUNTS = (2, 3, 4, 6, 8)
CPU_SLOT_COUNTS = (2, 3, 4)

RESIDENT_COUNTS = 3
"""numbers of residents to consider: as many as fit, and so many less one below that"""

SpreadRule = Callable[[Sequence[int], int], tuple[bool, ...]]
"""how to choose a number of residents among blocks of these sizes"""


def evenly(sizes: Sequence[int], number: int) -> tuple[bool, ...]:
    """Spread them: while a resident block is computed, those that travel get ahead."""
    return spread_evenly(len(sizes), number)


def first(sizes: Sequence[int], number: int) -> tuple[bool, ...]:
    """The simplest rule: fill the memory and stream the rest."""
    return (True,) * number + (False,) * (len(sizes) - number)


def last(sizes: Sequence[int], number: int) -> tuple[bool, ...]:
    """The head and what comes before it."""
    return (False,) * (len(sizes) - number) + (True,) * number


def keep_largest(sizes: Sequence[int], number: int) -> tuple[bool, ...]:
    """Keep the largest blocks, so that slots need not be of their size."""
    kept = set(sorted(range(len(sizes)), key=lambda index: -sizes[index])[:number])
    return tuple(index in kept for index in range(len(sizes)))


SPREAD_RULES: tuple[SpreadRule, ...] = (evenly, first, keep_largest, last)


def resident_choices(sizes: Sequence[int], number: int) -> Iterator[tuple[bool, ...]]:
    """Ways to choose `number` residents: spread evenly, beginning anywhere; the first; the last; the largest."""
    even = evenly(sizes, number)
    for shift in range(-(-len(sizes) // max(1, number))):
        yield even[shift:] + even[:shift]
    for rule in (first, last, keep_largest):
        yield rule(sizes, number)


def fill_remaining(
    resident: tuple[bool, ...], order: Sequence[int], sizes: Sequence[int], left_bytes: int, *, most: int
) -> tuple[bool, ...]:
    """Blocks differ in size (the head's pieces); add up to `most` that still fit, so that no memory lies idle."""
    flags = list(resident)
    for index in order:
        if most and not flags[index] and sizes[index] <= left_bytes:
            flags[index], left_bytes, most = True, left_bytes - sizes[index], most - 1
    return tuple(flags)


def slot_counts_of(scenario: Scenario, strategy: Strategy) -> tuple[int, ...]:
    """Numbers of slots to consider, the smallest first; none where nothing travels."""
    if strategy is Strategy.RESIDENT:
        return (0,)
    if strategy is Strategy.SEQUENTIAL:
        return (1,)
    return CPU_SLOT_COUNTS if scenario.on_cpu else SLOT_COUNTS


def all_arrangements(account: MemoryAccount, strategy: Strategy) -> Iterator[Arrangement]:
    """Every number of residents that fits next to every number of slots, each also filled up; most residents first.

    For what the host's CPU computes. There are some thousands where there are a hundred blocks, so this is arithmetic
    on lists.
    """
    sizes = account.block_bytes
    if strategy is Strategy.RESIDENT:
        arrangement = Arrangement((Placement.DEVICE,) * len(sizes), 0)
        if account.fits(arrangement):
            yield arrangement
        return
    room_bytes, _ = _rooms(account, (False,) * len(sizes), cache_on_host=False)
    ascending = sorted(range(len(sizes)), key=sizes.__getitem__)
    descending = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    seen = set()
    for slots in slot_counts_of(account.scenario, strategy):
        for number in range(len(sizes) - slots, -1, -1):
            for resident in resident_choices(sizes, number):
                held_bytes = sum(itertools.compress(sizes, resident))
                slot_bytes = next(sizes[index] for index in descending if not resident[index])
                left_bytes = room_bytes - held_bytes - slots * slot_bytes
                if left_bytes < 0:
                    continue
                # Largest first fills best; smallest first is how a larger budget only ever adds blocks.
                most = len(sizes) - slots - number
                for flags in (
                    fill_remaining(resident, descending, sizes, left_bytes, most=most),
                    fill_remaining(resident, ascending, sizes, left_bytes, most=most),
                    resident,
                ):
                    if (slots, flags) not in seen:
                        seen.add((slots, flags))
                        yield Arrangement(
                            tuple(Placement.DEVICE if stays else Placement.DISK for stays in flags), slots
                        )


def arrangements(
    account: MemoryAccount,
    slot_counts: Sequence[int],
    *,
    cpu_layers: int,
    cache_on_host: bool,
    rules: Sequence[SpreadRule] = SPREAD_RULES,
) -> Iterator[Arrangement]:
    """Arrangements that fit both budgets, with so many layers computed by the CPU."""
    computed = cpu_layers_of(account, cpu_layers)
    others = [index for index, chosen in enumerate(computed) if not chosen]
    room_bytes, host_room_bytes = _rooms(account, computed, cache_on_host=cache_on_host)
    if host_room_bytes < 0:
        return
    sizes = [account.block_bytes[index] for index in others]
    for slots in slot_counts:
        for stays in _residents(sizes, room_bytes, slots, rules):
            resident = {index for index, flag in zip(others, stays, strict=True) if flag}
            travelling = [index for index in others if index not in resident]
            for stored in stores(account, travelling, host_room_bytes):
                yield Arrangement(_placements(computed, resident, stored), slots, cache_on_host)


def smallest_arrangements(
    account: MemoryAccount, strategy: Strategy, *, ignore_host_budget: bool = False
) -> list[Arrangement]:
    """For each number of layers of the CPU the arrangement that takes least of the device's memory.

    Only those that the host has room for. One of them is the smallest of all that are considered for whatever budget of
    the device. They keep keys and values on the host only where that takes less than two slots and the whole cache on
    the device.
    """
    scenario, found = account.scenario, []
    enough_bytes = two_slots_bytes(account)
    for cache_on_host in (False, True) if scenario.allow_host_cache else (False,):
        for number in cpu_layer_counts(account):
            placements = _fewest_bytes(account, cpu_layers_of(account, number), strategy)
            if placements is None:
                continue
            arrangement = Arrangement(placements, slot_counts_of(scenario, strategy)[0], cache_on_host)
            if cache_on_host and account.device(arrangement).total_bytes >= enough_bytes:
                continue
            if ignore_host_budget or account.host(arrangement).total_bytes <= scenario.host_budget_bytes:
                found.append(arrangement)
    return found


def two_slots_bytes(account: MemoryAccount) -> int:
    """The device's memory with two slots, as few residents as can be, and all keys and values.

    With as much of it, none of them need to wait on the host.
    """
    placements = _fewest_bytes(account, cpu_layers_of(account, 0), Strategy.OVERLAP)
    assert placements is not None  # a model has a layer and a head at least
    return account.device(Arrangement(placements, min(SLOT_COUNTS))).total_bytes


def cpu_layer_counts(account: MemoryAccount) -> range:
    """Numbers of layers that the CPU may compute for an accelerator: all there are."""
    layers = sum(block.layer_index is not None for block in account.scenario.model.blocks)
    return range(layers + 1 if account.scenario.allow_cpu else 1)


def cpu_layers_of(account: MemoryAccount, number: int) -> tuple[bool, ...]:
    """Choose so many layers, evenly among all; never the head."""
    is_layer = [block.layer_index is not None for block in account.scenario.model.blocks]
    chosen = iter(spread_evenly(sum(is_layer), number))
    return tuple(layer and next(chosen) for layer in is_layer)


def stores(account: MemoryAccount, travelling: Sequence[int], room_bytes: int) -> Iterator[frozenset[int]]:
    """Which of the travelling blocks wait in host memory: as many as there is room for, or none."""
    sizes = [account.stored_bytes[index] for index in travelling]
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


def _rooms(account: MemoryAccount, computed: Sequence[bool], *, cache_on_host: bool) -> tuple[int, int]:
    """Bytes for blocks on the device and for stores on the host, after what is held in any case."""
    bare = Arrangement(_placements(computed), 0, cache_on_host)
    return (
        account.scenario.budget_bytes - account.device(bare).total_bytes,
        account.scenario.host_budget_bytes - account.host(bare).total_bytes,
    )


def _placements(
    computed: Sequence[bool], resident: Iterable[int] = (), stored: Iterable[int] = ()
) -> tuple[Placement, ...]:
    """Blocks that the CPU does not compute come from the disk, but for these two kinds."""
    placements = [Placement.CPU if on_cpu else Placement.DISK for on_cpu in computed]
    for index in resident:
        placements[index] = Placement.DEVICE
    for index in stored:
        placements[index] = Placement.HOST
    return tuple(placements)


def _residents(
    sizes: Sequence[int], room_bytes: int, slots: int, rules: Sequence[SpreadRule]
) -> Iterator[tuple[bool, ...]]:
    """Which blocks stay on the device: as many as fit with the slots and a few less, filled up with smaller ones."""
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
    for rule in rules:
        fitting = 0
        for number in range(most, -1, -1):
            stays = rule(sizes, number)
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


def _fewest_bytes(account: MemoryAccount, computed: Sequence[bool], strategy: Strategy) -> tuple[Placement, ...] | None:
    """Placements that take least of the device's memory; None where too few blocks are left for the slots.

    Where a few blocks are much larger than the others, keeping them takes less than slots of their size.
    """
    others = [index for index, chosen in enumerate(computed) if not chosen]
    slots = slot_counts_of(account.scenario, strategy)[0]
    if not slots:
        return _placements(computed, others)
    if len(others) < slots:
        return None
    descending = sorted(others, key=lambda index: -account.block_bytes[index])
    sizes = [account.block_bytes[index] for index in descending]
    held = itertools.accumulate(sizes, initial=0)
    totals = [bytes_held + slots * size for bytes_held, size in zip(held, sizes, strict=False)]
    number = min(range(len(sizes) - slots + 1), key=totals.__getitem__)
    return _placements(computed, descending[:number])
