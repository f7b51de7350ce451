"""A processor with events that complete only when the test says so, for provoking ordering errors.

Reads land in place; `fake_accelerator.py` has the device with memory and queues of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from headrace.streaming.arena import Arena
from headrace.streaming.device import Copied, CopyPart, CpuDevice, DeviceEvent


class FakeEvent:
    """An event that a test completes; `wait` blocks until then (and fails after `patience_s`, so no test hangs)."""

    patience_s = 30.0

    def __init__(self) -> None:
        self._done = threading.Event()

    def complete(self) -> None:
        """Let everybody pass who waits."""
        self._done.set()

    def wait(self) -> None:
        """Block until completed."""
        if not self._done.wait(self.patience_s):
            raise TimeoutError("a fake event was never completed")

    def passed(self) -> bool:
        """Whether it was completed."""
        return self._done.is_set()

    def moment_s(self) -> float:
        """No clock."""
        return 0.0


class FakeDevice(CpuDevice):
    """Host memory that behaves like a device whose computation lags behind its calls."""

    name = "fake"

    def __init__(self) -> None:
        self.events: list[FakeEvent] = []
        """one per `computed` call, in order"""

    def allocate(self, size_bytes: int) -> Arena:
        """Take ordinary memory."""
        return Arena(size_bytes)

    def copy(self, parts: Sequence[CopyPart], *, after: Sequence[DeviceEvent] = (), lane: int = 0) -> Copied:
        """Copy at once, but report completion only when the test completes the event."""
        begun = super().copy(parts, after=after, lane=lane).begin
        return Copied(begun, self.computed())

    def fill(self, target: torch.Tensor, value: int, *, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        """Overwrite as soon as the test lets `after` pass."""
        return super().fill(target, value, after=after)

    def compute_after(self, event: DeviceEvent) -> None:
        """Nothing to enqueue: the fake has no queue of its own."""

    def computed(self) -> DeviceEvent:
        """A new event, not complete yet."""
        event = FakeEvent()
        self.events.append(event)
        return event
