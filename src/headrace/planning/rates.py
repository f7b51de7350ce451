"""How fast the parts go that a plan uses: disk, link, arithmetic, overheads, exchanges, what slows what."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from headrace.errors import MachineError
from headrace.machine.compute_curve import ComputeCurve
from headrace.model.blocks import Block
from headrace.planning.collectives import Wire


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Seconds that one decoder layer of this model was seen to take on this machine, alone, whole block."""

    prefill_s: float
    decode_s: float

    def scaled(self, factor: float) -> LayerTimes:
        """The same layer in so many times the seconds."""
        return LayerTimes(prefill_s=self.prefill_s * factor, decode_s=self.decode_s * factor)


class Peaks(NamedTuple):
    """What a described device and its host's CPU reach in large products and long reads; per second."""

    flops: float = math.inf
    attention_flops: float = math.inf
    """in the products of attention proper"""
    memory_bytes_per_s: float = math.inf
    """while weights are read by small batches"""
    cache_bytes_per_s: float = math.inf
    """while keys and values are read"""
    cpu_flops: float = 0.0
    cpu_memory_bytes_per_s: float = 0.0


class Exchange(NamedTuple):
    """What devices that share the work take to exchange results; seconds."""

    peer: Wire = Wire()
    """between devices of a node"""
    network: Wire = Wire()
    """between nodes"""
    split_overhead_s: float = 0.0
    """per layer of a split width"""
    across_overhead_s: float = 0.0
    """per layer, in addition, of a width that is split over nodes"""
    excess: float = 1.0
    """by how much an exchange takes longer than its bytes and latencies say"""


NO_PEAKS, NO_EXCHANGE = Peaks(), Exchange()


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The constants of one plan; seconds, bytes per second.

    Arithmetic is known by measured curves (`curve`) or by a description's `peaks`. Where the host's CPU computes there
    is no link: copies take no time. Reading and computing slow one another only there, since an accelerator shares no
    memory with the disk.
    """

    read_bytes_per_s: float = math.inf
    """of the disk, no faster than the reader's limit"""
    curve: ComputeCurve | None = None
    """measured arithmetic of the device, in the chosen dtypes"""
    peaks: Peaks = NO_PEAKS
    block_overhead_s: float
    pass_overhead_s: float
    compute_slowdown: float = 1.0
    read_slowdown: float = 1.0
    layers: tuple[LayerTimes, ...] = ()
    """as timed with the model's own first layer of each kind; empty: by the curve"""
    head_curve: ComputeCurve | None = None
    """arithmetic of the head, where it was measured apart"""
    first_pass_overhead_s: float | None = None
    """of the first pass outside of its blocks (masks and positions of whole prompts); None: that of every pass"""
    row_s: float = 0.0
    """per distinct row of the embedding that is read from the checkpoint"""
    host_row_s: float = 0.0
    """per distinct row of an embedding table in host memory: gathered there, and copied to the device"""
    read_latency_s: float = 0.0
    """from asking an idle reader for a block until its bytes come, and from the last byte to the asker"""
    stall_penalty_s: float = 0.0
    """extra compute seconds of a block that had to wait for its weights"""
    link_bytes_per_s: float = math.inf
    """out of page-locked host memory, while the device computes"""
    staged_bytes_per_s: float = math.inf
    """out of host memory that could not be page-locked into the ring, by the readers"""
    memory_copy_bytes_per_s: float = math.inf
    """from the ring into a store in host memory, by the readers, in the first pass"""
    copy_latency_s: float = 0.0
    """per copied block"""
    cpu_layer: LayerTimes | None = None
    """one layer computed by the CPU for an accelerator; None where it computes none"""
    activation_latency_s: float = 0.0
    """from the device to the CPU and back, per layer and pass"""
    activation_s_per_token: float = 0.0
    """in addition for each token whose activations go there and back"""

    token_overhead_s: float = 0.0
    """per sequence and pass: sampling, scheduling"""
    exchange: Exchange = NO_EXCHANGE
    overlaps_hops: bool = True
    """reading and copying go on at once"""
    overlaps_copies: bool = True
    """copying and computing go on at once"""

    @property
    def known_curve(self) -> ComputeCurve:
        """The measured arithmetic; raises MachineError where it is only described."""
        if self.curve is None:
            raise MachineError("the arithmetic of this device is described, not measured")
        return self.curve

    def block_seconds(self, block: Block, *, tokens: float, head_tokens: float) -> float:
        """Seconds to compute a block for a pass of `tokens` tokens, from the curve."""
        if block.head_rows is not None:
            curve = self.head_curve or self.known_curve
            return block.active_parameters * curve.seconds_per_parameter(head_tokens)
        # Converting touches every stored parameter; a mixture of experts computes only with the active ones.
        return self.block_overhead_s + block.active_parameters * self.known_curve.seconds_per_parameter(tokens)

    def activation_transfer_s(self, tokens: float) -> float:
        """Seconds that moving the activations adds to a layer of the CPU."""
        return self.activation_latency_s + tokens * self.activation_s_per_token

    def layer_of(self, kind: int) -> LayerTimes | None:
        """The times of a layer of this kind, or of the first kind where it was not timed; None: none was."""
        return self.layers[kind if kind < len(self.layers) else 0] if self.layers else None

    def with_prefill(self, factor: float) -> Rates:
        """The same where prompts, which layers were timed with, take so many times the seconds."""
        return replace(self, layers=tuple(replace(layer, prefill_s=layer.prefill_s * factor) for layer in self.layers))

    def scaled(self, *, read: float = 1.0, compute: float = 1.0, link: float = 1.0) -> Rates:
        """The same with the disk's and the link's rates, and the seconds of computing, times a factor."""
        return replace(
            self,
            read_bytes_per_s=self.read_bytes_per_s * read,
            curve=self.known_curve.scaled(compute),
            head_curve=None if self.head_curve is None else self.head_curve.scaled(compute),
            layers=tuple(layer.scaled(compute) for layer in self.layers),
            block_overhead_s=self.block_overhead_s * compute,
            pass_overhead_s=self.pass_overhead_s * compute,
            link_bytes_per_s=self.link_bytes_per_s * link,
            staged_bytes_per_s=self.staged_bytes_per_s * link,
            cpu_layer=None if self.cpu_layer is None else self.cpu_layer.scaled(compute),
        )
