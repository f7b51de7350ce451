"""The seam to the computing device: whose memory slots are, how bytes get there, when a computation has read them.

On a CPU reads land in the slot itself and a computation is over when its call returns, so every event is complete at
once. An accelerator implements the same four calls with a copy stream, a compute stream and real events; the
stream's ordering rests on them alone (see `fake_device.py` for one whose events a test completes).
"""

from __future__ import annotations

from typing import Protocol

import torch

from headrace.streaming.arena import Arena


class DeviceEvent(Protocol):
    """A point in the device's work."""

    def wait(self) -> None:
        """Block the calling thread until the device has passed this point."""


class Device(Protocol):
    """What the stream needs of a device."""

    name: str
    lands_in_place: bool
    """reads go straight into slots (host memory); otherwise through a page-locked ring and `copy_in`"""

    def allocate(self, size_bytes: int) -> Arena:
        """Take all memory for residents and slots at once; owner: the stream, until `Arena.close`."""

    def copy_in(self, host: torch.Tensor, slot: torch.Tensor) -> DeviceEvent:
        """Start copying `host` (uint8) to `slot` (uint8, same length) and return the event of its completion."""

    def compute_after(self, event: DeviceEvent) -> None:
        """Let all computation enqueued from now on wait for `event`, without blocking the host."""

    def computed(self) -> DeviceEvent:
        """Return the event of everything enqueued for computation so far."""


class _Complete:
    """An event that lies in the past."""

    def wait(self) -> None:
        return


COMPLETE: DeviceEvent = _Complete()


class CpuDevice:
    """The processor itself: slots are host memory, calls are synchronous."""

    name = "cpu"
    lands_in_place = True

    def allocate(self, size_bytes: int) -> Arena:
        """Take anonymous private memory on huge pages, all of it now."""
        arena = Arena(size_bytes)
        arena.touch()
        return arena

    def copy_in(self, host: torch.Tensor, slot: torch.Tensor) -> DeviceEvent:
        """Copy now; used only by callers that do not read in place."""
        slot.copy_(host)
        return COMPLETE

    def compute_after(self, event: DeviceEvent) -> None:
        """Wait on the host: there is no queue to put the wait into."""
        event.wait()

    def computed(self) -> DeviceEvent:
        """Everything called has returned."""
        return COMPLETE
