"""A model as arithmetic, memory and links see it, known from its config alone: no tensor of it needs to exist.

GPT-3, or one a thousand times its size. A `StoredModel` is one whose blocks have a place on disk; one made from a
tensor index holds that file's exact bytes. Formulas: docs/formulas.md, section 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from headrace.dtypes import DTYPES
from headrace.model.blocks import HEAD_CHUNK_ROWS, Block, head_slices, product_slices
from headrace.model.layout import align_up

WORK_SPACE_CONSTANT_BYTES = 28 << 20


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
    state_elements: int = 0
    """kept of a sequence whatever its length: recurrent and convolution states"""
    window_tokens: int = 0
    """sliding window; 0: the whole context is kept"""
    chunk_tokens: int = 0
    """that linear attention computes together; 0: no chunks"""
    chunk_elements_per_token: int = 0
    """numbers of 32 bits that it holds meanwhile, for each token of whole chunks"""
    intermediate_size: int = 0
    """inner width of the feed-forward; of experts, at least theirs"""

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

    def chunk_bytes(self, new_tokens: int) -> int:
        """Bytes that linear attention holds while it computes so many positions at once, the last chunk filled up."""
        if new_tokens == 1 or not self.chunk_tokens:
            return 0
        return -(-new_tokens // self.chunk_tokens) * self.chunk_tokens * self.chunk_elements_per_token * 4

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
    position_parameters: int = 0
    """of `embedding_parameters`, those of the position table"""
    head_parameters: int
    """the output projection, counted also where it is the embedding table (`tied`)"""
    head_bytes: float
    tied: bool = False
    """the head's matrix is the embedding table"""
    other_parameters: int = 0
    other_bytes: float = 0.0
    cut_head: bool = False
    """a head much larger than a layer becomes several blocks. Only for the CPU: an accelerator's libraries promise
    nothing about the sums in the parts of a product"""
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

    def kv_cache_bytes(self, *, sequences: float, context_tokens: float, element_bytes: float | None = None) -> float:
        """Bytes of the cache of `sequences` contexts; a sliding window keeps no more than itself."""
        elements = sum(
            group.count
            * (
                group.layer.kv_elements_per_token * group.layer.cached_tokens(context_tokens)
                + group.layer.state_elements
            )
            for group in self.groups
        )
        return sequences * elements * (self.kv_element_bytes if element_bytes is None else element_bytes)

    def kv_pool_bytes(self, *, positions: int, element_bytes: int) -> int:
        """Bytes of keys and values of so many positions in every layer, whatever its window."""
        return positions * element_bytes * sum(group.count * group.layer.kv_elements_per_token for group in self.groups)

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

    def plain(self) -> Model:
        """The same model without a place on disk, of which no checkpoint needs to exist."""
        return Model(**{item.name: getattr(self, item.name) for item in fields(Model)})

    # -- as blocks --------------------------------------------------------------------------------------------------

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """What travels as one, in the order of a pass: the layers, then the head's pieces."""
        layers = [self._layer_block(number, layer) for number, layer in enumerate(self.layers())]
        return (*layers, *self._head_blocks(layers))

    def _head_blocks(self, layers: Sequence[Block]) -> Iterator[Block]:
        whole_bytes = math.ceil(self.head_bytes)
        piece_bytes = max(block.size_bytes for block in layers) if self.cut_head else whole_bytes
        for index, rows in enumerate(head_slices(self.vocab_size, whole_bytes, piece_bytes), start=len(layers)):
            share = (rows.last - rows.first) / self.vocab_size
            yield Block(
                index=index,
                name=rows.head_name(self.vocab_size),
                head_rows=rows,
                size_bytes=math.ceil(share * whole_bytes),
                parameters=round(share * self.head_parameters),
                active_parameters=share * self.head_parameters,
            )

    def _layer_block(self, number: int, layer: Layer) -> Block:
        widest = max(layer.query_heads * layer.key_dim, 0 if layer.num_experts else layer.intermediate_size)
        return Block(
            index=number,
            name=f"layer {number}",
            layer_index=number,
            size_bytes=math.ceil(layer.size_bytes),
            parameters=layer.parameters,
            active_parameters=float(layer.active_parameters),
            kv_elements_per_token=layer.kv_elements_per_token,
            window_tokens=layer.window_tokens,
            module_parameters=widest * self.hidden_size,
            fused_parameters=layer.num_experts * layer.expert_parameters,
        )

    @property
    def stored_dtype(self) -> str:
        """Safetensors name of a 16- or 32-bit weight format; the name of any other format as it is."""
        own = (dtype.stored_name for dtype in DTYPES.values() if dtype.short_name == self.weight_format)
        return next(own, self.weight_format)

    @property
    def table_parameters(self) -> int:
        """Elements of the table of token embeddings."""
        return self.embedding_parameters - self.position_parameters

    @property
    def table_bytes(self) -> int:
        """Bytes of the table of token embeddings as stored."""
        return math.ceil(self.embedding_bytes * self.table_parameters / self.embedding_parameters)

    @property
    def fixed_parameters(self) -> int:
        """Elements of the small tensors that always stay: final norm, position table and the like."""
        return self.other_parameters + self.position_parameters

    @property
    def fixed_read_bytes(self) -> int:
        """Bytes read to bring the small tensors."""
        return align_up(math.ceil(self.other_bytes + self.embedding_bytes) - self.table_bytes)

    @property
    def intermediate_size(self) -> int:
        """Inner width of the widest feed-forward."""
        return max(group.layer.intermediate_size for group in self.groups)

    def work_space_bytes(self, *, sequences: int, new_tokens: int, context_tokens: int, element_bytes: int) -> int:
        """Bytes that activations of one pass hold at their peak, from above.

        Counted per token: in the feed-forward part the residual, the norm's float32 copies and four tensors of
        the intermediate width (a mixture of experts handles each token `experts_per_token` times); in attention
        query, key, value, their rotated copies and the output; beside them keys and values repeated to all
        heads (grouped attention), what linear attention holds of its chunks, the mask, and the last position's
        logits (two in the compute dtype, four float32 copies) with, for 16-bit products, the libraries'
        reordered copy of as much of the head as is multiplied at once. A constant covers the allocator and what
        the libraries load late.
        """
        tokens = sequences * new_tokens
        norm = 3 * self.hidden_size * 4
        mask = sequences * new_tokens * context_tokens * (1 + element_bytes)
        layers = 0
        for layer in {group.layer for group in self.groups}:
            times = max(1, layer.experts_per_token)
            query_width = layer.query_heads * layer.key_dim
            feed_forward = (4 * self.hidden_size + 4 * times * layer.intermediate_size) * element_bytes
            kept = 5 * query_width + 5 * layer.kv_elements_per_token // 2
            attention = (4 * self.hidden_size + kept) * element_bytes
            repeated = 2 * sequences * context_tokens * query_width * element_bytes
            states = 3 * sequences * layer.state_elements * element_bytes
            chunks = sequences * layer.chunk_bytes(new_tokens)
            layers = max(layers, tokens * (max(feed_forward, attention) + norm) + repeated + mask + states + chunks)
        logits = sequences * self.vocab_size * (4 * 4 + 2 * element_bytes)
        at_once = max(last - first for first, last in product_slices(self.vocab_size, HEAD_CHUNK_ROWS))
        reordered = at_once * self.hidden_size * 2 if element_bytes == 2 else 0
        ends = logits + reordered + tokens * self.hidden_size * element_bytes
        return max(layers, ends) + WORK_SPACE_CONSTANT_BYTES

    def packed_work_space_bytes(
        self, *, pass_tokens: int, samples: int, context_tokens: int, element_bytes: int
    ) -> int:
        """Bytes that activations of a packed pass hold at their peak, from above (see `work_space_bytes`).

        Chunks of prompts have masks, a byte and a float for each head of a group, and the rows of sampled logits
        count as sequences.
        """
        groups = max(group.layer.query_heads // group.layer.kv_heads for group in self.groups)
        masks = pass_tokens * context_tokens * groups * (1 + 4)
        layer = self.work_space_bytes(
            sequences=1, new_tokens=pass_tokens, context_tokens=context_tokens, element_bytes=element_bytes
        )
        logits = self.work_space_bytes(sequences=samples, new_tokens=1, context_tokens=1, element_bytes=element_bytes)
        return max(layer, logits + pass_tokens * self.hidden_size * element_bytes) + masks
