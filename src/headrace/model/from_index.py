"""Models with the exact bytes of a checkpoint: what the tensors take as they are stored."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from headrace.dtypes import DTYPES, STORED_DTYPES
from headrace.errors import CheckpointCorruptError, UnsupportedModelError
from headrace.model.config_fields import read_config
from headrace.model.from_config import model_from_config
from headrace.model.gguf_index import GgufTensor
from headrace.model.model import Layer, LayerGroup, Model
from headrace.model.safetensors_index import TensorEntry, TensorIndex
from headrace.model.structure import Parts

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blk|block)\.(\d+)\.")
_EXPERT = re.compile(r"(?:\.experts\.|_exps\.|\.ffn_(?:gate|up|down)\.\d+\.)")
_ATTENTION = re.compile(r"(?:self_attn|attention|\.attn\.|attn_(?:q|k|v|qkv|output|kv))")
_TABLE = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tokens_embed|token_embd)\.weight$")
_POSITIONS = re.compile(r"(?:^|\.)(?:wpe|embed_positions|positions_embed|position_embd)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.(?:weight|qweight|scales|qzeros|g_idx)$")


def model_from_checkpoint(directory: Path) -> Model:
    """Return the model of a safetensors checkpoint directory, its bytes those of its tensors.

    Raises CheckpointError for what cannot be read and UnsupportedModelError for unknown architectures.
    """
    index = TensorIndex.from_directory(directory)
    path = directory / "config.json"
    raw = read_config(path)
    try:
        made = model_from_config(raw, name=directory.resolve().name, origin=str(path))
    except UnsupportedModelError:
        quantization = raw.get("quantization_config")
        if not isinstance(quantization, Mapping):
            raise
        # the tensors say what they take, so that sizes unknown from the config are no obstacle
        plain = {**raw, "quantization_config": None}
        made = model_from_config(plain, name=directory.resolve().name, origin=str(path))
        made = replace(made, weight_format=str(quantization.get("quant_method")))
    return with_stored_bytes(made, index.entries.values(), origin=str(directory))


def with_bytes_of(made: Model, parts: Parts, *, origin: str) -> Model:
    """Replace the computed bytes by those of tensors that are sorted already."""
    tallies = [Counter[str]() for _ in parts.layer_tensors]
    for tally, tensors in zip(tallies, parts.layer_tensors, strict=True):
        for tensor in tensors:
            tally[_part(tensor)] += tensor.size_bytes
    positions = sum(entry.size_bytes for entry in parts.fixed if _POSITIONS.search(entry.name))
    ends = [parts.embedding] if parts.head is None else [parts.embedding, parts.head]
    stored = [*itertools.chain(*parts.layer_tensors), *ends, *parts.fixed, *parts.tables]
    return _with_tallies(
        made,
        tallies,
        table=parts.embedding.size_bytes,
        positions=positions,
        head=0 if parts.head is None else parts.head.size_bytes,
        rest=sum(entry.size_bytes for entry in (*parts.fixed, *parts.tables)) - positions,
        weight_format=_stored_format(made.weight_format, stored),
        origin=origin,
    )


def with_stored_bytes(made: Model, stored: Collection[TensorEntry | GgufTensor], *, origin: str) -> Model:
    """Replace the computed bytes by the stored ones: layer by layer, experts apart, ends and the rest apart."""
    layers: dict[int, dict[str, float]] = {}
    table = positions = head = rest = 0.0
    for tensor in stored:
        match = _LAYER.search(tensor.name)
        if match is not None:
            part = _part(tensor)
            tally = layers.setdefault(int(match[1]), {})
            tally[part] = tally.get(part, 0.0) + tensor.size_bytes
        elif _HEAD.search(tensor.name):
            head += tensor.size_bytes
        elif _TABLE.search(tensor.name):
            table += tensor.size_bytes
        elif _POSITIONS.search(tensor.name):
            positions += tensor.size_bytes
        else:
            rest += tensor.size_bytes
    count = made.num_layers
    missing = [number for number in range(count) if number not in layers]
    if missing:
        raise CheckpointCorruptError(
            f"{origin}: the config promises {count} layers, but the weights of layer {missing[0]} "
            f"({len(missing)} in all) are not there"
        )
    rest += sum(sum(tally.values()) for number, tally in layers.items() if number >= count)
    if not (table or head):
        raise CheckpointCorruptError(f"{origin}: neither an embedding table nor a head is there")
    return _with_tallies(
        made,
        [layers[number] for number in range(count)],
        table=table,
        positions=positions,
        head=head,
        rest=rest,
        weight_format=_stored_format(made.weight_format, stored),
        origin=origin,
    )


def _with_tallies(
    made: Model,
    layers: Sequence[Mapping[str, float]],
    *,
    table: float,
    positions: float,
    head: float,
    rest: float,
    weight_format: str,
    origin: str,
) -> Model:
    sized = [_sized(layer, tally) for layer, tally in zip(made.layers(), layers, strict=True)]
    groups = tuple(LayerGroup(layer=layer, count=len(list(run))) for layer, run in itertools.groupby(sized))
    return replace(
        made,
        groups=groups,
        embedding_bytes=(table or head) + positions,
        head_bytes=head or table,
        tied=not (table and head),
        other_bytes=rest,
        weight_format=weight_format,
        source=origin,
    )


def _stored_format(named: str, stored: Collection[TensorEntry | GgufTensor]) -> str:
    """The format that most bytes are in: of 16 and 32 bits a config says nothing, or what a model was trained in."""
    sizes: Counter[str] = Counter()
    for tensor in stored:
        if isinstance(tensor, TensorEntry) and tensor.dtype in STORED_DTYPES:
            sizes[tensor.dtype] += tensor.size_bytes
    plain = named in {dtype.short_name for dtype in DTYPES.values()}
    return STORED_DTYPES[max(sizes, key=sizes.__getitem__)].short_name if plain and sizes else named


def _part(tensor: TensorEntry | GgufTensor) -> str:
    if len(tensor.shape) < 2:
        return "other"
    if _EXPERT.search(tensor.name):
        return "expert"
    return "attention" if _ATTENTION.search(tensor.name) else "feed_forward"


def _sized(layer: Layer, tally: Mapping[str, float]) -> Layer:
    experts = tally.get("expert", 0.0)
    return replace(
        layer,
        attention_bytes=tally.get("attention", 0.0),
        feed_forward_bytes=tally.get("feed_forward", 0.0) + (0.0 if layer.num_experts else experts),
        expert_bytes=experts / layer.num_experts if layer.num_experts else 0.0,
        other_bytes=tally.get("other", 0.0),
    )
