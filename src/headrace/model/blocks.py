"""A model as memory and links see it: blocks in order, exact bytes, FLOPs per token, KV bytes per token.

A *block* is what travels as one: a decoder layer, or the head (the output projection), cut into pieces where it is
much larger than a layer. The input embedding is no block, since a pass reads only some of its rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from headrace.errors import CheckpointCorruptError
from headrace.model.layout import AlignedLayout, ByteRange, Layout, align_layout, lay_out
from headrace.model.model_config import ModelConfig
from headrace.model.safetensors_index import DTYPE_BYTES, TensorEntry, TensorIndex

HEAD_CHUNK_ROWS = 8192
"""The head is multiplied about this many rows at a time: parts of 1,024 rows were seen to change the last bit of
bfloat16 products, 4,096 never."""

ROW_TILE = 256
"""Matrix libraries choose another kernel, with another order of summing, for a number of rows that is a multiple of
this (seen with MKL 2024.2, float32, 4 to 15 tokens)."""


class RowSlice(NamedTuple):
    """Rows [first, last) of the head's matrix."""

    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block: a decoder layer (`layer_index`) or a piece of the head (`head_rows`)."""

    index: int
    name: str
    layer_index: int | None
    head_rows: RowSlice | None
    tensors: tuple[TensorEntry, ...]
    size_bytes: int
    """bytes of its weights as stored, nothing else"""
    parameters: int
    active_parameters: float
    """matrix elements that one token is multiplied with (of a mixture of experts: the share that is used)"""
    layout: Layout

    @property
    def read_bytes(self) -> int:
        """Bytes of slot, and bytes read: `size_bytes` and the over-reading."""
        return self.layout.footprint_bytes

    @cached_property
    def aligned(self) -> AlignedLayout:
        """The block as an accelerator holds it, tensors at aligned places."""
        if self.head_rows is not None:
            return align_layout(self.layout, {self.tensors[0].name: self.size_bytes})
        return align_layout(self.layout, {entry.name: entry.size_bytes for entry in self.tensors})

    @property
    def held_bytes(self) -> int:
        """Bytes of an accelerator's memory that the block takes, and bytes copied to bring it there."""
        return self.aligned.size_bytes

    @property
    def flops_per_token(self) -> float:
        """Floating point operations of its matrix products for one token: two per element (formulas.md, section 1)."""
        return 2.0 * self.active_parameters


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model: its blocks in the order of a pass, its embedding table, and the small tensors that always stay."""

    name: str
    config: ModelConfig
    stored_dtype: str
    """safetensors name of the dtype that most bytes are in"""
    blocks: tuple[Block, ...]
    embedding: TensorEntry
    tied: bool
    """the head's matrix is the embedding table"""
    fixed: tuple[TensorEntry, ...]
    """final norm, position table and the like: read once, always resident"""
    fixed_layout: Layout

    @property
    def weights_bytes(self) -> int:
        """Bytes of all distinct weights as stored; tied weights count once."""
        blocks = sum(block.size_bytes for block in self.blocks)
        fixed = sum(entry.size_bytes for entry in self.fixed)
        return blocks + fixed + (0 if self.tied else self.embedding.size_bytes)

    @property
    def parameters(self) -> int:
        """Number of distinct parameters."""
        blocks = sum(block.parameters for block in self.blocks)
        fixed = sum(entry.num_elements for entry in self.fixed)
        return blocks + fixed + (0 if self.tied else self.embedding.num_elements)

    def kv_cache_bytes(self, *, sequences: int, tokens: int, element_bytes: int) -> int:
        """Bytes of keys and values of `sequences` of `tokens` each; a sliding window keeps no more than itself."""
        config = self.config
        positions = sum(min(tokens, window) if window else tokens for window in config.sliding_windows)
        return 2 * sequences * positions * config.num_kv_heads * config.head_dim * element_bytes

    def work_space_bytes(self, *, sequences: int, new_tokens: int, context_tokens: int, element_bytes: int) -> int:
        """Bytes that activations of one pass hold at their peak, from above.

        Counted per token: in the feed-forward part the residual, the norm's float32 copies and four tensors of the
        intermediate width (a mixture of experts handles each token `experts_per_token` times); in attention query,
        key, value, their rotated copies and the output; beside them keys and values repeated to all heads (grouped
        attention), the mask, and the last position's logits (two in the compute dtype, four float32 copies) with, for
        16-bit products, the libraries' reordered copy of as much of the head as is multiplied at once. A constant
        covers the allocator and what the libraries load late.
        """
        config = self.config
        tokens = sequences * new_tokens
        times = max(1, config.experts_per_token)
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        feed_forward = (4 * config.hidden_size + 4 * times * config.intermediate_size) * element_bytes
        attention = (4 * config.hidden_size + 5 * query_width + 5 * kv_width) * element_bytes
        norm = 3 * config.hidden_size * 4
        repeated = 2 * sequences * context_tokens * query_width * element_bytes
        mask = sequences * new_tokens * context_tokens * (1 + element_bytes)
        logits = sequences * config.vocab_size * (4 * 4 + 2 * element_bytes)
        at_once = max(last - first for first, last in product_slices(config.vocab_size, HEAD_CHUNK_ROWS))
        reordered = at_once * config.hidden_size * 2 if element_bytes == 2 else 0
        layer = tokens * (max(feed_forward, attention) + norm) + repeated + mask
        return max(layer, logits + reordered + tokens * config.hidden_size * element_bytes) + WORK_SPACE_CONSTANT_BYTES

    def kv_pool_bytes(self, *, positions: int, element_bytes: int) -> int:
        """Bytes of keys and values of so many positions in every layer, whatever its window."""
        config = self.config
        return 2 * config.num_layers * positions * config.num_kv_heads * config.head_dim * element_bytes

    def packed_work_space_bytes(
        self, *, pass_tokens: int, samples: int, context_tokens: int, element_bytes: int
    ) -> int:
        """Bytes that activations of a packed pass hold at their peak, from above (see `work_space_bytes`).

        Chunks of prompts have masks, a byte and a float for each head of a group, and the rows of sampled logits
        count as sequences.
        """
        config = self.config
        groups = config.num_heads // config.num_kv_heads
        masks = pass_tokens * context_tokens * groups * (1 + 4)
        layer = self.work_space_bytes(
            sequences=1, new_tokens=pass_tokens, context_tokens=context_tokens, element_bytes=element_bytes
        )
        logits = self.work_space_bytes(sequences=samples, new_tokens=1, context_tokens=1, element_bytes=element_bytes)
        return max(layer, logits + pass_tokens * config.hidden_size * element_bytes) + masks


