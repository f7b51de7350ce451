"""What no schedule of an accelerator's arrangement is faster than, in closed form: how thousands of them are ranked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from headrace.planning.accelerator_memory import AcceleratorRequest, Arrangement
from headrace.planning.accelerator_pace import AcceleratorPace, tiered_times
from headrace.planning.block_times import BlockTimes
from headrace.planning.plan import TRAVELLING, Placement, Strategy


class Shares(NamedTuple):
    """What one block in one place adds to each of the sums; seconds."""

    first_read_s: float
    first_copy_s: float
    first_way_s: float
    """from its request until it is there, in the first pass"""
    prefill_s: float
    read_s: float
    copy_s: float
    way_s: float
    decode_s: float

    @classmethod
    def of(cls, times: BlockTimes, place: Placement, *, read_latency_s: float, stall_penalty_s: float) -> Shares:
        """A read on demand takes `read_latency_s` longer, and the computation that waits for it `stall_penalty_s`."""
        through_ring_s = (
            _piped(times.read_s, times.copy_s, times.pieces, read_latency_s=read_latency_s) + stall_penalty_s
        )
        into_store_s = times.first_read_s + read_latency_s + stall_penalty_s
        if place is Placement.CPU:
            return cls(times.first_read_s, 0.0, into_store_s, times.prefill_s, 0.0, 0.0, 0.0, times.decode_s)
        if place is Placement.HOST:
            by_reader_s = read_latency_s if times.stage_s else 0.0
            staged_s = _piped(times.stage_s, times.copy_s, times.pieces, read_latency_s=by_reader_s)
            return cls(
                first_read_s=times.first_read_s + times.stage_s,
                first_copy_s=times.copy_s,
                first_way_s=into_store_s + staged_s,
                prefill_s=times.prefill_s,
                read_s=times.stage_s,
                copy_s=times.copy_s,
                way_s=staged_s + stall_penalty_s,
                decode_s=times.decode_s,
            )
        stays = cls(times.read_s, times.copy_s, through_ring_s, times.prefill_s, 0.0, 0.0, 0.0, times.decode_s)
        if place is Placement.DEVICE:
            return stays
        return stays._replace(read_s=times.read_s, copy_s=times.copy_s, way_s=through_ring_s)


@dataclass(frozen=True, kw_only=True)
class AcceleratorFloor:
    """The sums of one request and strategy. For the sequential strategy they are what a run takes, exactly.

    Rows of the embedding count nothing here, since whether they are read depends on the memory that is left.
    """

    shares: Mapping[Placement, tuple[Shares, ...]]
    sequential: bool
    first_beside_s: float
    beside_s: float
    further_passes: int

    @classmethod
    def of(
        cls, request: AcceleratorRequest, strategy: Strategy, pace: AcceleratorPace, *, cache_on_host: bool
    ) -> AcceleratorFloor:
        """Work out each block in each place it may live in."""
        sequential, own = strategy is Strategy.SEQUENTIAL, pace.device
        shares = {}
        for place in Placement:
            if place is Placement.CPU and not request.allow_cpu:
                continue
            places = [
                Placement.DEVICE if place is Placement.CPU and block.layer_index is None else place
                for block in request.model.blocks
            ]
            times = tiered_times(
                request.model,
                request.workload,
                pace,
                places,
                pinned=request.pinned,
                chunk_bytes=request.chunk_bytes,
                cache_on_host=cache_on_host,
            )
            shares[place] = tuple(
                Shares.of(
                    block,
                    place,
                    read_latency_s=own.read_latency_s if sequential else 0.0,
                    stall_penalty_s=own.stall_penalty_s if sequential else 0.0,
                )
                for block in times
            )
        return cls(
            shares=shares,
            sequential=sequential,
            first_beside_s=own.pass_overhead_s if own.first_pass_overhead_s is None else own.first_pass_overhead_s,
            beside_s=own.pass_overhead_s,
            further_passes=request.workload.generate_tokens - 1,
        )

    def total_s(self, arrangement: Arrangement) -> float:
        """Seconds of the whole work, at least.

        No schedule does with less than the longest that it takes of a resource, nor with less than every slot takes to
        be filled with one block after the other while each of them is computed.
        """
        own = [self.shares[place][index] for index, place in enumerate(arrangement.places)]
        sums = Shares(*(float(sum(column)) for column in zip(*own, strict=True)))
        prefill_s, decode_s = sums.prefill_s + self.first_beside_s, sums.decode_s + self.beside_s
        if self.sequential:
            return sums.first_way_s + prefill_s + self.further_passes * (sums.way_s + decode_s)
        first_s = max(sums.first_read_s + own[-1].prefill_s, sums.first_copy_s, own[0].first_way_s + prefill_s)
        slots_s = 0.0
        if arrangement.slots:
            travelling = [s for s, place in zip(own, arrangement.places, strict=True) if place in TRAVELLING]
            slots_s = sum(s.way_s + s.decode_s for s in travelling) / arrangement.slots
        return first_s + self.further_passes * max(sums.read_s, sums.copy_s, decode_s, slots_s)


def _piped(first_s: float, then_s: float, pieces: int, *, read_latency_s: float) -> float:
    """Seconds of a block that goes piece by piece through two stages, the first of which begins late."""
    return max(read_latency_s + first_s, then_s) + min(first_s, then_s) / pieces
