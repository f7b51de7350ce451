"""A model whose blocks have a place on disk: the tensors of a checkpoint sorted into blocks, embedding and the rest."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from headrace.dtypes import DTYPES
from headrace.model.blocks import Block, head_slices
from headrace.model.config_fields import text_config
from headrace.model.from_config import MODEL_TYPES, model_from_config
from headrace.model.from_index import with_bytes_of
from headrace.model.from_tensors import model_from_tensors, promised
from headrace.model.layout import HOST_ALIGNMENT_BYTES, AlignedLayout, ByteRange, Layout, align_layout, lay_out
from headrace.model.model import Layer, LayerGroup, Model
from headrace.model.safetensors_index import TensorEntry, TensorIndex
from headrace.model.structure import Kept, Made, Parts, parts_by_name, refuse_other_models

_WINDOW_EVERYWHERE = {"mistral", "mixtral", "phi3"}
_WORK_COPIES = 2
"""tensors of a parameter's size that transformers' own conversions hold beside the result"""


@dataclass(frozen=True, kw_only=True)
class StoredBlock(Block):
    """A block and the bytes of files that hold it."""

    tensors: tuple[TensorEntry, ...]
    layout: Layout
    made: tuple[Made, ...] = ()
    """how each parameter comes to be; empty where the model was not built"""

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

    def stored_as(self, prevailing: str) -> str:
        """Its own dtype."""
        return self.tensors[0].dtype if self.head_rows is not None else prevailing

    def module_bytes(self, compute_dtype: str, *, prevailing: str, copies: bool) -> int:
        """Bytes of the largest module that is converted or put together; those around a module hold theirs as well."""
        del prevailing  # each tensor has its own
        modules: dict[str, int] = {}
        for made in self.made or self._made_by_name():
            dtype = DTYPES["float32" if made.in_float32 else compute_dtype]
            if copies or not made.as_stored or made.stored != dtype.stored_name:
                size = made.elements * dtype.size_bytes + HOST_ALIGNMENT_BYTES
                work = _WORK_COPIES * size if made.by_library else 0
                modules[made.module] = modules.get(made.module, 0) + size + work
        return max(
            (
                sum(size for outer, size in modules.items() if outer in ("", module) or module.startswith(outer + "."))
                for module in modules
            ),
            default=0,
        )

    def _made_by_name(self) -> list[Made]:
        """What the names of the tensors say."""
        found = []
        for entry in self.tensors:
            module = entry.name.rsplit(".", 1)[0]
            fused = ".experts." in module  # the model holds all experts as one tensor, the checkpoint one by one
            found.append(
                Made(
                    module=module.split(".experts.")[0] if fused else module,
                    elements=entry.num_elements,
                    stored=entry.dtype,
                    as_stored=not fused,
                    by_library=False,
                    in_float32=False,
                )
            )
        return found


@dataclass(frozen=True, kw_only=True)
class StoredModel(Model):
    """A model of a checkpoint, its bytes those of its tensors, its cache what the runtime keeps."""

    model_type: str
    parts: Parts

    @property
    def head(self) -> TensorEntry:
        """The embedding where tied."""
        return self.parts.head or self.parts.embedding

    @property
    def embedding(self) -> TensorEntry:
        """The table of token embeddings."""
        return self.parts.embedding

    @property
    def fixed(self) -> tuple[TensorEntry, ...]:
        """The small tensors that always stay."""
        return self.parts.fixed

    @cached_property
    def blocks(self) -> tuple[StoredBlock, ...]:
        """What travels as one, in the order of a pass: the layers, then the head's pieces."""
        parts = self.parts
        layers = [
            _layer_block(
                number,
                layer,
                tensors,
                made=parts.made[number] if parts.made else (),
                kind=parts.kept[number].kind if parts.kept else 0,
            )
            for number, (layer, tensors) in enumerate(zip(self.layers(), parts.layer_tensors, strict=True))
        ]
        largest_bytes = max(block.size_bytes for block in layers) if self.cut_head else self.head.size_bytes
        return (*layers, *_head_blocks(self.head, len(layers), largest_bytes))

    @cached_property
    def stored_dtype(self) -> str:
        """Safetensors name of the dtype that most bytes of the layers are in."""
        return _prevailing_dtype([entry for tensors in self.parts.layer_tensors for entry in tensors])

    @property
    def weights_bytes(self) -> int:
        """Bytes of all distinct weights as stored; tied weights count once."""
        fixed = sum(entry.size_bytes for entry in (*self.fixed, *self.parts.tables))
        return sum(block.size_bytes for block in self.blocks) + fixed + (0 if self.tied else self.table_bytes)

    @property
    def parameters(self) -> int:
        """Number of distinct parameters."""
        blocks = sum(block.parameters for block in self.blocks)
        tables = sum(entry.num_elements for entry in self.parts.tables)
        return blocks + self.fixed_parameters + tables + (0 if self.tied else self.table_parameters)

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
    """Read a config.json (`raw`) and sort the checkpoint's tensors into layers, embedding, head and the rest.

    Raises UnsupportedModelError for what headrace cannot stream, CheckpointError for a config that makes no sense, and
    CheckpointCorruptError where a layer, the embedding or a dtype is not what the config promises.
    """
    origin = str(index.directory / "config.json")
    refuse_other_models(raw, origin=origin)
    own = text_config(raw, MODEL_TYPES)
    model: Model | None = None
    if own["model_type"] in MODEL_TYPES:
        model = as_transformers_caches(model_from_config(own, name=name, origin=origin), own)
    layers, vocabulary = promised(own, origin=origin) if model is None else (model.num_layers, model.vocab_size)
    parts = parts_by_name(index.entries.values(), num_layers=layers, vocab_size=vocabulary, origin=str(index.directory))
    if model is None:
        model = model_from_tensors(own, parts, name=name, origin=origin)
    sized = with_bytes_of(model, parts, origin=str(index.directory))
    return StoredModel(**{**vars(sized), "cut_head": cut_head}, model_type=str(own["model_type"]), parts=parts)


