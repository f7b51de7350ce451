"""The transformer architectures that headrace streams, and where each keeps its parts.

An architecture is in this table only when a test has shown that its streamed logits equal its resident logits bit
for bit; everything else is refused by name. Names are those of the checkpoint's tensors and of the config's fields,
as the transformers library writes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from headrace.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where one model type keeps its layers, its embedding and its head."""

    model_type: str
    layers: str = "model.layers"
    """dotted path of the list of decoder layers in the transformers model"""
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    """the output projection's name in checkpoints (newer ones may say lm_head for all)"""
    base: str = "model"
    """prefix that a checkpoint of the bare model lacks"""
    hidden_size: str = "hidden_size"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    num_kv_heads: str = "num_key_value_heads"
    intermediate_size: str = "intermediate_size"
    context_tokens: str = "max_position_embeddings"
    ignored: str = r"\.rotary_emb\.inv_freq$"
    """tensors of old checkpoints that are no weights (buffers that today's model computes itself)"""

    def layer_pattern(self) -> re.Pattern[str]:
        """Match the names of a layer's tensors; group 1 is the layer's number."""
        inner = self.layers.removeprefix(self.base + ".")
        return re.compile(rf"^(?:{re.escape(self.base)}\.)?{re.escape(inner)}\.([0-9]+)\.")

    def is_embedding(self, tensor_name: str) -> bool:
        """Whether this tensor is the table of input embeddings."""
        inner = self.embedding.removeprefix(self.base + ".")
        return tensor_name in {f"{self.embedding}.weight", f"{inner}.weight"}

    def is_head(self, tensor_name: str) -> bool:
        """Whether this tensor is the output projection to the vocabulary."""
        return tensor_name in {f"{self.head}.weight", "lm_head.weight"}

    def is_ignored(self, tensor_name: str) -> bool:
        """Whether this tensor is no weight of today's model."""
        return re.search(self.ignored, tensor_name) is not None


_LLAMA_LIKE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "qwen3_moe",
)

ARCHITECTURES: dict[str, Architecture] = {
    **{name: Architecture(model_type=name) for name in _LLAMA_LIKE},
    "gpt2": Architecture(
        model_type="gpt2",
        layers="transformer.h",
        embedding="transformer.wte",
        base="transformer",
        hidden_size="n_embd",
        num_layers="n_layer",
        num_heads="n_head",
        num_kv_heads="n_head",
        intermediate_size="n_inner",
        context_tokens="n_positions",
        ignored=r"\.attn\.(bias|masked_bias)$",
    ),
    "opt": Architecture(
        model_type="opt",
        layers="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        num_kv_heads="num_attention_heads",
        intermediate_size="ffn_dim",
    ),
    "gpt_neox": Architecture(
        model_type="gpt_neox",
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        head="embed_out",
        base="gpt_neox",
        num_kv_heads="num_attention_heads",
        ignored=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
    ),
    "falcon": Architecture(
        model_type="falcon",
        layers="transformer.h",
        embedding="transformer.word_embeddings",
        base="transformer",
        num_kv_heads="num_kv_heads",
        intermediate_size="ffn_hidden_size",
    ),
}


def architecture_of(model_type: str) -> Architecture:
    """Return the table's entry; raises UnsupportedModelError that names the type and lists what is supported."""
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"headrace cannot stream models of type {model_type!r} correctly yet; it streams: "
            + ", ".join(sorted(ARCHITECTURES))
        )
    return ARCHITECTURES[model_type]
