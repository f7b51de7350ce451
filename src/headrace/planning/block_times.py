"""Seconds that blocks take of each resource, and their sums over a pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from headrace.errors import MachineError
from headrace.model.model import Model
from headrace.planning.memory import cache_bytes, offloads_cache
from headrace.planning.plan import TRAVELLING, EmbeddingPlacement, Placement
from headrace.planning.rates import Rates
from headrace.planning.scenario import Scenario
from headrace.planning.workload import Workload


class BlockTimes(NamedTuple):
    """Seconds that a block takes of each resource, alone."""

    read_s: float
    """of the disk"""
    prefill_s: float
    decode_s: float
    """of the device or the CPU in a prefill and a decode pass; for CPU layers including moving the activations"""
    copy_s: float = 0.0
    """of the link, from host memory to the device; 0: the block is computed where it is read to"""
    store_s: float = 0.0
    """of a reader, to write the block into its store in host memory once, while it is read (HOST, CPU)"""
    stage_s: float = 0.0
    """of a reader, to bring the block from a store that is not page-locked into the ring (HOST); 0: it is"""
    pieces: int = 8
    """in which the block is read and copied"""

    @property
    def first_read_s(self) -> float:
        """Reading into a store: one reader reads a piece while another one writes the piece before."""
        return max(self.read_s, self.store_s) + min(self.read_s, self.store_s) / self.pieces


class PassDemand(NamedTuple):
    """Seconds of each resource that a decode pass needs, whatever the order."""

    read_s: float
    """of the readers: from the disk, and out of stores that are not page-locked"""
    copy_s: float
    compute_s: float
    """of the device and of the CPU, which take turns, with the pass's overhead"""

    @classmethod
    def of(cls, blocks: Sequence[BlockTimes], placements: Sequence[Placement], *, overhead_s: float) -> PassDemand:
        """Sum up."""
        read_s = copy_s = 0.0
        compute_s = overhead_s
        for times, placement in zip(blocks, placements, strict=True):
            compute_s += times.decode_s
            if placement is Placement.DISK:
                read_s += times.read_s
                copy_s += times.copy_s
            elif placement is Placement.HOST:
                read_s += times.stage_s
                copy_s += times.copy_s
        return cls(read_s, copy_s, compute_s)


def pass_overheads(
    model: Model, work: Workload, rates: Rates, embedding: EmbeddingPlacement | None
) -> tuple[float, float]:
    """Seconds of the first and of a further pass outside of its blocks.

    With the rows that each looks up one by one, on the disk or the host; None counts no rows.
    """
    row_s = {EmbeddingPlacement.ROWS: rates.row_s, EmbeddingPlacement.HOST: rates.host_row_s}.get(
        embedding or EmbeddingPlacement.HEAD, 0.0
    )
    first, further = (distinct_rows(model.vocab_size, work.sequences * each) for each in (work.prompt_tokens, 1))
    own = rates.pass_overhead_s if rates.first_pass_overhead_s is None else rates.first_pass_overhead_s
    return own + row_s * first, rates.pass_overhead_s + row_s * further


def distinct_rows(vocabulary: int, tokens: int) -> float:
    """How many distinct rows so many tokens look up, drawn evenly from the vocabulary; text needs fewer."""
    return vocabulary * -math.expm1(tokens * math.log1p(-1 / vocabulary)) if vocabulary > 1 else 1.0


def block_times(
    scenario: Scenario,
    placements: Sequence[Placement],
    *,
    workload: Workload | None = None,
    cache_on_host: bool = False,
) -> tuple[BlockTimes, ...]:
    """Seconds of each block where `placements` puts it; `workload` in place of the scenario's.

    With `cache_on_host` a layer's keys and values visit the device for its turn, those of a context of middle length:
    with the block over the link, or, where that stays, before it is computed. Raises MachineError where the CPU is to
    compute a block and was not measured.
    """
    model, rates = scenario.model, scenario.known_rates
    work = scenario.workload if workload is None else workload
    prefill_tokens, decode_tokens = work.sequences * work.prompt_tokens, work.sequences * scenario.tokens_checked
    timed = {block.kind: block.active_parameters for block in reversed(model.blocks) if block.head_rows is None}
    caches: tuple[int, ...] = ()
    if cache_on_host:
        middle = work.prompt_tokens + work.generate_tokens // 2
        caches = cache_bytes(model, work, scenario.compute_dtype, tokens=middle)
    found = []
    for index, (block, placement) in enumerate(zip(model.blocks, placements, strict=True)):
        share = block.active_parameters / timed.get(block.kind, 1.0)  # of the first layer of its kind, which is timed
        layer = rates.layer_of(block.kind) if block.head_rows is None else None
        copy_s = 0.0
        if placement is Placement.CPU:
            if rates.cpu_layer is None or block.head_rows is not None:
                raise MachineError(f"how long the CPU takes for {block.name} of {model.name} was not measured")
            share = block.active_parameters / timed[0]  # of the first kind, whichever the block is of
            prefill_s = rates.cpu_layer.prefill_s * share + rates.activation_transfer_s(prefill_tokens)
            decode_s = rates.cpu_layer.decode_s * share + rates.activation_transfer_s(decode_tokens)
        else:
            if layer is not None:
                prefill_s, decode_s = layer.prefill_s * share, layer.decode_s * share
            else:
                prefill_s = rates.block_seconds(block, tokens=prefill_tokens, head_tokens=decode_tokens)
                decode_s = rates.block_seconds(block, tokens=decode_tokens, head_tokens=decode_tokens)
            if not scenario.on_cpu:
                copy_s = block.held_bytes / rates.link_bytes_per_s + rates.copy_latency_s
            if cache_on_host and offloads_cache(block):
                visit_s = caches[index] / rates.link_bytes_per_s + rates.copy_latency_s
                if placement in TRAVELLING:
                    copy_s += visit_s
                else:
                    decode_s += visit_s
        on_host, staged = placement in (Placement.HOST, Placement.CPU), placement is Placement.HOST
        found.append(
            BlockTimes(
                read_s=block.read_bytes / rates.read_bytes_per_s,
                prefill_s=prefill_s,
                decode_s=decode_s,
                copy_s=copy_s,
                store_s=block.held_bytes / rates.memory_copy_bytes_per_s if on_host else 0.0,
                stage_s=block.held_bytes / rates.staged_bytes_per_s if staged and not scenario.pinned else 0.0,
                pieces=max(1, -(-block.read_bytes // scenario.chunk_bytes)),
            )
        )
    return tuple(found)
