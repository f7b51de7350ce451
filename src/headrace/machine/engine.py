"""What software makes of a machine: which share of its rates is reached, and the fixed times per layer and pass.

An `Engine` is a way to run, not a product's specification: its constants are those that published measurements of
such software imply (docs/formulas.md tells how they were fitted, on which rows, and how well they hold on others).
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.machine.quantity import Quantity

_NONE = Quantity(0.0, 0.0, 0.0, "not seen apart")
_ALL = Quantity(1.0, 0.3, 1.0, "measured with NCCL; engines' own kernels have less")
_SPREAD = Quantity(1.0, 0.8, 1.25, "held-out residuals of published rows, docs/formulas.md")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Shares of peak rates (0 to 1) and fixed seconds."""

    name: str
    memory_share: Quantity
    """of the device's memory bandwidth, while weights are read by small batches"""
    compute_share: Quantity
    """of the achievable matrix rate (Processor.achievable x peak), in large products"""
    attention_share: Quantity
    """of the memory bandwidth, while the KV cache is read"""
    layer_overhead_s: Quantity
    """per layer and pass on one device: launches, norms, what does not overlap"""
    split_overhead_s: Quantity
    """added per layer where its width is split over devices of a node, beside the collective's own bytes"""
    pass_overhead_s: Quantity
    """per pass: sampling, scheduling, the interpreter"""
    link_share: Quantity
    """of a link's achieved rate, while weights stream"""
    quantised_share: Quantity
    """of the memory bandwidth share, where weights are unpacked from 4 or 8 bits while they are read"""
    across_overhead_s: Quantity = _NONE
    """added per layer besides where the width spans computers"""
    exchange_excess: Quantity = _ALL
    """of what a measured all-reduce takes beyond latency and bandwidth in the middle sizes: 1 with NCCL on A100, less
    with kernels of an engine's own"""
    token_overhead_s: Quantity = _NONE
    """per sequence and pass: sampling, scheduling, answering"""
    overlaps_hops: bool = True
    """whether reading from disk goes on while the host's memory is copied to the device"""
    overlaps_copies: bool = True
    """whether copies to the device go on while it computes; False where measured prefetching brought nothing"""
    spread: Quantity = _SPREAD
    """factor on every time: how far such software is off the formulas (held-out residuals)"""


PRESENT = Engine(
    name="present",
    memory_share=Quantity(0.80, 0.60, 0.95, "formulas.md section 2: 0.63-0.97 over published engines"),
    compute_share=Quantity(0.85, 0.60, 1.0, "of the measured matrix rate; formulas.md section 2"),
    attention_share=Quantity(0.60, 0.35, 0.90, "estimate; attention kernels at small batches"),
    layer_overhead_s=Quantity(15e-6, 4e-6, 60e-6, "Erdil: 4 us a launch x 4 products per layer"),
    split_overhead_s=Quantity(50e-6, 30e-6, 90e-6, "formulas.md section 4: b of a/n + b, 50-80 us per layer"),
    pass_overhead_s=Quantity(0.5e-3, 0.1e-3, 3e-3, "estimate; sampling and scheduling"),
    link_share=Quantity(0.95, 0.80, 1.0, "pinned copies in large blocks"),
    quantised_share=Quantity(0.85, 0.55, 1.0, "formulas.md section 2: Q4 rows against f16 rows"),
)
"""Well-kept software of today, unknown otherwise."""