def with_parts(stored: StoredModel, parts: Parts) -> StoredModel:
    """The same model as transformers builds and caches it."""
    layers = [_kept(layer, kept) for layer, kept in zip(stored.layers(), parts.kept, strict=True)]
    groups = tuple(LayerGroup(layer=layer, count=len(list(run))) for layer, run in itertools.groupby(layers))
    plain = replace(stored.plain(), groups=groups, vocab_size=(parts.head or parts.embedding).shape[0])
    sized = with_bytes_of(plain, parts, origin=stored.source)
    return StoredModel(**vars(sized), model_type=stored.model_type, parts=parts)


def _kept(layer: Layer, kept: Kept) -> Layer:
    return replace(
        layer,
        kv_elements_per_token=kept.elements_per_token,
        state_elements=kept.state_elements,
        window_tokens=kept.window_tokens,
        chunk_tokens=kept.chunk_tokens,
        chunk_elements_per_token=kept.chunk_elements_per_token,
    )


def as_transformers_caches(model: Model, raw: Mapping[str, Any]) -> Model:
    """The model with what transformers' cache keeps of each layer, where that is not what an engine would keep.

    It knows a window without `layer_types` in the config for some types only, and Falcon's grouped heads are repeated
    to all heads before they are cached.
    """
    kind = raw["model_type"]
    whole_context = raw.get("layer_types") is None and kind not in _WINDOW_EVERYWHERE

    def cached(layer: Layer) -> Layer:
        if whole_context:
            layer = replace(layer, window_tokens=0)
        if kind == "falcon" and layer.kv_heads > 1:
            elements = layer.query_heads * (layer.key_dim + layer.value_dim)
            layer = replace(layer, kv_heads=layer.query_heads, kv_elements_per_token=elements)
        return layer

    groups = [LayerGroup(layer=cached(group.layer), count=group.count) for group in model.groups]
    return replace(model, groups=tuple(groups))


def _whole(entry: TensorEntry) -> ByteRange:
    return ByteRange(entry.name, entry.file_index, entry.offset, entry.size_bytes)


def _prevailing_dtype(entries: Sequence[TensorEntry]) -> str:
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _layer_block(
    number: int, layer: Layer, tensors: tuple[TensorEntry, ...], *, made: tuple[Made, ...], kind: int
) -> StoredBlock:
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
        state_elements=layer.state_elements,
        window_tokens=layer.window_tokens,
        kind=kind,
        tensors=tensors,
        made=made,
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
