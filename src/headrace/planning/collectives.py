"""Seconds of collective operations between devices (formulas.md, section 5).

`size_bytes` is always the whole tensor; rates are bytes per second of one device in one direction.
"""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

_MEASURED_S = (
    # bytes, seconds: all-reduce over four A100 with NVLink 3 (LLMCompass), formulas.md section 5
    (1024.0, 12.5e-6),
    (65536.0, 22.9e-6),
    (1048576.0, 60.8e-6),
    (8388608.0, 128.8e-6),
)
_MEASURED_BYTES_PER_S, _MEASURED_PEAK_BYTES_PER_S = 300e9, 234e9


class Wire(NamedTuple):
    """What connects each of some devices with the others."""

    bytes_per_s: float = math.inf
    latency_s: float = 0.0

    def message_s(self, size_bytes: float) -> float:
        """Seconds of one message."""
        return self.latency_s + size_bytes / self.bytes_per_s


def ring_all_gather(size_bytes: float, devices: int, wire: Wire) -> float:
    """Gather a tensor of which each device holds 1/n, or scatter-reduce it: n-1 steps of 1/n."""
    return (devices - 1) * wire.latency_s + (devices - 1) / devices * size_bytes / wire.bytes_per_s


def ring_all_reduce(size_bytes: float, devices: int, wire: Wire) -> float:
    """Reduce-scatter and all-gather."""
    return 2.0 * ring_all_gather(size_bytes, devices, wire)


def tree_all_reduce(size_bytes: float, devices: int, wire: Wire) -> float:
    """Two sweeps over a binary tree, pipelined."""
    return 2.0 * math.log2(devices) * wire.latency_s + 2.0 * size_bytes / wire.bytes_per_s


def direct_all_reduce(size_bytes: float, devices: int, wire: Wire) -> float:
    """Every device takes a part from each other one over a switch, adds it up and hands it to all: two steps."""
    return 2.0 * wire.latency_s + 2.0 * (devices - 1) / devices * size_bytes / wire.bytes_per_s


def all_reduce(size_bytes: float, devices: int, wire: Wire, *, excess_share: float = 1.0) -> float:
    """All-reduce within a node: the fastest of ring, tree and direct exchange, and the measured curve's shape.

    Latency plus size over bandwidth alone is wrong by a factor of 2 to 3 in the middle sizes (64 KiB to 8 MiB), where
    the protocols that are fast for small messages reach only a part of the bandwidth. The curve measured on four
    A100 is carried over: its excess over latency plus bandwidth, scaled by the bandwidths' ratio and by
    `excess_share` (engines with kernels of their own have less of it).
    """
    if devices <= 1:
        return 0.0
    ways = (ring_all_reduce, tree_all_reduce, direct_all_reduce)
    ideal_s = min(way(size_bytes, devices, wire) for way in ways)
    return ideal_s + excess_share * _excess_s(size_bytes) * min(1.0, _MEASURED_BYTES_PER_S / wire.bytes_per_s)


def hierarchical_all_reduce(
    size_bytes: float, devices_per_node: int, nodes: int, *, within: Wire, between: Wire, excess_share: float = 1.0
) -> float:
    """Reduce-scatter in each node, all-reduce of the parts between nodes, all-gather in each node."""
    within_s = all_reduce(size_bytes, devices_per_node, within, excess_share=excess_share)
    if nodes <= 1:
        return within_s
    part_bytes = size_bytes / devices_per_node
    return within_s + min(ring_all_reduce(part_bytes, nodes, between), tree_all_reduce(part_bytes, nodes, between))


def _excess_s(size_bytes: float) -> float:
    """What the measured curve takes beyond latency and bandwidth, by interpolation in log size; 0 at both ends."""
    latency_s = _MEASURED_S[0][1]
    points = [
        (size, max(0.0, seconds - latency_s - size * 1.5 / _MEASURED_PEAK_BYTES_PER_S)) for size, seconds in _MEASURED_S
    ]
    points.append((256.0 * 2**20, 0.0))
    if size_bytes <= points[0][0] or size_bytes >= points[-1][0]:
        return 0.0
    upper = bisect.bisect_right([size for size, _ in points], size_bytes)
    (low_size, low_s), (high_size, high_s) = points[upper - 1], points[upper]
    share = math.log(size_bytes / low_size) / math.log(high_size / low_size)
    return low_s + share * (high_s - low_s)
