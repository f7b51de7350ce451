"""The plan: for each block where it lives, and the memory of each tier. One for planner, simulator and runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from headrace.planning.workload import Workload


class Strategy(StrEnum):
    """How weights reach what computes."""

    RESIDENT = "resident"
    SEQUENTIAL = "sequential"
    OVERLAP = "overlap"


class Placement(StrEnum):
    """Where a block's weights live between its turns, and by that what computes it and how it travels."""

    DEVICE = "device"
    """in the computing device's memory for good: read once, never travels again"""
    HOST = "host"
    """in host memory, page-locked where the system allows it; copied to an accelerator in every pass"""
    DISK = "disk"
    """in the checkpoint only; read in every pass"""
    CPU = "cpu"
    """in host memory, and computed there by the CPU: its activations travel instead"""


TRAVELLING = (Placement.HOST, Placement.DISK)
"""placements from which a block passes through a slot of the computing device"""

CPU_DEVICE = "cpu"
"""the device that is the host itself: no link, no ring, no stores; its one budget is the device's"""


class EmbeddingPlacement(StrEnum):
    """Where the rows of the input embedding come from."""

    RESIDENT = "resident"
    """a table of its own in the computing device's memory"""
    HEAD = "head"
    """tied weights whose head is resident: the rows are taken from there"""
    ROWS = "rows"
    """read row by row from the checkpoint"""
    HOST = "host"
    """a table in host memory, from which an accelerator is given the rows of each pass"""


@dataclass(frozen=True, kw_only=True)
class TierMemory:
    """Bytes in one tier by purpose; the tier's budget bounds their sum."""

    weights_bytes: int = 0
    """blocks that stay: a device's residents; the host's stores and the blocks that the CPU computes"""
    slots_bytes: int = 0
    fixed_bytes: int = 0
    """small tensors outside the blocks"""
    embedding_bytes: int = 0
    conversion_bytes: int = 0
    """buffer in which weights are widened to the compute dtype or put together"""
    kv_cache_bytes: int = 0
    work_space_bytes: int = 0
    ring_bytes: int = 0
    """page-locked chunks of the host between disk and device"""

    @property
    def total_bytes(self) -> int:
        """Sum of all purposes."""
        return (
            self.weights_bytes
            + self.slots_bytes
            + self.fixed_bytes
            + self.embedding_bytes
            + self.conversion_bytes
            + self.kv_cache_bytes
            + self.work_space_bytes
            + self.ring_bytes
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """For each block where it lives; how many slots; in which dtype; and what memory that takes."""

    strategy: Strategy
    device: str = CPU_DEVICE
    """what computes, as users write it: cpu, cuda:0"""
    placements: tuple[Placement, ...]
    """per block, in the order of a pass"""
    slots: int
    slot_bytes: int
    embedding: EmbeddingPlacement
    compute_dtype: str
    memory: TierMemory
    """of the computing device; of a CPU the host's own"""
    budget_bytes: int
    host_memory: TierMemory = field(default_factory=TierMemory)
    """of the host beside an accelerator"""
    host_budget_bytes: int = 0
    workload: Workload
    streamed_bytes_per_pass: int
    """bytes that pass through the slots"""
    chunk_bytes: int = 0
    """of one read, and of one place of the ring; 0: as the reader is set"""
    ring_chunks: int = 0
    cache_on_host: bool = False
    """keys and values wait in host memory and visit the device layer by layer"""

    @property
    def uses_host_memory(self) -> bool:
        """Whether the computing device's memory is the host's own."""
        return self.device == CPU_DEVICE

    @property
    def num_blocks(self) -> int:
        """Blocks in a pass."""
        return len(self.placements)

    @property
    def resident_blocks(self) -> int:
        """Blocks that stay on the device."""
        return self.placements.count(Placement.DEVICE)

    @property
    def streamed_blocks(self) -> int:
        """Blocks that pass through the slots."""
        return sum(placement in TRAVELLING for placement in self.placements)

    @property
    def cpu_blocks(self) -> int:
        """Blocks that the CPU computes for an accelerator."""
        return self.placements.count(Placement.CPU)

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes held on `device` and `host`; a CPU's own memory is the host's."""
        if self.uses_host_memory:
            return {"device": 0, "host": self.memory.total_bytes}
        return {"device": self.memory.total_bytes, "host": self.host_memory.total_bytes}
