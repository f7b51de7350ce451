"""A model as arithmetic and memory see it, known from its config alone: no tensor of it needs to exist.

Where `StoredModel` describes a checkpoint's byte ranges, a `Model` describes a kind of model: GPT-3, or one a
thousand times its size. One made from a tensor index holds that checkpoint's exact bytes. Formulas:
docs/formulas.md, section 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer. Parameters count elements; bytes are as stored (scales of quantised weights included)."""

    attention_parameters: int
    """matrices of the attention: query, key, value, output, and what projects to latent spaces"""
    attention_bytes: float
    feed_forward_parameters: int
    """matrices that every token passes: the dense feed-forward, or the shared experts and the router"""
    feed_forward_bytes: float
    expert_parameters: int = 0
    """matrices of one routed expert"""
    expert_bytes: float = 0.0
    num_experts: int = 0
    experts_per_token: int = 0
    other_parameters: int = 0
    """norms and biases: read, and next to no arithmetic"""
    other_bytes: float = 0.0
    query_heads: int = 0
    key_dim: int = 0
    """width of a query or key of one head; with a latent cache (weights absorbed for decoding) the latent's"""
    value_dim: int = 0
    kv_elements_per_token: int = 0
    """what the cache keeps of a token: 2 x kv heads x head width, or the latent and its rotary part"""
    kv_heads: int = 0
    """into how many parts width parallelism can split the cache: key-value heads; 1 for a latent cache"""
    window_tokens: int = 0
    """sliding window; 0: the whole context is kept"""

    @property
    def parameters(self) -> int:
        """All of them, every expert counted."""
        experts = self.num_experts * self.expert_parameters
        return self.attention_parameters + self.feed_forward_parameters + experts + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """Matrix elements that one token is multiplied with."""
        return (
            self.attention_parameters + self.feed_forward_parameters + self.experts_per_token * self.expert_parameters
        )

    @property
    def size_bytes(self) -> float:
        """Bytes of all its weights."""
        return self.attention_bytes + self.feed_forward_bytes + self.num_experts * self.expert_bytes + self.other_bytes

    def experts_touched(self, tokens: float) -> float:
        """Expected number of distinct routed experts that `tokens` tokens use, routed uniformly and independently."""
        if not self.num_experts:
            return 0.0
        return self.num_experts * (1.0 - math.pow(1.0 - self.experts_per_token / self.num_experts, tokens))

    def bytes_read(self, tokens: float) -> float:
        """Bytes of weights that a pass of `tokens` tokens multiplies with."""
        touched = self.experts_touched(tokens)
        return self.attention_bytes + self.feed_forward_bytes + touched * self.expert_bytes + self.other_bytes

    def cached_tokens(self, context_tokens: float) -> float:
        """Positions that the cache keeps of a context."""
        return min(context_tokens, self.window_tokens) if self.window_tokens else context_tokens

    def attention_flops(self, *, new_tokens: float, context_tokens: float) -> float:
        """Operations of scores and weighted sums of `new_tokens` positions, the last of which sees `context_tokens`.

        A causal chunk's mean position sees half of the chunk less: context - (new - 1) / 2.
        """
        mean = max(1.0, context_tokens - (new_tokens - 1) / 2)
        if self.window_tokens:
            mean = min(mean, self.window_tokens)
        return 2.0 * self.query_heads * (self.key_dim + self.value_dim) * mean * new_tokens


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Consecutive layers of one shape."""

    layer: Layer
    count: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder: groups of equal layers, an embedding table, a head."""

    name: str
    groups: tuple[LayerGroup, ...]
    hidden_size: int
    vocab_size: int
    context_tokens: int
    embedding_parameters: int
    """token and position tables; a pass reads a few rows of them"""
    embedding_bytes: float
    head_parameters: int
    """the output projection, counted also where it is the embedding table (`tied`)"""
    head_bytes: float
    tied: bool = False
    other_parameters: int = 0
    other_bytes: float = 0.0
    weight_format: str = "bf16"
    """name of the prevailing format (`headrace.model.formats`)"""
    kv_element_bytes: float = 2.0
    activation_bytes: float = 2.0
    """of one element that travels between layers or devices"""
    source: str = ""
    notes: tuple[str, ...] = field(default=())

    def layers(self) -> Iterator[Layer]:
        """Every layer in order."""
        return itertools.chain.from_iterable(itertools.repeat(group.layer, group.count) for group in self.groups)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return sum(group.count for group in self.groups)

    @property
    def parameters(self) -> int:
        """Distinct parameters."""
        layers = sum(group.count * group.layer.parameters for group in self.groups)
        head = 0 if self.tied else self.head_parameters
        return layers + self.embedding_parameters + head + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """Matrix elements that one token is multiplied with, head included, embedding not."""
        return sum(group.count * group.layer.active_parameters for group in self.groups) + self.head_parameters

    @property
    def weights_bytes(self) -> float:
        """Bytes of all distinct weights."""
        layers = sum(group.count * group.layer.size_bytes for group in self.groups)
        return layers + self.embedding_bytes + (0 if self.tied else self.head_bytes) + self.other_bytes

    def bytes_read(self, tokens: float) -> float:
        """Bytes of weights that a pass of `tokens` tokens reads: layers (of experts those used) and head."""
        return sum(group.count * group.layer.bytes_read(tokens) for group in self.groups) + self.head_bytes

    def kv_bytes_per_token(self) -> float:
        """Bytes that the cache grows by with each token of a sequence, as long as no window is full."""
        elements = sum(group.count * group.layer.kv_elements_per_token for group in self.groups)
        return elements * self.kv_element_bytes

    def kv_cache_bytes(self, *, sequences: float, context_tokens: float) -> float:
        """Bytes of the cache of `sequences` contexts."""
        elements = sum(
            group.count * group.layer.kv_elements_per_token * group.layer.cached_tokens(context_tokens)
            for group in self.groups
        )
        return sequences * elements * self.kv_element_bytes

    def linear_flops(self, *, tokens: float, head_tokens: float) -> float:
        """Operations of all matrix products of a pass: two per element and token (the head: sampled positions)."""
        layers = sum(group.count * group.layer.active_parameters for group in self.groups)
        return 2.0 * (layers * tokens + self.head_parameters * head_tokens)

    def attention_flops(self, *, sequences: float, new_tokens: float, context_tokens: float) -> float:
        """Operations of attention proper in a pass of `new_tokens` positions of each sequence."""
        return sequences * sum(
            group.count * group.layer.attention_flops(new_tokens=new_tokens, context_tokens=context_tokens)
            for group in self.groups
        )

    def with_kv_element_bytes(self, element_bytes: float) -> Model:
        """The same model with its cache in another format."""
        return replace(self, kv_element_bytes=element_bytes)
