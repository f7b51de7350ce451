"""What an arrangement of blocks holds, to the byte, on the computing device and on its host.

A CPU has one memory: blocks lie in it in whole pages, as they were read. An accelerator holds them aligned, has a ring
and perhaps stores on the host, and computes a whole head at once. The embedding takes what is left in either memory,
and nothing where nothing is left: its rows can always be read from the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from headrace.dtypes import DTYPES
from headrace.machine.machine import Tier
from headrace.model.blocks import HEAD_CHUNK_ROWS, Block, product_slices
from headrace.model.layout import PAGE_BYTES, align_device, align_up
from headrace.model.model import Layer, Model
from headrace.planning.plan import (
    NOTHING_HELD,
    TRAVELLING,
    Arrangement,
    EmbeddingPlacement,
    Placement,
    TierMemory,
)
from headrace.planning.scenario import Scenario
from headrace.planning.workload import Grouped, Packed, Workload

_PREFILL_CHUNK_TOKENS = 4096
"""engines prefill longer prompts in chunks, so the activations of no more tokens are held at once"""

LIBRARY_WORK_SPACE_BYTES = 64 << 20
"""What an accelerator's matrix libraries keep for themselves, outside of tensors."""

CACHE_LAYERS_ON_DEVICE = 3
"""layers whose keys and values are on the device at once where they wait on the host: two come and go in turn, and one
is laid out for attention"""


class ArrangedMemory(NamedTuple):
    """An arrangement's memory in every tier, and where the embedding's rows come from in what is left."""

    device: TierMemory
    host: TierMemory
    embedding: EmbeddingPlacement
    disk_bytes: int = 0
    """of weights that stay on the disk"""


