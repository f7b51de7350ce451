"""A model from its config.json: parameters counted matrix by matrix, to the last one.

Field names are those of the transformers library. What a config does not determine is refused, not guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from headrace.dtypes import DTYPES
from headrace.errors import CheckpointError, UnsupportedModelError, near_names
from headrace.model.config_fields import Fields
from headrace.model.context import context_tokens
from headrace.model.formats import requantised
from headrace.model.model import Layer, LayerGroup, Model
from headrace.model.quantized import quantised_as_stored

_MOST_LAYERS = 100_000
_INNER_WIDTH = {
    "gpt2": "n_inner",
    "gptj": "n_inner",
    "opt": "ffn_dim",
    "gpt_neox": "intermediate_size",
    "falcon": "ffn_hidden_size",
}
_LLAMA = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}


class _Attention(NamedTuple):
    matrices: int
    other: int
    query_heads: int
    key_dim: int
    value_dim: int
    kv_elements: int
    kv_heads: int


class _FeedForward(NamedTuple):
    inner: int
    dense: int
    other: int = 0
    expert: int = 0
    num_experts: int = 0
    per_token: int = 0


def model_from_config(raw: Mapping[str, Any], *, name: str, origin: str) -> Model:
    """Translate a config. Raises CheckpointError or UnsupportedModelError naming `origin`, the field and the fault."""
    outer = raw
    if isinstance(raw.get("text_config"), Mapping) and "num_hidden_layers" not in raw:
        raw = {**raw["text_config"], "model_type": raw["text_config"].get("model_type", raw.get("model_type"))}
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{origin} names no model_type, so the architecture is unknown")
    if model_type not in _BUILDERS:
        alike = (
            "its fields look like llama's, but matrices may differ, so nothing is guessed; "
            if set(raw) >= _LLAMA
            else ""
        )
        raise UnsupportedModelError(
            f"{origin}: headrace does not know the shape of models of type {model_type!r}; {alike}"
            f"{near_names(model_type, _BUILDERS)}known: {', '.join(sorted(_BUILDERS))}"
        )
    fields = Fields(raw, origin)
    model = _BUILDERS[model_type](fields, name)
    stored = str(raw.get("torch_dtype") or raw.get("dtype")).removeprefix("torch.")
    if stored in DTYPES:
        model = requantised(model, stored)
    quantization = outer.get("quantization_config") or raw.get("quantization_config")
    return quantised_as_stored(model, quantization, fields) if quantization else model


# -- architectures ------------------------------------------------------------------------------------------------


def _gated(fields: Fields, name: str) -> Model:
    """Llama and its kin: grouped-query attention, gated feed-forward, RMS norms; dense or with experts.

    Phi joins its matrices, which changes no sum; PaLM has one key-value head and a norm for attention and feed-forward.
    """
    kind = str(fields.raw["model_type"])
    hidden, layers = fields.count("hidden_size"), _layers(fields, "num_hidden_layers")
    heads = fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", default=1 if kind == "palm" else heads)
    head_dim = _head_dim(fields, hidden, heads, default={"gemma": 256, "gemma2": 256, "gemma3_text": 256}.get(kind))
    _divides(fields, heads, kv_heads)
    qkv_bias = fields.flag("attention_bias", default=kind in {"qwen2", "qwen2_moe", "gpt_oss"})
    if kind in {"qwen2", "qwen2_moe"}:
        qkv_bias = True
    out_bias = qkv_bias and kind in {"llama", "gpt_oss", "mistral"}
    attention_other = (heads + 2 * kv_heads) * head_dim * qkv_bias + hidden * out_bias
    if kind in {"qwen3", "qwen3_moe", "gemma3_text"}:
        attention_other += 2 * head_dim  # norms of queries and keys
    if kind == "gpt_oss":
        attention_other += heads  # sinks
    attention = _grouped(hidden, heads, kv_heads, head_dim, other=attention_other)
    norms = {"gemma2": 4, "gemma3_text": 4, "palm": 1}.get(kind, 2) * hidden
    dense = _gated_feed(fields, hidden)
    if kind == "llama" and fields.flag("mlp_bias", default=False):
        dense = dense._replace(other=2 * dense.inner + hidden)
    feeds = _expert_layers(fields, kind, hidden, layers, dense)
    windows = _windows(fields, kind, layers)
    positions = fields.count("max_position_embeddings", default=4096 if kind == "phi3" else 2048)
    return _assemble(
        fields,
        name,
        hidden=hidden,
        layers=[(attention, feed, norms, window) for feed, window in zip(feeds, windows, strict=True)],
        context=context_tokens(fields, positions),
        tied=kind.startswith("gemma") or kind == "palm",
    )


def _expert_layers(fields: Fields, kind: str, hidden: int, layers: int, dense: _FeedForward) -> list[_FeedForward]:
    """One feed-forward per layer: experts, where the config says so."""
    if kind not in {"mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"}:
        return [dense] * layers
    experts = fields.count("num_local_experts", "num_experts")
    per_token = fields.count("num_experts_per_tok", "experts_per_token")
    if per_token > experts:
        raise fields.wrong(f"num_experts_per_tok is {per_token}, but there are {experts} experts")
    if kind == "mixtral":
        return [_FeedForward(dense.inner, hidden * experts, 0, dense.dense, experts, per_token)] * layers
    if kind == "gpt_oss":
        biases = experts * (2 * dense.inner + hidden) + experts
        return [_FeedForward(dense.inner, hidden * experts, biases, dense.dense, experts, per_token)] * layers
    inner = fields.count("moe_intermediate_size")
    shared = 0
    if kind == "qwen2_moe":
        shared = 3 * hidden * fields.count("shared_expert_intermediate_size") + hidden  # and its gate
    routed = _FeedForward(dense.inner, hidden * experts + shared, 0, 3 * hidden * inner, experts, per_token)
    step = fields.count("decoder_sparse_step", default=1)
    only = fields.raw.get("mlp_only_layers") or []
    if not isinstance(only, list) or any(type(index) is not int or not 0 <= index < layers for index in only):
        raise fields.wrong(f"mlp_only_layers is {only!r:.80}; a list of layer numbers below {layers} is expected")
    return [dense if index in only or (index + 1) % step else routed for index in range(layers)]


def _latent(fields: Fields, name: str) -> Model:
    """DeepSeek V2 and V3, Kimi K2: latent attention, shared and routed experts after a few dense layers."""
    kind = str(fields.raw["model_type"])
    hidden, layers = fields.count("hidden_size"), _layers(fields, "num_hidden_layers")
    heads = fields.count("num_attention_heads")
    latent, rope = fields.count("kv_lora_rank"), fields.count("qk_rope_head_dim")
    nope, value = fields.count("qk_nope_head_dim"), fields.count("v_head_dim")
    query_latent = fields.count("q_lora_rank", default=0) if fields.raw.get("q_lora_rank") else 0
    query = heads * (nope + rope)
    query_matrices = hidden * query_latent + query_latent * query if query_latent else hidden * query
    attention = _Attention(
        matrices=query_matrices + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden,
        other=query_latent + latent,
        query_heads=heads,
        key_dim=latent + rope,
        value_dim=latent,
        kv_elements=latent + rope,
        kv_heads=1,
    )
    dense = _gated_feed(fields, hidden)
    experts, per_token = fields.count("n_routed_experts"), fields.count("num_experts_per_tok")
    if per_token > experts:
        raise fields.wrong(f"num_experts_per_tok is {per_token}, but there are {experts} experts")
    inner = fields.count("moe_intermediate_size")
    shared = fields.count("n_shared_experts", default=0, zero=True)
    correction = experts if kind in {"deepseek_v3", "kimi_k2"} else 0
    expert = 3 * hidden * inner
    routed = _FeedForward(inner, hidden * experts + expert * shared, correction, expert, experts, per_token)
    first = fields.count("first_k_dense_replace", default=0, zero=True)
    every = fields.count("moe_layer_freq", default=1)
    feeds = [routed if index >= first and index % every == 0 else dense for index in range(layers)]
    return _assemble(
        fields,
        name,
        hidden=hidden,
        layers=[(attention, feed, 2 * hidden, 0) for feed in feeds],
        context=context_tokens(fields, fields.count("max_position_embeddings", default=4096)),
    )


def _glm4_moe(fields: Fields, name: str) -> Model:
    """GLM 4.5 and its kin: grouped-query attention, shared and routed experts after a few dense layers."""
    hidden, layers = fields.count("hidden_size"), _layers(fields, "num_hidden_layers")
    heads = fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", default=heads)
    head_dim = _head_dim(fields, hidden, heads)
    _divides(fields, heads, kv_heads)
    bias = fields.flag("attention_bias", default=False)
    norm = fields.flag("use_qk_norm", default=False)
    other = (heads + 2 * kv_heads) * head_dim * bias + 2 * head_dim * norm
    attention = _grouped(hidden, heads, kv_heads, head_dim, other=other)
    experts, per_token = fields.count("n_routed_experts"), fields.count("num_experts_per_tok")
    inner = fields.count("moe_intermediate_size")
    shared = fields.count("n_shared_experts", default=1, zero=True)
    expert = 3 * hidden * inner
    routed = _FeedForward(inner, hidden * experts + expert * shared, experts, expert, experts, per_token)
    dense = _gated_feed(fields, hidden)
    first = fields.count("first_k_dense_replace", default=1, zero=True)
    return _assemble(
        fields,
        name,
        hidden=hidden,
        layers=[(attention, routed if index >= first else dense, 2 * hidden, 0) for index in range(layers)],
        context=context_tokens(fields, fields.count("max_position_embeddings", default=4096)),
    )


def _plain(fields: Fields, name: str) -> Model:
    """The older decoders: two-matrix feed-forward, layer norms with biases."""
    kind = str(fields.raw["model_type"])
    hidden = fields.count("hidden_size", "n_embd", "d_model")
    layers = _layers(fields, "num_hidden_layers", "n_layer", "num_layers")
    heads = fields.count("num_attention_heads", "n_head", "num_heads")
    if hidden % heads:
        raise fields.wrong(f"hidden size {hidden} is no multiple of {heads} attention heads")
    head_dim = hidden // heads
    # Each has its own name for the inner width; another's name in its config means nothing to it.
    inner_name = _INNER_WIDTH.get(kind)
    inner = 4 * hidden if inner_name is None else fields.count(inner_name, default=4 * hidden)
    vocab = fields.count("vocab_size")
    kv_heads, context, positions, final = heads, 2048, 0, 2 * hidden
    attention_bias, feed_bias, norms = 4 * hidden, inner + hidden, 4 * hidden
    tied, wider_table, extra_other, head_bias = True, 0, 0, 0
    if kind in {"gpt2", "openai-gpt"}:
        context = fields.count("n_positions", "max_position_embeddings", "n_ctx", default=1024)
        positions = context
        final = 0 if kind == "openai-gpt" else final
    elif kind == "opt":
        context = fields.count("max_position_embeddings", default=2048)
        positions = context + 2
        projection = fields.count("word_embed_proj_dim", default=hidden)
        final = 0 if fields.flag("_remove_final_layer_norm", default=False) else final
        if not fields.flag("do_layer_norm_before", default=True):
            final = 0
        if projection != hidden:
            wider_table = vocab * (projection - hidden)
            extra_other = 2 * projection * hidden
    elif kind == "bloom":
        context = fields.count("seq_length", "n_positions", default=2048)
        extra_other = 2 * hidden  # norm after the embedding
    elif kind == "gpt_neox":
        context = context_tokens(fields, fields.count("max_position_embeddings", default=2048))
        tied = False
    elif kind == "gptj":
        context = fields.count("n_positions", default=2048)
        attention_bias, norms, tied, head_bias = 0, 2 * hidden, False, vocab
    elif kind == "falcon":
        context = fields.count("max_position_embeddings", default=2048)
        context = context if fields.flag("alibi", default=False) else context_tokens(fields, context)
        bias = fields.flag("bias", default=False)
        new = fields.flag("new_decoder_architecture", default=False)
        multi = fields.flag("multi_query", default=True)
        kv_heads = fields.count("num_kv_heads", default=heads) if new else 1 if multi else heads
        norms = 4 * hidden if new or not fields.flag("parallel_attn", default=True) else 2 * hidden
        attention_bias = ((heads + 2 * kv_heads) * head_dim + hidden) * bias
        feed_bias = (inner + hidden) * bias
    _divides(fields, heads, kv_heads)
    attention = _grouped(hidden, heads, kv_heads, head_dim, other=attention_bias)
    return _assemble(
        fields,
        name,
        hidden=hidden,
        layers=[(attention, _FeedForward(inner, 2 * hidden * inner, feed_bias), norms, 0)] * layers,
        context=context,
        final=final + extra_other + head_bias,
        tied=tied,
        positions=positions * hidden,
        wider_table=wider_table,
    )


_GATED = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 palm mixtral qwen2_moe qwen3_moe gpt_oss"
_BUILDERS = {
    **dict.fromkeys(_GATED.split(), _gated),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2"), _latent),
    **dict.fromkeys(("gpt2", "openai-gpt", "opt", "bloom", "gpt_neox", "gptj", "falcon"), _plain),
    "glm4_moe": _glm4_moe,
}


# -- parts --------------------------------------------------------------------------------------------------------


def _layers(fields: Fields, *names: str) -> int:
    layers = fields.count(*names)
    if layers > _MOST_LAYERS:
        raise fields.wrong(f"{names[0]} is {layers}; at most {_MOST_LAYERS} make sense")
    return layers


def _head_dim(fields: Fields, hidden: int, heads: int, default: int | None = None) -> int:
    if fields.raw.get("head_dim") is None and default is None and hidden % heads:
        raise fields.wrong(f"hidden_size {hidden} is no multiple of {heads} attention heads")
    return fields.count("head_dim", default=default or hidden // heads)


def _divides(fields: Fields, heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise fields.wrong(f"{heads} attention heads are no multiple of {kv_heads} key-value heads")


def _gated_feed(fields: Fields, hidden: int) -> _FeedForward:
    inner = fields.count("intermediate_size")
    return _FeedForward(inner, 3 * hidden * inner)


def _grouped(hidden: int, heads: int, kv_heads: int, head_dim: int, *, other: int) -> _Attention:
    return _Attention(
        matrices=hidden * (heads + 2 * kv_heads) * head_dim + heads * head_dim * hidden,
        other=other,
        query_heads=heads,
        key_dim=head_dim,
        value_dim=head_dim,
        kv_elements=2 * kv_heads * head_dim,
        kv_heads=kv_heads,
    )


def _windows(fields: Fields, kind: str, layers: int) -> list[int]:
    """Window in tokens of each layer; 0 where the whole context is seen."""
    window = fields.count("sliding_window", default=0, zero=True)
    kinds = fields.raw.get("layer_types")
    used = fields.flag("use_sliding_window", default=not kind.startswith("qwen"))
    if kinds is not None:
        named = _layer_types(fields, kinds, layers, window)
        return [window if used and name == "sliding_attention" else 0 for name in named]
    if not window or not used or kind in {"llama", "gemma"}:
        return [0] * layers
    if kind == "gemma3_text":
        pattern = fields.count("sliding_window_pattern", default=6)
        return [0 if (index + 1) % pattern == 0 else window for index in range(layers)]
    if kind in {"gemma2", "gpt_oss"}:
        return [window if index % 2 == 0 else 0 for index in range(layers)]
    if kind.startswith("qwen"):
        first = fields.count("max_window_layers", default=layers, zero=True)
        return [0 if index < first else window for index in range(layers)]
    return [window] * layers


def _layer_types(fields: Fields, kinds: Any, layers: int, window: int) -> list[str]:
    if not isinstance(kinds, list) or len(kinds) != layers:
        found = f"{len(kinds)} entries" if isinstance(kinds, list) else f"{kinds!r:.80}, not one entry each,"
        raise fields.wrong(f"layer_types has {found} for {layers} layers")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise UnsupportedModelError(
                f"{fields.origin}: layer_types names {kind!r:.80}; headrace knows the cache of full_attention and of "
                "sliding_attention"
            )
    if "sliding_attention" in kinds and not window:
        raise fields.wrong("layer_types names sliding_attention, but sliding_window gives it no width")
    return kinds


def _assemble(
    fields: Fields,
    name: str,
    *,
    hidden: int,
    layers: list[tuple[_Attention, _FeedForward, int, int]],
    context: int,
    final: int | None = None,
    tied: bool = False,
    positions: int = 0,
    wider_table: int = 0,
) -> Model:
    """Put the model together; `final`: its last norm and what else lies outside the layers, one norm unless given.

    `tied`: whether the head is the table where the config does not say.
    """
    vocab, final = fields.count("vocab_size"), hidden if final is None else final
    table = vocab * hidden + wider_table
    groups = [
        LayerGroup(layer=_layer(*described), count=len(list(run))) for described, run in itertools.groupby(layers)
    ]
    return Model(
        name=name,
        groups=tuple(groups),
        hidden_size=hidden,
        vocab_size=vocab,
        context_tokens=context,
        embedding_parameters=table + positions,
        embedding_bytes=2.0 * (table + positions),
        position_parameters=positions,
        head_parameters=table,
        head_bytes=2.0 * table,
        tied=fields.flag("tie_word_embeddings", default=tied),
        other_parameters=final,
        other_bytes=2.0 * final,
        source=fields.origin,
    )


def _layer(attention: _Attention, feed: _FeedForward, norms: int, window: int) -> Layer:
    other = attention.other + feed.other + norms
    return Layer(
        attention_parameters=attention.matrices,
        attention_bytes=2.0 * attention.matrices,
        feed_forward_parameters=feed.dense,
        feed_forward_bytes=2.0 * feed.dense,
        expert_parameters=feed.expert,
        expert_bytes=2.0 * feed.expert,
        num_experts=feed.num_experts,
        experts_per_token=feed.per_token,
        other_parameters=other,
        other_bytes=2.0 * other,
        query_heads=attention.query_heads,
        key_dim=attention.key_dim,
        value_dim=attention.value_dim,
        kv_elements_per_token=attention.kv_elements,
        kv_heads=attention.kv_heads,
        window_tokens=window,
        intermediate_size=feed.inner,
    )
