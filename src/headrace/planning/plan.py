"""The plan: for each block where it lives, and the memory of each tier. One for planner, simulator and runtime."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import NamedTuple

from headrace.errors import InvalidRequestError
from headrace.machine.machine import Tier
from headrace.planning.strategies import Strategy
from headrace.planning.workload import Workload


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
class Parallelism:
    """How the work is divided over devices.

    `tensor` x `pipeline` devices hold one copy; `replicas` of that share the sequences. With `sharded` each of the
    `replicas` pulls its part of every layer over its own link and gathers the others' (bandwidth-centric).
    """

    tensor: int = 1
    two_dimensional: bool = False
    pipeline: int = 1
    micro_batches: int = 1
    replicas: int = 1
    sharded: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "micro_batches", "replicas"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def devices_per_copy(self) -> int:
        """Devices that hold one copy of the weights together."""
        return self.tensor * self.pipeline

    @property
    def devices(self) -> int:
        """All devices."""
        return self.devices_per_copy * self.replicas


ONE_DEVICE = Parallelism()


class Arrangement(NamedTuple):
    """Where each block lives, how many slots there are, where keys and values wait, and how the work is divided.

    The head is the last block, or its pieces are the last ones.
    """

    placements: tuple[Placement, ...]
    slots: int = 0
    cache_on_host: bool = False
    parallelism: Parallelism = ONE_DEVICE
    expert_hit_rate: float | None = None
    """share of the routed experts that are found on the device; None: experts travel with their layer"""
    expert_source: Placement = Placement.HOST
    """where the others are fetched from"""

    @property
    def travelling(self) -> int:
        """Blocks that pass through slots."""
        return sum(placement in TRAVELLING for placement in self.placements)

    @property
    def overlap(self) -> bool:
        """Whether the next blocks load while one computes; with one slot they are loaded, computed and dropped."""
        return self.slots != 1

    @property
    def resident_share(self) -> float:
        """Share of the layers that stays on the device, where the head is one block."""
        return self._share(Placement.DEVICE)

    @property
    def cpu_share(self) -> float:
        """Share of the layers that the host's CPU computes where they lie."""
        return self._share(Placement.CPU)

    @property
    def streamed_share(self) -> float:
        """Share of the layers that travels to the device in each pass."""
        return self._share(Placement.HOST) + self._share(Placement.DISK)

    def _share(self, placement: Placement) -> float:
        layers = len(self.placements) - 1
        return (self.placements.count(placement) - (self.placements[-1] is placement)) / layers

    @property
    def source(self) -> Tier:
        """The slowest tier that weights come from in each pass; the device's own where all stay."""
        if Placement.DISK in self.placements:
            return Tier.DISK
        if Placement.HOST in self.placements or Placement.CPU in self.placements:
            return Tier.HOST
        if self.expert_hit_rate is None:
            return Tier.DEVICE
        return Tier.DISK if self.expert_source is Placement.DISK else Tier.HOST


def arranged(
    layers: int,
    *,
    resident: int | None = None,
    cpu: int = 0,
    source: Placement = Placement.HOST,
    slots: int = 2,
    cache_on_host: bool = False,
    parallelism: Parallelism = ONE_DEVICE,
) -> Arrangement:
    """An arrangement of so many layers and a head that stays: `cpu` layers of the CPU, `resident` ones of the device.

    The others come from `source` through slots; without `resident` there are none. Each kind is spread evenly.
    """
    kept = layers - cpu if resident is None else resident
    placements = _spread_placements(layers, cpu, kept, source)
    return Arrangement(placements, slots if kept + cpu < layers else 0, cache_on_host, parallelism)


@cache
def _spread_placements(layers: int, cpu: int, resident: int, source: Placement) -> tuple[Placement, ...]:
    found = [Placement.CPU if flag else Placement.DEVICE for flag in spread_evenly(layers, cpu)]
    free = [index for index, placement in enumerate(found) if placement is Placement.DEVICE]
    for index, travels in zip(free, spread_evenly(len(free), len(free) - resident), strict=True):
        if travels:
            found[index] = source
    return (*found, Placement.DEVICE)


def spread_evenly(count: int, number: int) -> tuple[bool, ...]:
    """Choose `number` of `count` in a row at even distances, the last one among them."""
    return tuple((index + 1) * number // count > index * number // count for index in range(count))


class TierMemory(NamedTuple):
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
        return sum(self)


NOTHING_HELD = TierMemory()


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
    host_memory: TierMemory = NOTHING_HELD
    """of the host beside an accelerator"""
    host_budget_bytes: int = 0
    workload: Workload
    streamed_bytes_per_pass: int
    """bytes that pass through the slots"""
    cache_on_host: bool = False
    """keys and values wait in host memory and visit the device layer by layer"""
    parallelism: Parallelism = ONE_DEVICE
    expert_hit_rate: float | None = None
    expert_source: Placement = Placement.HOST
    disk_bytes: int = 0
    """of weights that stay on the disk"""

    @property
    def arrangement(self) -> Arrangement:
        """What decides the plan's times."""
        return Arrangement(
            self.placements,
            self.slots,
            self.cache_on_host,
            self.parallelism,
            self.expert_hit_rate,
            self.expert_source,
        )

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
        """Bytes held on each device, each host and its disk; a CPU's own memory is the host's."""
        device, host = self.memory.total_bytes, self.host_memory.total_bytes
        if self.uses_host_memory:
            device, host = 0, device
        return {"device": device, "host": host, "disk": self.disk_bytes}
