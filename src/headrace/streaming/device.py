"""The seam to the computing device: whose memory slots are, how bytes get there, when a computation has read them.

On a CPU reads land in the slot itself and a computation is over when its call returns, so every event is complete at
once (`CpuDevice`, here). An accelerator (`cuda_device.py`) has memory of its own: bytes come through page-locked host
memory, by copies that go on beside the computation, and events alone order the two. The stream rests on nothing else;
`fake_device.py` is an accelerator whose queues a test drives.

Two orders keep every run right, and both are events given to this seam:
  a copy into a slot comes after the computation that read what was there  (`copy(..., after=[computed()])`)
  a computation with a block comes after the copy that brought it          (`compute_after(copied.end)`)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from headrace.streaming.arena import Arena, Memory

COPY_LANES = 3
STORE_LANE, DISK_LANE, CACHE_LANE = range(COPY_LANES)
"""Queues of copies: blocks from host memory, what comes from the disk, keys and values; none waits for another."""


class DeviceEvent(Protocol):
    """A point in the device's work."""

    def wait(self) -> None:
        """Block the calling thread until the device has passed this point."""

    def passed(self) -> bool:
        """Whether the device has passed this point already; never blocks."""

    def moment_s(self) -> float:
        """When it was passed, on the clock of `time.perf_counter`; only for an event that has passed."""


class Copied(NamedTuple):
    """A copy on its way: when its first byte moves, and when its last one is there."""

    begin: DeviceEvent
    end: DeviceEvent


class CopyPart(NamedTuple):
    """Bytes to move: two tensors of uint8, of the same length, one on the host and one on the device."""

    source: torch.Tensor
    target: torch.Tensor


class DeviceMemory(NamedTuple):
    """The device's own memory, as its driver counts it; bytes of all processes together."""

    free_bytes: int
    total_bytes: int


class Device(Protocol):
    """What the stream needs of a device. Calls may come from several threads."""

    name: str
    """as users write it: `cpu`, `cuda:0`"""
    torch_device: torch.device
    uses_host_memory: bool
    """reads go straight into slots (host memory); otherwise through page-locked memory and `copy`"""

    def allocate(self, size_bytes: int) -> Memory:
        """Take memory of the device, all of it now; raises BudgetError. Owner: the caller, until `Memory.close`."""

    def allocate_host(self, size_bytes: int) -> Arena:
        """Take host memory that this device copies from and to fastest. Owner: the caller, until `Arena.close`.

        Page-locked (`Arena.pinned`) where the system allows it, ordinary otherwise.
        """

    def copy(self, parts: Sequence[CopyPart], *, after: Sequence[DeviceEvent] = (), lane: int = 0) -> Copied:
        """Start copying once the device has passed all of `after`; never blocks the host.

        Copies of one lane (0 to COPY_LANES - 1) follow one another in the order of the calls; lanes know nothing of
        one another. Host memory must be page-locked and must stay as it is until `Copied.end` has passed.
        """

    def fill(self, target: torch.Tensor, value: int, *, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        """Overwrite device memory, ordered as a copy of lane 0 is; returns the event of its completion."""

    def compute_after(self, event: DeviceEvent) -> None:
        """Let all computation enqueued from now on wait for `event`, without blocking the host."""

    def computed(self) -> DeviceEvent:
        """Return the event of everything enqueued for computation so far."""

    def synchronize(self) -> None:
        """Block until nothing is enqueued any more. Not for use within a pass."""

    def memory(self) -> DeviceMemory | None:
        """Free and total memory; None where the device's memory is the host's."""

    def held_bytes(self) -> int:
        """What this process's allocator holds of the device's memory now, by its own counter."""

    def peak_bytes(self) -> int:
        """The most that it held since `reset_peak`."""

    def reset_peak(self) -> None:
        """Let the high-water mark start again from what is held now."""

    def release_cached(self) -> None:
        """Give back what the allocator only keeps for reuse. Not for use within a pass."""

    def reserve(self, size_bytes: int) -> None:
        """Let the allocator take so much now and keep it for what comes, so that nobody else can; or BudgetError."""


class _Complete:
    """An event that lies in the past."""

    def wait(self) -> None:
        return

    def passed(self) -> bool:
        return True

    def moment_s(self) -> float:
        return 0.0


COMPLETE: DeviceEvent = _Complete()


class CpuDevice:
    """The processor itself: slots are host memory, calls are synchronous."""

    name = "cpu"
    torch_device = torch.device("cpu")
    uses_host_memory = True

    def allocate(self, size_bytes: int) -> Arena:
        """Take anonymous private memory on huge pages, all of it now."""
        arena = Arena(size_bytes)
        arena.touch()
        return arena

    def allocate_host(self, size_bytes: int) -> Arena:
        """The same: there is one memory."""
        return self.allocate(size_bytes)

    def copy(self, parts: Sequence[CopyPart], *, after: Sequence[DeviceEvent] = (), lane: int = 0) -> Copied:
        """Copy now."""
        del lane
        for event in after:
            event.wait()
        for part in parts:
            part.target.copy_(part.source)
        return Copied(COMPLETE, COMPLETE)

    def fill(self, target: torch.Tensor, value: int, *, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        """Overwrite now."""
        for event in after:
            event.wait()
        target.fill_(value)
        return COMPLETE

    def compute_after(self, event: DeviceEvent) -> None:
        """Wait on the host: there is no queue to put the wait into."""
        event.wait()

    def computed(self) -> DeviceEvent:
        """Everything called has returned."""
        return COMPLETE

    def synchronize(self) -> None:
        """Nothing is ever enqueued."""

    def memory(self) -> DeviceMemory | None:
        """None: the operating system counts it."""
        return None

    def held_bytes(self) -> int:
        """Nothing beside the host's memory."""
        return 0

    def peak_bytes(self) -> int:
        """Nothing beside the host's memory."""
        return 0

    def reset_peak(self) -> None:
        """Nothing to reset."""

    def release_cached(self) -> None:
        """Nothing is kept."""

    def reserve(self, size_bytes: int) -> None:
        """Memory of the host is given when it is touched."""
