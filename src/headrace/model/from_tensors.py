"""A model of a type that no formula is known for, as far as its config's usual fields and its tensors say.

What the cache keeps is an estimate here; where the model is run, transformers' own cache says it exactly.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.model.config_fields import Fields
from headrace.model.context import context_tokens
from headrace.model.model import Layer, LayerGroup, Model
from headrace.model.safetensors_index import TensorEntry
from headrace.model.structure import Parts

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "model_dim", "embedding_size")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_HEAD_DIM = ("head_dim", "attention_head_dim", "d_kv", "kv_channels")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length", "max_seq_len")
_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", "top_k_experts")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_DEFAULT_CONTEXT = 2048


def promised(raw: Mapping[str, Any], *, origin: str) -> tuple[int, int]:
    """Layers and vocabulary that a text model's config names; 0 where it leaves them to transformers' class."""
    fields = Fields(raw, origin)
    return (
        fields.count(*_LAYERS, default=0, zero=True),
        fields.count("vocab_size", "n_vocab", default=0, zero=True),
    )


def model_from_tensors(raw: Mapping[str, Any], parts: Parts, *, name: str, origin: str) -> Model:
    """Estimate the model of a text model's config. What that leaves to transformers' class, the tensors say."""
    fields = Fields(raw, origin)
    hidden = fields.count(*_HIDDEN, default=parts.embedding.shape[1])
    heads = fields.count(*_HEADS, default=max(1, hidden // 64))
    head_dim = fields.count(*_HEAD_DIM, default=max(1, hidden // heads))
    kv_heads = min(fields.count(*_KV_HEADS, default=heads), heads)
    per_token = fields.count(*_PER_TOKEN, default=1)
    layers = [
        _layer(tensors, heads=heads, head_dim=head_dim, kv_heads=kv_heads, per_token=per_token)
        for tensors in parts.layer_tensors
    ]
    groups = [LayerGroup(layer=layer, count=len(list(run))) for layer, run in itertools.groupby(layers)]
    table = parts.embedding.num_elements
    other = sum(entry.num_elements for entry in parts.fixed)
    return Model(
        name=name,
        groups=tuple(groups),
        hidden_size=hidden,
        vocab_size=parts.embedding.shape[0],
        context_tokens=context_tokens(fields, fields.count(*_CONTEXT, default=_DEFAULT_CONTEXT)),
        embedding_parameters=table,
        embedding_bytes=2.0 * table,
        head_parameters=table if parts.head is None else parts.head.num_elements,
        head_bytes=2.0 * table,
        tied=parts.head is None,
        other_parameters=other,
        other_bytes=2.0 * other,
        source=origin,
    )


def _layer(tensors: Sequence[TensorEntry], *, heads: int, head_dim: int, kv_heads: int, per_token: int) -> Layer:
    matrices = [entry for entry in tensors if len(entry.shape) > 1]
    fused = [entry for entry in matrices if ".experts." in entry.name and len(entry.shape) == 3]
    single = [entry for entry in matrices if _EXPERT.search(entry.name)]
    numbers = {match[1] for entry in single if (match := _EXPERT.search(entry.name))}
    experts = fused[0].shape[0] if fused else len(numbers)
    in_experts = sum(entry.num_elements for entry in (*fused, *single))
    dense = sum(entry.num_elements for entry in matrices) - in_experts
    return Layer(
        attention_parameters=dense,
        attention_bytes=2.0 * dense,
        feed_forward_parameters=0,
        feed_forward_bytes=0.0,
        expert_parameters=in_experts // experts if experts else 0,
        expert_bytes=2.0 * in_experts / experts if experts else 0.0,
        num_experts=experts,
        experts_per_token=min(per_token, experts),
        other_parameters=sum(entry.num_elements for entry in tensors if len(entry.shape) < 2),
        query_heads=heads,
        key_dim=head_dim,
        value_dim=head_dim,
        kv_elements_per_token=2 * kv_heads * head_dim,
        kv_heads=kv_heads,
        intermediate_size=max((max(entry.shape[-2:]) for entry in matrices), default=1),
    )
