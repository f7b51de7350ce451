"""Where a checkpoint keeps its layers, its embedding and its head: found in the names and shapes of its tensors.

No table of architectures: the layers are the numbered group of tensors that holds most bytes, embedding and head are
tables with a row for each token. Where the model is run, the transformers model itself says the same more exactly
(`Parts`, found by `inference/dry_pass.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from headrace.dtypes import STORED_DTYPES
from headrace.errors import CheckpointCorruptError, CheckpointError, UnsupportedModelError
from headrace.model.safetensors_index import TensorEntry

_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_TABLE = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings?|embed_in|tokens_embed|embeddings?|embed)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_projection|proj_out|head|lm_head\.decoder)\.weight$")
_ENCODER = re.compile(r"(?:^|[._])(?:vision|visual|image|audio|speech|encoder|vpm|apm)(?:[._]|$)")
_NO_WEIGHT = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(?:bias|masked_bias)$|\.attention\.(?:bias|masked_bias)$")
"""buffers of old checkpoints that today's models compute themselves"""
_NOT_CAUSAL = re.compile(r"For(?!CausalLM|ConditionalGeneration|Generation)[A-Z]\w*$")


class Made(NamedTuple):
    """How one parameter of a layer comes to be; the runtime's buffer for conversions is sized by it."""

    module: str
    """path within the layer of the module before whose turn it is made"""
    elements: int
    stored: str
    """safetensors dtype; of several tensors that of the first"""
    as_stored: bool
    """it is one tensor of the checkpoint as it stands"""
    by_library: bool
    """transformers' own operation makes it, in memory of its own"""
    in_float32: bool
    """transformers keeps it in 32 bits whatever the rest is computed in"""


