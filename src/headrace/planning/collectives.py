"""Seconds of collective operations between devices (formulas.md, section 5).

`size_bytes` is always the whole tensor; rates are bytes per second of one device in one direction.
"""

from __future__ import annotations

import bisect
import math

_MEASURED_S = (
    # bytes, seconds: all-reduce over four A100 with NVLink 3 (LLMCompass), formulas.md section 5
    (1024.0, 12.5e-6),
    (65536.0, 22.9e-6),
    (1048576.0, 60.8e-6),
    (8388608.0, 128.8e-6),
)
_MEASURED_DEVICES, _MEASURED_BYTES_PER_S, _MEASURED_PEAK_BYTES_PER_S = 4, 300e9, 234e9


def ring_all_gather(size_bytes: float, devices: int, *, bytes_per_s: float, latency_s: float) -> float:
    """Gather a tensor of which each device holds 1/n, or scatter-reduce it: n-1 steps of 1/n."""
    if devices <= 1:
        return 0.0
    return (devices - 1) * latency_s + (devices - 1) / devices * size_bytes / bytes_per_s


def ring_all_reduce(size_bytes: float, devices: int, *, bytes_per_s: float, latency_s: float) -> float:
    """Reduce-scatter and all-gather."""
    return 2.0 * ring_all_gather(size_bytes, devices, bytes_per_s=bytes_per_s, latency_s=latency_s)


def tree_all_reduce(size_bytes: float, devices: int, *, bytes_per_s: float, latency_s: float) -> float:
    """Two sweeps over a binary tree, pipelined."""
    if devices <= 1:
        return 0.0
    return 2.0 * math.log2(devices) * latency_s + 2.0 * size_bytes / bytes_per_s


def direct_all_reduce(size_bytes: float, devices: int, *, bytes_per_s: float, latency_s: float) -> float:
    """Every device takes a part from each other one over a switch, adds it up and hands it to all: two steps."""
    if devices <= 1:
        return 0.0
    return 2.0 * latency_s + 2.0 * (devices - 1) / devices * size_bytes / bytes_per_s


def all_reduce(
    size_bytes: float, devices: int, *, bytes_per_s: float, latency_s: float, excess_share: float = 1.0
) -> float:
    """All-reduce within a node: the fastest of ring, tree and direct exchange, and the measured curve's shape.

    Latency plus size over bandwidth alone is wrong by a factor of 2 to 3 in the middle sizes (64 KiB to 8 MiB), where
    the protocols that are fast for small messages reach only a part of the bandwidth. The curve measured on four
    A100 is carried over: its excess over latency plus bandwidth, scaled by the bandwidths' ratio and by
    `excess_share` (engines with kernels of their own have less of it).
    """
    if devices <= 1:
        return 0.0
    ideal_s = min(
        ring_all_reduce(size_bytes, devices, bytes_per_s=bytes_per_s, latency_s=latency_s),
        tree_all_reduce(size_bytes, devices, bytes_per_s=bytes_per_s, latency_s=latency_s),
        direct_all_reduce(size_bytes, devices, bytes_per_s=bytes_per_s, latency_s=latency_s),
    )
    return ideal_s + excess_share * _excess_s(size_bytes) * min(1.0, _MEASURED_BYTES_PER_S / bytes_per_s)


def hierarchical_all_reduce(
    size_bytes: float,
    *,
    devices_per_node: int,
    nodes: int,
    scale_up_bytes_per_s: float,
    scale_up_latency_s: float,
    network_bytes_per_s: float,
    network_latency_s: float,
    excess_share: float = 1.0,
) -> float:
    """Reduce-scatter in each node, all-reduce of the parts between nodes, all-gather in each node."""
    within_s = all_reduce(
        size_bytes,
        devices_per_node,
        bytes_per_s=scale_up_bytes_per_s,
        latency_s=scale_up_latency_s,
        excess_share=excess_share,
    )
    if nodes <= 1:
        return within_s
    part_bytes = size_bytes / devices_per_node
    between_s = min(
        ring_all_reduce(part_bytes, nodes, bytes_per_s=network_bytes_per_s, latency_s=network_latency_s),
        tree_all_reduce(part_bytes, nodes, bytes_per_s=network_bytes_per_s, latency_s=network_latency_s),
    )
    return within_s + between_s


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
