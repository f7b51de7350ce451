"""The transformer architectures that headrace streams, and where each keeps its parts.

An architecture is in this table only when a test has shown that its streamed logits equal its resident logits bit
for bit; everything else is refused by name. Names are those of the checkpoint's tensors and of the config's fields,
as the transformers library writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from headrace.errors import CheckpointError, UnsupportedModelError
from headrace.model.from_config import model_from_config
from headrace.model.model import Layer, LayerGroup, Model


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
    ignored: str = r"\.rotary_emb\.inv_freq$"
    """tensors of old checkpoints that are no weights (buffers that today's model computes itself)"""
    window_everywhere: bool = False
    """without `layer_types` in the config every layer has the sliding window"""
    caches_repeated_heads: bool = False
    """grouped key-value heads are repeated to all heads before they are cached"""

    def model_of(self, raw: Mapping[str, Any], *, name: str, origin: str) -> Model:
        """Read a config as the runtime runs it: with what transformers' cache keeps of each layer."""
        own = {field: value for field, value in raw.items() if field != "text_config"}
        model = model_from_config(own, name=name, origin=origin)
        whole_context = raw.get("layer_types") is None and not self.window_everywhere

        def cached(layer: Layer) -> Layer:
            if whole_context:  # from above: which layers have the window is transformers' own rule
                layer = replace(layer, window_tokens=0)
            if self.caches_repeated_heads and layer.kv_heads > 1:
                elements = layer.query_heads * (layer.key_dim + layer.value_dim)
                layer = replace(layer, kv_heads=layer.query_heads, kv_elements_per_token=elements)
            return layer

        groups = [LayerGroup(layer=cached(group.layer), count=group.count) for group in model.groups]
        return replace(model, groups=tuple(groups))

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

_CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel", "Model")
_WINDOW_EVERYWHERE = {"mistral", "mixtral", "phi3"}

ARCHITECTURES: dict[str, Architecture] = {
    **{name: Architecture(model_type=name, window_everywhere=name in _WINDOW_EVERYWHERE) for name in _LLAMA_LIKE},
    "gpt2": Architecture(
        model_type="gpt2",
        layers="transformer.h",
        embedding="transformer.wte",
        base="transformer",
        ignored=r"\.attn\.(bias|masked_bias)$",
    ),
    "opt": Architecture(
        model_type="opt",
        layers="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
    ),
    "gpt_neox": Architecture(
        model_type="gpt_neox",
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        head="embed_out",
        base="gpt_neox",
        ignored=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
    ),
    "falcon": Architecture(
        model_type="falcon",
        layers="transformer.h",
        embedding="transformer.word_embeddings",
        base="transformer",
        caches_repeated_heads=True,
    ),
}


def architecture_of(raw: Mapping[str, Any], *, origin: str) -> Architecture:
    """Return the entry for a config; `origin` names it in errors.

    Raises UnsupportedModelError for other model types, for quantised weights and for forms of a known architecture that
    no test has shown to be right.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{origin} names no model_type, so the architecture is unknown")
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"headrace cannot stream models of type {model_type!r} correctly yet; it streams: "
            + ", ".join(sorted(ARCHITECTURES))
        )
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"{origin} describes quantised weights ({method}); headrace streams 16- and 32-bit checkpoints so far"
        )
    if raw.get("add_cross_attention") or raw.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{origin}: {model_type} with cross-attention cannot be streamed")
    classes = raw.get("architectures") or []
    if isinstance(classes, list) and classes and not str(classes[0]).endswith(_CAUSAL_CLASSES):
        raise UnsupportedModelError(
            f"{origin}: {classes[0]} is no causal language model, which is all that headrace runs"
        )
    return ARCHITECTURES[model_type]