class Kept(NamedTuple):
    """What the cache keeps of a sequence in one layer, in elements; and which layers are alike."""

    elements_per_token: int
    state_elements: int
    window_tokens: int
    kind: int
    """equal for layers that take equally long"""
    chunk_tokens: int = 0
    """that linear attention computes together; 0: no chunks"""
    chunk_elements_per_token: int = 0
    """numbers of 32 bits that it holds meanwhile, for each token of whole chunks"""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The tensors of a checkpoint, sorted; what is in none of these is no part of the model."""

    layers: str
    """dotted path of the list of layers, in the model where that was built, else in the checkpoint"""
    layer_tensors: tuple[tuple[TensorEntry, ...], ...]
    embedding: TensorEntry
    head: TensorEntry | None
    """None: tied to the embedding"""
    tables: tuple[TensorEntry, ...] = ()
    """other tables with a row for each token, read by row as the embedding is"""
    fixed: tuple[TensorEntry, ...] = ()
    """final norm, position table and the like: read once, always resident"""
    made: tuple[tuple[Made, ...], ...] = ()
    """of each layer; empty where the model was not built"""
    kept: tuple[Kept, ...] = ()
    """of each layer; empty where the model was not built"""


def refuse_other_models(raw: Mapping[str, Any], *, origin: str) -> None:
    """Raise UnsupportedModelError for what is no causal language model of plain weights; `origin` names the config."""
    if not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{origin} names no model_type, so the architecture is unknown")
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"{origin} describes quantised weights ({method}); headrace streams 16- and 32-bit checkpoints so far"
        )
    classes = raw.get("architectures") or []
    decoder_only = isinstance(classes, list) and str(classes[:1]).endswith("ForCausalLM']")
    if raw.get("add_cross_attention") or (raw.get("is_encoder_decoder") and not decoder_only):
        raise UnsupportedModelError(f"{origin}: {raw['model_type']} with cross-attention cannot be streamed")
    if isinstance(classes, list) and classes and _NOT_CAUSAL.search(str(classes[0])):
        raise UnsupportedModelError(
            f"{origin}: {classes[0]} is no causal language model, which is all that headrace runs"
        )


def parts_by_name(entries: Iterable[TensorEntry], *, num_layers: int, vocab_size: int, origin: str) -> Parts:
    """Sort tensors by their names alone. `num_layers` and `vocab_size` are the config's; 0: as many as there are.

    Raises CheckpointCorruptError where a layer or the embedding is not there.
    """
    named = [entry for entry in entries if not _NO_WEIGHT.search(entry.name)]
    weights = [entry for entry in named if entry.dtype in STORED_DTYPES] or named  # in a dtype that is refused later
    prefix = _layers_prefix(weights, num_layers)
    num_layers = num_layers or _layers_there(weights, prefix)
    layers: list[list[TensorEntry]] = [[] for _ in range(num_layers)]
    outside: list[TensorEntry] = []
    for entry in weights:
        match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", entry.name) if prefix else None
        if match is None:
            outside.append(entry)
        elif int(match[1]) < num_layers:
            layers[int(match[1])].append(entry)
    missing = [number for number, tensors in enumerate(layers) if not sum(entry.size_bytes for entry in tensors)]
    if missing:
        raise CheckpointCorruptError(
            f"{origin}: config.json promises {num_layers} layers, but the weights of layer "
            f"{missing[0]} ({len(missing)} in all) are in no shard"
        )
    embedding, head = _ends(outside, vocab_size, origin)
    return Parts(
        layers=prefix,
        layer_tensors=tuple(tuple(tensors) for tensors in layers),
        embedding=embedding,
        head=head,
        fixed=tuple(entry for entry in outside if entry is not embedding and entry is not head),
    )


def _layers_there(entries: Iterable[TensorEntry], prefix: str) -> int:
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", entry.name) for entry in entries)
    return 1 + max((int(match[1]) for match in found if match is not None), default=0)


def _layers_prefix(entries: Sequence[TensorEntry], num_layers: int) -> str:
    """The name before the number of the group that holds most bytes, the outer one of two.

    Of those with all layers rather than of others, and of a text model's rather than of an encoder's beside it.
    """
    sizes: dict[str, int] = {}
    numbers: dict[str, set[int]] = {}
    for entry in entries:
        for match in _NUMBER.finditer("." + entry.name):
            prefix = entry.name[: max(0, match.start() - 1)]
            sizes[prefix] = sizes.get(prefix, 0) + entry.size_bytes
            numbers.setdefault(prefix, set()).add(int(match[1]))

    def rank(prefix: str) -> tuple[bool, bool, int, int]:
        complete = numbers[prefix] >= set(range(num_layers))
        return (complete, not _ENCODER.search(prefix), sizes[prefix], -len(prefix))

    return max(sizes, key=rank, default="")


def _ends(outside: Sequence[TensorEntry], vocab_size: int, origin: str) -> tuple[TensorEntry, TensorEntry | None]:
    """Embedding and head: by name where a name says so, else by their rows."""
    heads = [entry for entry in outside if _HEAD.search(entry.name)]
    matrices = [own for own in outside if len(own.shape) == 2 and own.size_bytes and own not in heads]
    tables = [entry for entry in matrices if entry.shape[0] == vocab_size]
    tables = tables or [entry for entry in matrices if entry.shape[0] > vocab_size > 0]  # some have rows for more
    named = [entry for entry in outside if _TABLE.search(entry.name) and entry not in heads]
    named.sort(key=lambda entry: entry not in tables)  # a table of positions may have such a name as well
    embedding = next(iter([*named, *tables]), None)
    if embedding is None:
        rows = f" of {vocab_size} rows" if vocab_size else ""
        raise CheckpointCorruptError(f"{origin} holds no table{rows}, the input embedding")
    head = next(iter([*heads, *(entry for entry in tables if entry is not embedding)]), None)
    for table in (embedding, *([] if head is None else [head])):
        if len(table.shape) != 2 or not table.size_bytes:
            raise CheckpointCorruptError(f"{table.name} has shape {table.shape}; a matrix is expected")
    return embedding, head
