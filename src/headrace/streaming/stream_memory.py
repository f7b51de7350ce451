"""All memory that the blocks of a stream may ever lie in, taken once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from headrace.model.layout import align_up
from headrace.planning.plan import TRAVELLING, Placement
from headrace.streaming.arena import Arena, Memory, Piece
from headrace.streaming.device import Device
from headrace.streaming.fetch import Slot


class StreamMemory:
    """A place for each block that stays, slots for those that travel, and stores on the host they travel from.

    `sizes`: bytes of each block as the device holds it. The stream that made it closes it.
    """

    def __init__(
        self, device: Device, *, sizes: Sequence[int], placements: Sequence[Placement], slots: int, slot_bytes: int
    ) -> None:
        self._sizes, self._where, self._device = sizes, placements, device
        largest = max((size for size, own in zip(sizes, placements, strict=True) if own in TRAVELLING), default=0)
        if largest > slot_bytes:
            raise ValueError(f"a slot of {slot_bytes} bytes cannot hold a block of {largest}")
        self.slots = slots if largest else 0
        resident_bytes = sum(size for size, own in zip(sizes, placements, strict=True) if own is Placement.DEVICE)
        self.device_bytes = resident_bytes + self.slots * slot_bytes
        self.host_bytes = 0
        self._held: list[Memory] = []
        try:
            memory = device.allocate(self.device_bytes)
            self._held.append(memory)
            stores, own_memory = self._allocate_host(Placement.HOST), self._allocate_host(Placement.CPU)
            self.stores_pinned = stores is None or stores.pinned
            """whether the system let the host memory that blocks travel from be page-locked"""
            self.places: list[Piece | None] = []
            """of each block that stays, on the device or on the host for the CPU; None of one that travels"""
            self.stores: list[Piece | None] = []
            """on the host, of each block that travels from there"""
            for size, own in zip(sizes, placements, strict=True):
                place = memory.take(size) if own is Placement.DEVICE else None
                self.places.append(_take(own_memory, size) if own is Placement.CPU else place)
                self.stores.append(_take(stores, size) if own is Placement.HOST else None)
            self.free_slots = deque(Slot(memory.take(slot_bytes)) for _ in range(self.slots))
        except BaseException:
            self.close()
            raise

    def _allocate_host(self, placement: Placement) -> Arena | None:
        total = sum(align_up(size) for size, own in zip(self._sizes, self._where, strict=True) if own is placement)
        if not total:
            return None
        arena = self._device.allocate_host(total) if placement is Placement.HOST else Arena(total)
        self._held.append(arena)
        self.host_bytes += total
        return arena

    def close(self) -> None:
        """Give all of it back; a device's memory goes with the last view of it, so views are dropped too."""
        for memory in self._held:
            memory.close()
        self.places = self.stores = [None] * len(self._sizes)
        self.free_slots = deque()


def _take(arena: Arena | None, size_bytes: int) -> Piece:
    """A place for a block in host memory, seen without the page's rest."""
    assert arena is not None
    piece = arena.take(align_up(size_bytes))
    return Piece(piece.tensor[:size_bytes], piece.buffer[:size_bytes])
