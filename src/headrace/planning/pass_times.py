"""Seconds of a pass in closed form."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from headrace.planning.block_times import BlockTimes, block_times, pass_overheads
from headrace.planning.plan import TRAVELLING, Arrangement, Placement
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy


def least_s(read_s: float, compute_s: float, read_slowdown: float, compute_slowdown: float) -> float:
    """Seconds that no schedule of this reading and computing goes below: as much as can be is done at once.

    A second of both at once does 1/read_slowdown of the one and 1/compute_slowdown of the other. Without slowdowns
    this is the longer of the two, with great ones their sum.
    """
    both_s = min(read_s * read_slowdown, compute_s * compute_slowdown)
    saved_share = max(0.0, 1 / read_slowdown + 1 / compute_slowdown - 1)
    return read_s + compute_s - both_s * saved_share


class _Shares(NamedTuple):
    """What one block in one place adds to each of the sums; seconds."""

    first_read_s: float
    first_copy_s: float
    first_arrival_s: float
    """from its request until it is there, in the first pass"""
    prefill_s: float
    read_s: float
    copy_s: float
    arrival_s: float
    decode_s: float

    @classmethod
    def of(cls, times: BlockTimes, placement: Placement, *, read_latency_s: float, stall_penalty_s: float) -> _Shares:
        """A read on demand takes `read_latency_s` longer, and the computation that waits for it `stall_penalty_s`."""
        from_disk_s = _piped(times.read_s, times.copy_s, times.pieces, read_latency_s) + stall_penalty_s
        into_store_s = times.first_read_s + read_latency_s + stall_penalty_s
        if placement is Placement.CPU:
            return cls(times.first_read_s, 0.0, into_store_s, times.prefill_s, 0.0, 0.0, 0.0, times.decode_s)
        if placement is Placement.HOST:
            staged_s = _piped(times.stage_s, times.copy_s, times.pieces, read_latency_s if times.stage_s else 0.0)
            return cls(
                first_read_s=times.first_read_s + times.stage_s,
                first_copy_s=times.copy_s,
                first_arrival_s=into_store_s + staged_s,
                prefill_s=times.prefill_s,
                read_s=times.stage_s,
                copy_s=times.copy_s,
                arrival_s=staged_s + stall_penalty_s,
                decode_s=times.decode_s,
            )
        stays = cls(times.read_s, times.copy_s, from_disk_s, times.prefill_s, 0.0, 0.0, 0.0, times.decode_s)
        if placement is Placement.DEVICE:
            return stays
        return stays._replace(read_s=times.read_s, copy_s=times.copy_s, arrival_s=from_disk_s)


class LowerBound:
    """Seconds that no schedule of a strategy's arrangements goes below, in closed form: how thousands are ranked.

    For the sequential strategy they are what a run takes, exactly. Rows of the embedding count nothing here, since
    whether they are read depends on the memory that is left.
    """

    def __init__(self, scenario: Scenario, strategy: Strategy, *, cache_on_host: bool = False) -> None:
        rates = scenario.known_rates
        self._sequential = strategy is Strategy.SEQUENTIAL
        self._overheads = pass_overheads(scenario.model, scenario.workload, rates, None)
        self._further_passes = scenario.workload.generate_tokens - 1
        self._slowdowns = (rates.read_slowdown, rates.compute_slowdown)
        on_demand = (rates.read_latency_s, rates.stall_penalty_s) if self._sequential else (0.0, 0.0)
        by_placement: dict[Placement, list[_Shares]] = {}
        for placement in _placements_of(scenario):
            placements = [
                Placement.DEVICE if placement is Placement.CPU and block.layer_index is None else placement
                for block in scenario.model.blocks
            ]
            times = block_times(scenario, placements, cache_on_host=cache_on_host)
            by_placement[placement] = [
                _Shares.of(own, placement, read_latency_s=on_demand[0], stall_penalty_s=on_demand[1]) for own in times
            ]
        rows = list(zip(*by_placement.values(), strict=True))
        kinds = {row: kind for kind, row in enumerate(dict.fromkeys(rows))}
        self._kinds = [kinds[row] for row in rows]
        """blocks that are alike in every place are counted together"""
        self._shares: dict[tuple[int, Placement], _Shares] = {
            (kind, placement): shares
            for row, kind in kinds.items()
            for placement, shares in zip(by_placement, row, strict=True)
        }

    def total_s(self, arrangement: Arrangement) -> float:
        """Seconds of the whole work, at least."""
        return sum(self.parts_s(arrangement))

    def parts_s(self, arrangement: Arrangement) -> tuple[float, float]:
        """Seconds of the first pass, and of all further ones, at least.

        No schedule does with less than the longest that it takes of a resource, nor with less than every slot takes to
        be filled with one block after the other while each of them is computed.
        """
        numbers = Counter(zip(self._kinds, arrangement.placements, strict=True))
        sums, in_slots_s = [0.0] * len(_Shares._fields), 0.0
        for key, number in numbers.items():
            own = self._shares[key]
            sums = [before + number * seconds for before, seconds in zip(sums, own, strict=True)]
            if key[1] in TRAVELLING:
                in_slots_s += number * (own.arrival_s + own.decode_s)
        first_read_s, first_copy_s, first_arrival_s, prefill_s, read_s, copy_s, arrival_s, decode_s = sums
        prefill_s += self._overheads[0]
        decode_s += self._overheads[1]
        if self._sequential:
            return first_arrival_s + prefill_s, self._further_passes * (arrival_s + decode_s)
        first = self._shares[self._kinds[0], arrangement.placements[0]]
        last = self._shares[self._kinds[-1], arrangement.placements[-1]]
        middle_s = least_s(first_read_s - first.first_read_s, prefill_s - last.prefill_s, *self._slowdowns)
        first_s = max(first.first_read_s + middle_s + last.prefill_s, first_copy_s, first.first_arrival_s + prefill_s)
        slots_s = in_slots_s / arrangement.slots if arrangement.slots else 0.0
        return first_s, self._further_passes * max(least_s(read_s, decode_s, *self._slowdowns), copy_s, slots_s)


def _placements_of(scenario: Scenario) -> list[Placement]:
    if scenario.on_cpu:
        return [Placement.DEVICE, Placement.DISK]
    return [placement for placement in Placement if placement is not Placement.CPU or scenario.allow_cpu]


def _piped(first_s: float, then_s: float, pieces: int, read_latency_s: float) -> float:
    """Seconds of a block that goes piece by piece through two stages, the first of which begins late."""
    return max(read_latency_s + first_s, then_s) + min(first_s, then_s) / pieces