WORK_SPACE_CONSTANT_BYTES = 28 << 20


def build_stored_model(name: str, config: ModelConfig, index: TensorIndex, *, cut_head: bool = True) -> StoredModel:
    """Sort the checkpoint's tensors into blocks, embedding and fixed tensors.

    With `cut_head` a head much larger than a layer becomes several blocks. Only for the processor: an accelerator's
    libraries promise nothing about the sums in the parts of a product.

    Raises CheckpointCorruptError where a layer, the embedding or a dtype is not what the config promises.
    """
    architecture = config.architecture
    pattern = architecture.layer_pattern()
    layers: list[list[TensorEntry]] = [[] for _ in range(config.num_layers)]
    fixed: list[TensorEntry] = []
    embedding: TensorEntry | None = None
    head: TensorEntry | None = None
    for entry in index.entries.values():
        match = pattern.match(entry.name)
        if architecture.is_ignored(entry.name):
            continue
        if match is not None:
            if int(match[1]) < config.num_layers:
                layers[int(match[1])].append(entry)
        elif architecture.is_embedding(entry.name):
            embedding = entry
        elif architecture.is_head(entry.name):
            head = entry
        else:
            fixed.append(entry)
    if embedding is None:
        raise CheckpointCorruptError(f"{index.directory} holds no {architecture.embedding}.weight, the input embedding")
    missing = [number for number, tensors in enumerate(layers) if not sum(entry.size_bytes for entry in tensors)]
    if missing:
        raise CheckpointCorruptError(
            f"{index.directory}: config.json promises {config.num_layers} layers, but the weights of layer "
            f"{missing[0]} ({len(missing)} in all) are in no shard"
        )
    matrix = head or embedding
    for table in (matrix, embedding):
        if len(table.shape) != 2 or not table.size_bytes:
            raise CheckpointCorruptError(f"{table.name} has shape {table.shape}; a matrix is expected")
    blocks = [_layer_block(number, tensors, config) for number, tensors in enumerate(layers)]
    blocks += _head_blocks(
        matrix, len(blocks), max(block.size_bytes for block in blocks) if cut_head else matrix.size_bytes
    )
    return StoredModel(
        name=name,
        config=config,
        stored_dtype=_prevailing_dtype([entry for tensors in layers for entry in tensors]),
        blocks=tuple(blocks),
        embedding=embedding,
        tied=head is None,
        fixed=tuple(fixed),
        fixed_layout=lay_out(_whole(entry) for entry in fixed),
    )


