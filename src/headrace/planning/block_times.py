"""Seconds that blocks take of each resource, and their sums over a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from headrace.planning.plan import Placement


class BlockTimes(NamedTuple):
    """Seconds that a block takes of each resource, alone."""

    read_s: float
    """of the disk"""
    prefill_s: float
    decode_s: float
    """of the device or the CPU in a prefill and a decode pass; for CPU layers including moving the activations"""
    copy_s: float = 0.0
    """of the link, from host memory to the device; 0: the block is computed where it is read to"""
    store_s: float = 0.0
    """of a reader, to write the block into its store in host memory once, while it is read (HOST, CPU)"""
    stage_s: float = 0.0
    """of a reader, to bring the block from a store that is not page-locked into the ring (HOST); 0: it is"""
    pieces: int = 8
    """in which the block is read and copied"""

    @property
    def first_read_s(self) -> float:
        """Reading into a store: one reader reads a piece while another one writes the piece before."""
        return max(self.read_s, self.store_s) + min(self.read_s, self.store_s) / self.pieces


class PassDemand(NamedTuple):
    """Seconds of each resource that a decode pass needs, whatever the order."""

    read_s: float
    """of the readers: from the disk, and out of stores that are not page-locked"""
    copy_s: float
    compute_s: float
    """of the device and of the CPU, which take turns, with the pass's overhead"""

    @classmethod
    def of(cls, blocks: Sequence[BlockTimes], placements: Sequence[Placement], *, overhead_s: float) -> PassDemand:
        """Sum up."""
        read_s = copy_s = 0.0
        compute_s = overhead_s
        for times, placement in zip(blocks, placements, strict=True):
            compute_s += times.decode_s
            if placement is Placement.DISK:
                read_s += times.read_s
                copy_s += times.copy_s
            elif placement is Placement.HOST:
                read_s += times.stage_s
                copy_s += times.copy_s
        return cls(read_s, copy_s, compute_s)
