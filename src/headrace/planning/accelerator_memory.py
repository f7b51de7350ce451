"""What an arrangement on an accelerator holds, to the byte, on either side of the link.

The device's memory and the host's are two budgets. The embedding takes what is left in them, and nothing where nothing
is: its rows can always be read from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from headrace.dtypes import DTYPES
from headrace.errors import InvalidRequestError
from headrace.model.blocks import Block
from headrace.model.layout import PAGE_BYTES, align_device, align_up
from headrace.model.stored_model import StoredModel
from headrace.planning.plan import TRAVELLING, EmbeddingPlacement, HostMemoryUse, MemoryUse, Placement, Workload
from headrace.planning.planner import Request

LIBRARY_WORK_SPACE_BYTES = 64 << 20
"""What an accelerator's matrix libraries keep for themselves beside tensors."""

CHUNK_BYTES = 16 << 20
"""One read, and one place of the ring."""

CACHE_LAYERS_ON_DEVICE = 3
"""layers whose keys and values are on the device at once where they wait on the host: two come and go in turn, and one
is laid out for attention"""

LEAST_RING_CHUNKS = 2
"""one is being read into while another one is copied from"""


class Arrangement(NamedTuple):
    """Where each block lives, how many slots there are, and on which side of the link keys and values wait."""

    places: tuple[Placement, ...]
    slots: int
    cache_on_host: bool = False

    @property
    def travelling(self) -> int:
        """Blocks that pass through slots."""
        return sum(place in TRAVELLING for place in self.places)


class ArrangedMemory(NamedTuple):
    """An arrangement's memory on both sides, and where the embedding's rows come from in what is left."""

    device: MemoryUse
    host: HostMemoryUse
    embedding: EmbeddingPlacement


class CacheSides(NamedTuple):
    """Bytes of keys and values on either side of the link."""

    device_bytes: int
    host_bytes: int


class BlockBytes(NamedTuple):
    """Bytes of each block, in the order of a pass."""

    device: tuple[int, ...]
    host: tuple[int, ...]
    """the same in whole pages"""
    cache: tuple[int, ...]
    """its keys and values"""


