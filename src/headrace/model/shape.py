"""The shape of a model: the matrices of each layer by name, and what lies outside the layers; no bytes yet."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.model.model import Layer, LayerGroup, Model

Matrices = Mapping[str, int]
"""elements of each matrix, under its name within a layer as checkpoints have it (self_attn.q_proj)"""


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Query, key, value and output, and what projects to latent spaces; the widths of a head and of the cache."""

    matrices: Matrices
    other: int
    """norms, biases and the like"""
    query_heads: int
    key_dim: int
    value_dim: int
    kv_elements: int
    kv_heads: int


@dataclass(frozen=True, kw_only=True)
class FeedForwardShape:
    """What every token passes, and one routed expert."""

    inner: int
    matrices: Matrices
    other: int = 0
    expert: Matrices = field(default_factory=dict)
    num_experts: int = 0
    per_token: int = 0


class LayerShape(NamedTuple):
    """One decoder layer."""

    attention: AttentionShape
    feed: FeedForwardShape
    norms: int
    window: int
    """tokens of its sliding window; 0 where it has none"""

    def layer(self) -> Layer:
        """The layer with its weights in 16 bits."""
        attention, feed = self.attention, self.feed
        in_attention, in_feed, in_expert = (
            sum(part.values()) for part in (attention.matrices, feed.matrices, feed.expert)
        )
        other = attention.other + feed.other + self.norms
        return Layer(
            attention_parameters=in_attention,
            attention_bytes=2.0 * in_attention,
            feed_forward_parameters=in_feed,
            feed_forward_bytes=2.0 * in_feed,
            expert_parameters=in_expert,
            expert_bytes=2.0 * in_expert,
            num_experts=feed.num_experts,
            experts_per_token=feed.per_token,
            other_parameters=other,
            other_bytes=2.0 * other,
            query_heads=attention.query_heads,
            key_dim=attention.key_dim,
            value_dim=attention.value_dim,
            kv_elements_per_token=attention.kv_elements,
            kv_heads=attention.kv_heads,
            window_tokens=self.window,
            intermediate_size=feed.inner,
        )


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """All layers, the embedding table, the head and the rest."""

    hidden: int
    vocab: int
    layers: Sequence[LayerShape]
    context: int
    tied: bool
    other: int
    """final norm and what else lies outside the layers"""
    positions: int = 0
    """elements of a table of positions"""
    table_width: int | None = None
    """of embedding and head, where it is not the hidden size"""
    path: str = "model.layers"
    """what the names of a layer's matrices begin with, before its number"""

    def model(self, *, name: str, source: str) -> Model:
        """The model with its weights in 16 bits."""
        table = self.vocab * (self.table_width or self.hidden)
        runs = [(shape, len(list(run))) for shape, run in itertools.groupby(self.layers)]
        return Model(
            name=name,
            groups=tuple(LayerGroup(layer=shape.layer(), count=count) for shape, count in runs),
            hidden_size=self.hidden,
            vocab_size=self.vocab,
            context_tokens=self.context,
            embedding_parameters=table + self.positions,
            embedding_bytes=2.0 * (table + self.positions),
            position_parameters=self.positions,
            head_parameters=table,
            head_bytes=2.0 * table,
            tied=self.tied,
            other_parameters=self.other,
            other_bytes=2.0 * self.other,
            source=source,
        )
