"""The link alone: copies of a block's size out of page-locked memory, through the same seam that the stream uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from headrace.model.layout import align_up
from headrace.streaming.device import CopyPart, Device

PLACES = 2
"""on either side, in turn, as the stream's slots are"""


class RawLink(NamedTuple):
    """Memory on both sides of the link."""

    device: Device
    sources: tuple[torch.Tensor, ...]
    targets: tuple[torch.Tensor, ...]
    pinned: bool

    def bytes_per_s(self, copies: int) -> float:
        """Of so many copies in a row, from the first one's first byte to the last one's last."""
        done = [
            self.device.copy([CopyPart(self.sources[number % PLACES], self.targets[number % PLACES])])
            for number in range(copies)
        ]
        done[-1].end.wait()
        return copies * self.sources[0].numel() / (done[-1].end.moment_s() - done[0].begin.moment_s())


@contextmanager
def raw_link(device: Device, block_bytes: int) -> Iterator[RawLink]:
    """Hold twice `block_bytes` on either side."""
    size = align_up(block_bytes)
    host = device.allocate_host(PLACES * size)
    try:
        memory = device.allocate(PLACES * size)
        try:
            sources = tuple(host.take(size).tensor for _ in range(PLACES))
            targets = tuple(memory.take(size).tensor for _ in range(PLACES))
            yield RawLink(device, sources, targets, host.pinned)
        finally:
            device.synchronize()
            del sources, targets
            memory.close()
    finally:
        host.close()