class MemoryAccount:
    """The bytes of a scenario's arrangements."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._model = scenario.model
        self._element_bytes = DTYPES[scenario.compute_dtype].size_bytes

    @cached_property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of the device's memory that each block takes, in a place of its own or in a slot."""
        if self.scenario.on_cpu:
            return tuple(block.read_bytes for block in self._model.blocks)
        return tuple(block.held_bytes for block in self._model.blocks)

    @cached_property
    def stored_bytes(self) -> tuple[int, ...]:
        """Bytes of host memory that each block takes where it waits there, in whole pages."""
        return tuple(align_up(block.held_bytes) for block in self._model.blocks)

    @cached_property
    def cache_bytes(self) -> tuple[int, ...]:
        """Bytes of each block's keys and values at the end of the run."""
        work = self.scenario.workload
        return cache_bytes(self._model, work, self.scenario.compute_dtype, tokens=work.context_tokens)

    @cached_property
    def ring_bytes(self) -> int:
        """Host memory of the chunks between disk and device."""
        return 0 if self.scenario.on_cpu else self.scenario.ring_chunks * align_up(self.scenario.chunk_bytes)

    @cached_property
    def work_space_bytes(self) -> int:
        """What activations hold at their peak, wherever they are computed."""
        model, scenario, work, packed = self._model, self.scenario, self.scenario.workload, self.scenario.packed
        if isinstance(packed, Packed):
            return model.packed_work_space_bytes(
                pass_tokens=packed.pass_tokens,
                samples=packed.samples,
                context_tokens=packed.longest,
                element_bytes=self._element_bytes,
            )
        checked = 1 + scenario.draft_tokens
        shapes = [
            (work.sequences, work.prompt_tokens, work.prompt_tokens),
            (work.sequences, checked, work.context_tokens),
            (work.sequences * checked, 1, 1),  # logits of drafts
        ]
        if isinstance(packed, Grouped):
            shapes = [(group.sequences, group.first_tokens, group.first_tokens) for group in packed.groups]
            shapes += [(group.sequences, 1, group.positions) for group in packed.groups]
        return max(
            model.work_space_bytes(
                sequences=sequences, new_tokens=new, context_tokens=context, element_bytes=self._element_bytes
            )
            for sequences, new, context in shapes
        )

    @cached_property
    def conversion_bytes(self) -> int:
        """The device's buffer in which one module's weights are widened or put together; 0 where none are.

        Weights are converted module by module (a linear layer's matrix and bias), just before the module computes. A
        CPU converts the head in pieces, an accelerator as a whole.
        """
        head = 0
        for block in self._model.blocks:
            if block.head_rows is not None and self._converts(block):
                rows = count = block.head_rows.last - block.head_rows.first
                if self.scenario.on_cpu:
                    rows = max(part.last - part.first for part in product_slices(count, HEAD_CHUNK_ROWS))
                head = max(head, rows * (block.parameters // count) * self._element_bytes)
        return _buffer_bytes(max(head, self._largest_module_bytes))

    @cached_property
    def cpu_conversion_bytes(self) -> int:
        """The CPU's buffer where it computes layers for an accelerator."""
        return 0 if self.scenario.on_cpu else _buffer_bytes(self._largest_module_bytes)

    def _converts(self, head: Block) -> bool:
        stored = head.stored_as(self._model.stored_dtype)
        return self.scenario.copies_weights or stored != DTYPES[self.scenario.compute_dtype].stored_name

    @cached_property
    def _largest_module_bytes(self) -> int:
        layers = [block for block in self._model.blocks if block.head_rows is None]
        return max(
            block.module_bytes(
                self.scenario.compute_dtype,
                prevailing=self._model.stored_dtype,
                copies=self.scenario.copies_weights,
            )
            for block in layers
        )

    @cached_property
    def _base(self) -> TierMemory:
        """What the device holds whichever blocks stay, keys and values apart."""
        fixed_bytes = align_up(self._model.fixed_parameters * self._element_bytes)
        on_cpu = self.scenario.on_cpu
        return TierMemory(
            fixed_bytes=fixed_bytes + (self._model.fixed_read_bytes if on_cpu else 0),
            conversion_bytes=self.conversion_bytes,
            work_space_bytes=self.work_space_bytes + (0 if on_cpu else LIBRARY_WORK_SPACE_BYTES),
        )

    @cached_property
    def _packed_cache_bytes(self) -> int | None:
        packed = self.scenario.packed
        if packed is None:
            return None
        if isinstance(packed, Grouped):
            work, dtype = self.scenario.workload, self.scenario.compute_dtype
            return max(
                sum(cache_bytes(self._model, replace(work, sequences=group.sequences), dtype, tokens=group.positions))
                for group in packed.groups
            )
        return self._model.kv_pool_bytes(positions=packed.positions, element_bytes=self._element_bytes)

    @property
    def without_blocks_bytes(self) -> int:
        """What the device holds whichever blocks stay, with all keys and values."""
        return self.device(Arrangement((Placement.DISK,) * len(self.block_bytes), 0)).total_bytes

    def _disk_bytes(self, placements: Sequence[Placement], embedding: EmbeddingPlacement) -> int:
        """Bytes of weights that stay on the disk: blocks, and a table that is read row by row."""
        rows = embedding is EmbeddingPlacement.ROWS and not self._model.tied
        pairs = zip(self._model.blocks, placements, strict=True)
        on_disk = sum(block.size_bytes for block, placement in pairs if placement is Placement.DISK)
        return on_disk + (self._model.table_bytes if rows else 0)

    def slot_bytes(self, placements: Sequence[Placement]) -> int:
        """A slot holds the largest block that travels."""
        pairs = zip(self.block_bytes, placements, strict=True)
        return max((size for size, placement in pairs if placement in TRAVELLING), default=0)

    def streamed_bytes(self, placements: Sequence[Placement]) -> int:
        """Bytes that pass through the slots in a pass."""
        pairs = zip(self.block_bytes, placements, strict=True)
        return sum(size for size, placement in pairs if placement in TRAVELLING)

    def cache_sides(self, arrangement: Arrangement) -> tuple[int, int]:
        """Bytes of keys and values on the device and on its host."""
        if self._packed_cache_bytes is not None:
            return self._packed_cache_bytes, 0
        return cache_sides(self._model, self.cache_bytes, arrangement.placements, on_host=arrangement.cache_on_host)

    def device(self, arrangement: Arrangement) -> TierMemory:
        """The device's side, without a table of the embedding: the smallest that the arrangement needs."""
        placed = zip(self.block_bytes, arrangement.placements, strict=True)
        return self._base._replace(
            weights_bytes=sum(size for size, placement in placed if placement is Placement.DEVICE),
            slots_bytes=arrangement.slots * self.slot_bytes(arrangement.placements),
            kv_cache_bytes=self.cache_sides(arrangement)[0],
        )

    def host(self, arrangement: Arrangement) -> TierMemory:
        """The host's side, likewise. Nothing for a CPU."""
        if self.scenario.on_cpu:
            return NOTHING_HELD
        placed = zip(self.stored_bytes, arrangement.placements, strict=True)
        computes = Placement.CPU in arrangement.placements
        return TierMemory(
            weights_bytes=sum(size for size, placement in placed if placement in (Placement.HOST, Placement.CPU)),
            conversion_bytes=self.cpu_conversion_bytes if computes else 0,
            ring_bytes=self.ring_bytes,
            kv_cache_bytes=self.cache_sides(arrangement)[1],
            work_space_bytes=self.work_space_bytes if computes else 0,
        )

    def fits(self, arrangement: Arrangement) -> bool:
        """Whether both sides are within their budgets."""
        return (
            self.device(arrangement).total_bytes <= self.scenario.budget_bytes
            and self.host(arrangement).total_bytes <= self.scenario.host_budget_bytes
        )

    def of(self, arrangement: Arrangement) -> ArrangedMemory:
        """What the arrangement holds, with the embedding where it fits.

        Its rows are taken from a tied head that stays, from a table on a device on which all blocks stay, from one on
        an accelerator's host, or else from the checkpoint.
        """
        scenario, model, placements = self.scenario, self._model, arrangement.placements
        device, host, embedding = self.device(arrangement), self.host(arrangement), EmbeddingPlacement.ROWS
        head = [own for block, own in zip(model.blocks, placements, strict=True) if block.head_rows is not None]
        with_table = device._replace(embedding_bytes=self._table_bytes)
        stored_table = host._replace(embedding_bytes=align_up(model.table_bytes))
        if model.tied and all(placement is Placement.DEVICE for placement in head):
            embedding = EmbeddingPlacement.HEAD
        elif set(placements) == {Placement.DEVICE} and with_table.total_bytes <= scenario.budget_bytes:
            device, embedding = with_table, EmbeddingPlacement.RESIDENT
        elif not scenario.on_cpu and stored_table.total_bytes <= scenario.host_budget_bytes:
            host, embedding = stored_table, EmbeddingPlacement.HOST
        return ArrangedMemory(device, host, embedding, self._disk_bytes(placements, embedding))

    @property
    def _table_bytes(self) -> int:
        """The embedding on the device: as it was read, or in the compute dtype on an accelerator."""
        if self.scenario.on_cpu:
            return align_up(self._model.table_bytes) + 2 * PAGE_BYTES
        return align_device(self._model.table_parameters * self._element_bytes)


def cache_bytes(model: Model, work: Workload, compute_dtype: str, *, tokens: int) -> tuple[int, ...]:
    """Keys and values of each block when every sequence has `tokens`; a sliding window keeps no more than itself."""
    bytes_per_element = work.sequences * DTYPES[compute_dtype].size_bytes
    return tuple(block.kv_elements(tokens) * bytes_per_element for block in model.blocks)


def cache_sides(
    model: Model, of_blocks: Sequence[int], placements: Sequence[Placement], *, on_host: bool
) -> tuple[int, int]:
    """Bytes of keys and values (`of_blocks`, of each block) on the device and its host: with what computes the layer.

    `on_host`: full-attention layers of the device wait on the host, and visit CACHE_LAYERS_ON_DEVICE places of the
    device in turn; those with a sliding window, which keep little, stay.
    """
    device = host = visiting = 0
    for block, size, placement in zip(model.blocks, of_blocks, placements, strict=True):
        if placement is Placement.CPU:
            host += size
        elif on_host and offloads_cache(block):
            host += size
            visiting = max(visiting, size)
        else:
            device += size
    return device + CACHE_LAYERS_ON_DEVICE * visiting, host


def offloads_cache(block: Block) -> bool:
    """Whether a block's keys and values are worth keeping on the host: a full-attention layer's, which grow."""
    return block.kv_elements_per_token > 0 and not block.window_tokens and not block.state_elements


def _buffer_bytes(largest: int) -> int:
    return align_up(largest) + 2 * PAGE_BYTES if largest else 0


# -- a described machine: what an engine holds --------------------------------------------------------------------


def described_memory(scenario: Scenario, arrangement: Arrangement) -> ArrangedMemory:
    """Bytes per device, per node's host memory and per node's disk: weights that stay, slots, cache and work space."""
    model, machine, work = scenario.model, scenario.described_machine, scenario.workload
    divided = arrangement.parallelism
    layers_bytes = sum(group.count * group.layer.size_bytes for group in model.groups)
    largest_bytes = max(group.layer.size_bytes for group in model.groups)
    ends_bytes = model.weights_bytes - layers_bytes
    table_bytes = model.embedding_bytes if not model.tied else 0.0
    width, stages = divided.tensor, divided.pipeline
    resident_share, cpu_share = arrangement.resident_share, arrangement.cpu_share
    held_bytes = layers_bytes * resident_share
    if arrangement.expert_hit_rate is not None:
        experts_bytes = sum(g.count * g.layer.num_experts * g.layer.expert_bytes for g in model.groups)
        held_bytes = (layers_bytes - experts_bytes) * resident_share + experts_bytes * arrangement.expert_hit_rate
    streams = arrangement.streamed_share > 0 or arrangement.expert_hit_rate is not None
    # Where layers travel, the input table stays where they come from: a pass needs only some of its rows.
    kept_ends = ends_bytes - (table_bytes if streams or cpu_share else 0.0)
    whole_layers = math.ceil(model.num_layers / stages) * stages / model.num_layers

    sequences = math.ceil(work.sequences / divided.replicas)
    cache = _split_cache_bytes(model, sequences, work.context_tokens, width) / stages * (1.0 - cpu_share)
    tokens = min(sequences * work.prompt_tokens / divided.micro_batches, _PREFILL_CHUNK_TOKENS)
    tokens = max(tokens, sequences / divided.micro_batches)
    space = tokens * (model.hidden_size * 8 + _inner_width(model) * 2 / width) * model.activation_bytes
    space += sequences / divided.micro_batches * model.vocab_size * 4.0 / width

    copies = max(1, min(divided.devices, machine.devices) // divided.devices_per_copy)
    away = model.weights_bytes - held_bytes - kept_ends
    host = disk = ring = host_cache = 0.0
    if arrangement.source is Tier.HOST:
        host = max(0.0, away)
    elif arrangement.source is Tier.DISK:
        disk = model.weights_bytes
        ring = arrangement.slots * largest_bytes if machine.host is not None else 0.0
        host = layers_bytes * cpu_share
    if arrangement.cache_on_host:
        host_cache = cache * width * stages * copies
        cache = CACHE_LAYERS_ON_DEVICE * cache / model.num_layers * stages
    elif cpu_share:
        host_cache = model.kv_cache_bytes(sequences=sequences, context_tokens=work.context_tokens) * cpu_share
    return ArrangedMemory(
        device=TierMemory(
            weights_bytes=math.ceil(held_bytes * whole_layers / (width * stages) + kept_ends / width),
            slots_bytes=math.ceil(arrangement.slots * largest_bytes / width if streams else 0.0),
            kv_cache_bytes=math.ceil(cache),
            work_space_bytes=math.ceil(space),
        ),
        host=TierMemory(
            weights_bytes=math.ceil(host), ring_bytes=math.ceil(ring), kv_cache_bytes=math.ceil(host_cache)
        ),
        embedding=EmbeddingPlacement.ROWS if streams or cpu_share else EmbeddingPlacement.RESIDENT,
        disk_bytes=math.ceil(disk),
    )


def cache_parts(layer: Layer, width: int) -> int:
    """Into how many parts width parallelism splits a layer's cache: no more than it has key-value heads."""
    return max(1, min(width, layer.kv_heads or 1))


def _split_cache_bytes(model: Model, sequences: float, context_tokens: float, width: int) -> float:
    """Return the cache on one of `width` devices: key-value heads are not split further than they go."""
    return sum(
        group.count
        * sequences
        * group.layer.cached_tokens(context_tokens)
        * group.layer.kv_elements_per_token
        * model.kv_element_bytes
        / cache_parts(group.layer, width)
        for group in model.groups
    )


def _inner_width(model: Model) -> float:
    """Return the widest row that a layer's feed-forward holds for a token."""
    widest = 4.0 * model.hidden_size
    for group in model.groups:
        layer = group.layer
        active = layer.feed_forward_parameters + layer.experts_per_token * layer.expert_parameters
        widest = max(widest, active / max(1, model.hidden_size))
    return widest
