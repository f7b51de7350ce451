"""A model whose blocks have a place on disk: the tensors of a checkpoint sorted into blocks, embedding and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from headrace.errors import CheckpointCorruptError
from headrace.model.architectures import Architecture, architecture_of
from headrace.model.blocks import Block, head_slices
from headrace.model.from_index import with_stored_bytes
from headrace.model.layout import AlignedLayout, ByteRange, Layout, align_layout, lay_out
from headrace.model.model import Layer, Model
from headrace.model.safetensors_index import TensorEntry, TensorIndex


@dataclass(frozen=True, kw_only=True)
class StoredBlock(Block):
    """A block and the bytes of files that hold it."""

    tensors: tuple[TensorEntry, ...]
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

    def module_bytes(self, element_bytes: int, *, converts: bool) -> int:
        """Bytes of the largest module of a layer that is converted, or put together from experts; 0 where none is."""
        modules: dict[str, int] = {}
        for entry in self.tensors:
            module = entry.name.rsplit(".", 1)[0]
            fused = ".experts." in module  # the model holds all experts as one tensor, the checkpoint one by one
            if fused:
                module = module.split(".experts.")[0]
            if converts or fused:
                modules[module] = modules.get(module, 0) + entry.num_elements * element_bytes + 64
        return max(modules.values(), default=0)


@dataclass(frozen=True, kw_only=True)
class StoredModel(Model):
    """A model of a checkpoint, its bytes those of its tensors, its cache what the runtime keeps."""

    architecture: Architecture
    layer_tensors: tuple[tuple[TensorEntry, ...], ...]
    head: TensorEntry
    """the embedding where tied"""
    embedding: TensorEntry
    fixed: tuple[TensorEntry, ...]
    """final norm, position table and the like: read once, always resident"""

    @cached_property
    def blocks(self) -> tuple[StoredBlock, ...]:
        """What travels as one, in the order of a pass: the layers, then the head's pieces."""
        pairs = zip(self.layers(), self.layer_tensors, strict=True)
        layers = [_layer_block(number, layer, tensors) for number, (layer, tensors) in enumerate(pairs)]
        largest_bytes = max(block.size_bytes for block in layers) if self.cut_head else self.head.size_bytes
        return (*layers, *_head_blocks(self.head, len(layers), largest_bytes))

    @cached_property
    def stored_dtype(self) -> str:
        """Safetensors name of the dtype that most bytes of the layers are in."""
        return _prevailing_dtype([entry for tensors in self.layer_tensors for entry in tensors])

    @property
    def weights_bytes(self) -> int:
        """Bytes of all distinct weights as stored; tied weights count once."""
        fixed = sum(entry.size_bytes for entry in self.fixed)
        return sum(block.size_bytes for block in self.blocks) + fixed + (0 if self.tied else self.table_bytes)

    @property
    def parameters(self) -> int:
        """Number of distinct parameters."""
        blocks = sum(block.parameters for block in self.blocks)
        return blocks + self.fixed_parameters + (0 if self.tied else self.table_parameters)

    @property
    def table_parameters(self) -> int:
        """Elements of the table of token embeddings."""
        return self.embedding.num_elements

    @property
    def table_bytes(self) -> int:
        """Bytes of the table of token embeddings as stored."""
        return self.embedding.size_bytes

    @property
    def fixed_parameters(self) -> int:
        """Elements of the small tensors that always stay."""
        return sum(entry.num_elements for entry in self.fixed)

    @property
    def fixed_read_bytes(self) -> int:
        """Bytes read to bring the small tensors."""
        return lay_out(_whole(entry) for entry in self.fixed).footprint_bytes


def build_stored_model(name: str, raw: Mapping[str, Any], index: TensorIndex, *, cut_head: bool = True) -> StoredModel:
    """Read a config.json (`raw`) and sort the checkpoint's tensors into blocks, embedding and fixed tensors.

    Raises UnsupportedModelError for what headrace cannot stream, CheckpointError for a config that makes no sense, and
    CheckpointCorruptError where a layer, the embedding or a dtype is not what the config promises.
    """
    origin = str(index.directory / "config.json")
    architecture = architecture_of(raw, origin=origin)
    model = architecture.model_of(raw, name=name, origin=origin)
    pattern = architecture.layer_pattern()
    layers: list[list[TensorEntry]] = [[] for _ in range(model.num_layers)]
    fixed: list[TensorEntry] = []
    embedding: TensorEntry | None = None
    head: TensorEntry | None = None
    for entry in index.entries.values():
        match = pattern.match(entry.name)
        if architecture.is_ignored(entry.name):
            continue
        if match is not None:
            if int(match[1]) < model.num_layers:
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
            f"{index.directory}: config.json promises {model.num_layers} layers, but the weights of layer "
            f"{missing[0]} ({len(missing)} in all) are in no shard"
        )
    for table in (head or embedding, embedding):
        if len(table.shape) != 2 or not table.size_bytes:
            raise CheckpointCorruptError(f"{table.name} has shape {table.shape}; a matrix is expected")
    in_layers = [entry for tensors in layers for entry in tensors]
    ends = [embedding] if head is None else [embedding, head]
    sized = with_stored_bytes(model, [*in_layers, *ends, *fixed], origin=str(index.directory))
    return StoredModel(
        **{**vars(sized), "cut_head": cut_head},
        architecture=architecture,
        layer_tensors=tuple(tuple(tensors) for tensors in layers),
        head=head or embedding,
        embedding=embedding,
        fixed=tuple(fixed),
    )


def _whole(entry: TensorEntry) -> ByteRange:
    return ByteRange(entry.name, entry.file_index, entry.offset, entry.size_bytes)


def _prevailing_dtype(entries: Sequence[TensorEntry]) -> str:
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _layer_block(number: int, layer: Layer, tensors: tuple[TensorEntry, ...]) -> StoredBlock:
    share = layer.experts_per_token / layer.num_experts if layer.num_experts else 1.0
    active = sum(
        entry.num_elements * (share if ".experts." in entry.name else 1.0) for entry in tensors if len(entry.shape) > 1
    )
    return StoredBlock(
        index=number,
        name=f"layer {number}",
        layer_index=number,
        size_bytes=sum(entry.size_bytes for entry in tensors),
        parameters=sum(entry.num_elements for entry in tensors),
        active_parameters=active,
        kv_elements_per_token=layer.kv_elements_per_token,
        window_tokens=layer.window_tokens,
        tensors=tensors,
        layout=lay_out(_whole(entry) for entry in tensors),
    )


def _head_blocks(matrix: TensorEntry, first_index: int, piece_bytes: int) -> list[StoredBlock]:
    rows, columns = matrix.shape
    row_bytes = matrix.size_bytes // rows
    blocks = []
    for index, piece in enumerate(head_slices(rows, matrix.size_bytes, piece_bytes), start=first_index):
        first, last = piece
        size_bytes = (last - first) * row_bytes
        part = ByteRange(matrix.name, matrix.file_index, matrix.offset + first * row_bytes, size_bytes)
        blocks.append(
            StoredBlock(
                index=index,
                name=piece.head_name(rows),
                head_rows=piece,
                size_bytes=size_bytes,
                parameters=(last - first) * columns,
                active_parameters=float((last - first) * columns),
                tensors=(matrix,),
                layout=lay_out([part]),
            )
        )
    return blocks