@dataclass(frozen=True, kw_only=True)
class AcceleratorRequest:
    """What the planner is asked: the model, the work, the dtype, the device and what may be held on either side.

    Raises InvalidRequestError for a ring that could carry nothing.
    """

    model: StoredModel
    workload: Workload
    compute_dtype: str
    budget_bytes: int
    """of the device's memory"""
    host_budget_bytes: int
    device: str
    """as users write it: cuda:0"""
    pinned: bool = True
    """the system lets host memory be page-locked"""
    allow_cpu: bool = False
    """layers may be computed by the processor from host memory"""
    allow_host_cache: bool = False
    """keys and values may wait in host memory where they do not fit beside two slots"""
    chunk_bytes: int = CHUNK_BYTES
    ring_chunks: int = 4
    draft_tokens: int = 0
    """drafted tokens that a decode pass checks beside its own"""

    def __post_init__(self) -> None:
        if self.ring_chunks < LEAST_RING_CHUNKS or self.chunk_bytes < PAGE_BYTES:
            raise InvalidRequestError(
                f"a ring of {self.ring_chunks} chunks of {self.chunk_bytes} bytes cannot carry what is read; "
                f"it takes at least {LEAST_RING_CHUNKS} chunks of {PAGE_BYTES} bytes"
            )

    @cached_property
    def blocks(self) -> BlockBytes:
        """What each block takes."""
        device = tuple(block.held_bytes for block in self.model.blocks)
        return BlockBytes(
            device,
            tuple(align_up(size) for size in device),
            cache_bytes(self.model, self.workload, self.compute_dtype, tokens=self.workload.context_tokens),
        )

    @property
    def ring_bytes(self) -> int:
        """Host memory of the chunks between disk and device."""
        return self.ring_chunks * align_up(self.chunk_bytes)

    @cached_property
    def fixed_bytes(self) -> int:
        """The small tensors that always stay on the device."""
        return align_up(self.model.fixed_parameters * DTYPES[self.compute_dtype].size_bytes)

    @cached_property
    def work_space_bytes(self) -> int:
        """What activations hold at their peak, wherever they are computed."""
        same = Request(
            model=self.model,
            workload=self.workload,
            compute_dtype=self.compute_dtype,
            budget_bytes=self.budget_bytes,
            draft_tokens=self.draft_tokens,
        )
        return same.beside_blocks.work_space_bytes

    @cached_property
    def conversion_bytes(self) -> int:
        """The device's buffer for weights that are converted: one module's, or the whole head's."""
        heads = [block.parameters for block in self.model.blocks if block.head_rows is not None and self._converts]
        head = max(heads, default=0) * DTYPES[self.compute_dtype].size_bytes
        return _buffer_bytes(max(head, self._largest_module_bytes))

    @cached_property
    def cpu_conversion_bytes(self) -> int:
        """The processor's buffer: it computes layers only."""
        return _buffer_bytes(self._largest_module_bytes)

    @property
    def _converts(self) -> bool:
        return self.model.stored_dtype != DTYPES[self.compute_dtype].stored_name

    @cached_property
    def _largest_module_bytes(self) -> int:
        element_bytes = DTYPES[self.compute_dtype].size_bytes
        layers = [block for block in self.model.blocks if block.head_rows is None]
        return max(block.module_bytes(element_bytes, converts=self._converts) for block in layers)

    def cache_sides(self, arrangement: Arrangement) -> CacheSides:
        """Keys and values on either side of the link."""
        return cache_sides(self.model, self.blocks.cache, arrangement.places, on_host=arrangement.cache_on_host)

    def memory(self, arrangement: Arrangement) -> ArrangedMemory:
        """What the arrangement holds, with the embedding where it fits.

        Its rows are taken from a tied head that stays, from a table beside blocks that all stay, from one on the host,
        or else from the checkpoint.
        """
        head_stays = all(
            place is Placement.DEVICE
            for block, place in zip(self.model.blocks, arrangement.places, strict=True)
            if block.head_rows is not None
        )
        device, host = self.device_memory(arrangement), self.host_memory(arrangement)
        if self.model.tied and head_stays:
            return ArrangedMemory(device, host, EmbeddingPlacement.HEAD)
        table_bytes = align_device(self.model.table_parameters * DTYPES[self.compute_dtype].size_bytes)
        if all(place is Placement.DEVICE for place in arrangement.places):
            with_table = self.device_memory(arrangement, embedding_bytes=table_bytes)
            if with_table.total_bytes <= self.budget_bytes:
                return ArrangedMemory(with_table, host, EmbeddingPlacement.RESIDENT)
        with_table_there = self.host_memory(arrangement, embedding_bytes=align_up(self.model.table_bytes))
        if with_table_there.total_bytes <= self.host_budget_bytes:
            return ArrangedMemory(device, with_table_there, EmbeddingPlacement.HOST)
        return ArrangedMemory(device, host, EmbeddingPlacement.ROWS)

    def device_memory(self, arrangement: Arrangement, *, embedding_bytes: int = 0) -> MemoryUse:
        """The device's side; without `embedding_bytes` the least that the arrangement needs."""
        placed = list(zip(self.blocks.device, arrangement.places, strict=True))
        return MemoryUse(
            resident_bytes=sum(size for size, place in placed if place is Placement.DEVICE),
            slots_bytes=arrangement.slots * slot_bytes(self, arrangement.places),
            fixed_bytes=self.fixed_bytes,
            embedding_bytes=embedding_bytes,
            conversion_bytes=self.conversion_bytes,
            kv_cache_bytes=self.cache_sides(arrangement).device_bytes,
            work_space_bytes=self.work_space_bytes + LIBRARY_WORK_SPACE_BYTES,
        )

    def host_memory(self, arrangement: Arrangement, *, embedding_bytes: int = 0) -> HostMemoryUse:
        """The host's side; without `embedding_bytes` the least that the arrangement needs."""
        placed = list(zip(self.blocks.host, arrangement.places, strict=True))
        computes = Placement.CPU in arrangement.places
        return HostMemoryUse(
            stores_bytes=sum(size for size, place in placed if place is Placement.HOST),
            cpu_bytes=sum(size for size, place in placed if place is Placement.CPU)
            + (self.cpu_conversion_bytes if computes else 0),
            ring_bytes=self.ring_bytes,
            embedding_bytes=embedding_bytes,
            kv_cache_bytes=self.cache_sides(arrangement).host_bytes,
            work_space_bytes=self.work_space_bytes if computes else 0,
        )


def slot_bytes(request: AcceleratorRequest, places: tuple[Placement, ...]) -> int:
    """A slot holds the largest block that travels."""
    pairs = zip(request.blocks.device, places, strict=True)
    return max((size for size, place in pairs if place in TRAVELLING), default=0)


def cache_bytes(model: StoredModel, work: Workload, compute_dtype: str, *, tokens: int) -> tuple[int, ...]:
    """Keys and values of each block when every sequence has `tokens`; a sliding window keeps no more than itself."""
    bytes_per_element = work.sequences * DTYPES[compute_dtype].size_bytes
    return tuple(block.kv_elements(tokens) * bytes_per_element for block in model.blocks)


def cache_sides(
    model: StoredModel, of_blocks: Sequence[int], places: Sequence[Placement], *, on_host: bool
) -> CacheSides:
    """Where keys and values lie (`of_blocks`, bytes of each): with whoever computes the layer.

    `on_host`: full-attention layers of the device wait on the host, and visit CACHE_LAYERS_ON_DEVICE places of the
    device in turn; those with a sliding window, which keep little, stay.
    """
    device = host = visiting = 0
    for block, size, place in zip(model.blocks, of_blocks, places, strict=True):
        if place is Placement.CPU:
            host += size
        elif on_host and offloads_cache(block):
            host += size
            visiting = max(visiting, size)
        else:
            device += size
    return CacheSides(device + CACHE_LAYERS_ON_DEVICE * visiting, host)


def offloads_cache(block: Block) -> bool:
    """Whether a block's keys and values are worth keeping on the host: a full-attention layer's, which grow."""
    return block.kv_elements_per_token > 0 and not block.window_tokens


def _buffer_bytes(largest: int) -> int:
    return align_up(largest) + 2 * PAGE_BYTES if largest else 0