def product_slices(rows: int, largest_rows: int) -> list[RowSlice]:
    """Cut the rows of a matrix so that each part's product is the whole product's bit for bit.

    About equal parts of at most `largest_rows` and a few. If `rows` is a multiple of ROW_TILE so are all parts, and
    otherwise none is (see there). A number of rows that is no multiple of 8 is not cut: the row left over at the
    libraries' own cut between threads is summed in another order than the others.
    """
    count = -(-rows // largest_rows)
    if count <= 1 or rows % 8:
        return [RowSlice(0, rows)]
    tiles, rest = divmod(rows, ROW_TILE)
    shift = 0 if rest == 0 else 32 if rest == 16 else 16
    edges = [tiles * number // count * ROW_TILE + (shift if number % 2 else 0) for number in range(count)] + [rows]
    return [RowSlice(first, last) for first, last in itertools.pairwise(edges)]


def _whole(entry: TensorEntry) -> ByteRange:
    return ByteRange(entry.name, entry.file_index, entry.offset, entry.size_bytes)


def _prevailing_dtype(entries: Sequence[TensorEntry]) -> str:
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _layer_block(number: int, tensors: list[TensorEntry], config: ModelConfig) -> Block:
    share = config.experts_per_token / config.num_experts if config.num_experts else 1.0
    active = sum(
        entry.num_elements * (share if ".experts." in entry.name else 1.0) for entry in tensors if len(entry.shape) > 1
    )
    return Block(
        index=number,
        name=f"layer {number}",
        layer_index=number,
        head_rows=None,
        tensors=tuple(tensors),
        size_bytes=sum(entry.size_bytes for entry in tensors),
        parameters=sum(entry.num_elements for entry in tensors),
        active_parameters=active,
        layout=lay_out(_whole(entry) for entry in tensors),
    )


def _head_blocks(matrix: TensorEntry, first_index: int, layer_bytes: int) -> list[Block]:
    """Cut the head into equal pieces of about a layer's size, or of HEAD_CHUNK_ROWS where that is more."""
    rows, columns = matrix.shape
    row_bytes = columns * DTYPE_BYTES[matrix.dtype]
    wanted = math.ceil(matrix.size_bytes / max(1, layer_bytes))
    slices = product_slices(rows, max(HEAD_CHUNK_ROWS, math.ceil(rows / wanted)))
    blocks = []
    for number, (first, last) in enumerate(slices):
        size_bytes = (last - first) * row_bytes
        part = ByteRange(matrix.name, matrix.file_index, matrix.offset + first * row_bytes, size_bytes)
        blocks.append(
            Block(
                index=first_index + number,
                name="head" if len(slices) == 1 else f"head, rows {first}-{last - 1}",
                layer_index=None,
                head_rows=RowSlice(first, last),
                tensors=(matrix,),
                size_bytes=size_bytes,
                parameters=(last - first) * columns,
                active_parameters=float((last - first) * columns),
                layout=lay_out([part]),
            )
        )
    return blocks
