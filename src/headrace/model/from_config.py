"""A model from its config.json: parameters counted matrix by matrix, to the last one.

Field names are those of the transformers library, and so is what a field means to a family: a switch that a family's
class does not read changes nothing (`tests/model/test_config_switches.py` builds them all). What a config leaves out
has the value of that class (`class_defaults.toml`); what then is still not determined is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from headrace.dtypes import DTYPES
from headrace.errors import CheckpointError, UnsupportedModelError, near_names
from headrace.model.config_fields import Fields, class_defaults, text_config
from headrace.model.context import context_tokens
from headrace.model.formats import requantised
from headrace.model.model import Model
from headrace.model.quantized import quantised_as_stored
from headrace.model.shape import AttentionShape, FeedForwardShape, LayerShape, Matrices, ModelShape

_MOST_LAYERS = 100_000
_LLAMA = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
_SAME_SHAPE = {
    # model_type: the family that it has the matrices of
    "kimi_k2": "deepseek_v3",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_omni_moe_text": "qwen3_moe",
}
_ALL_BIASES = {"llama", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gpt_oss"}
"""attention_bias gives these a bias of queries, keys, values and output"""
_HEAD_NORMS = {"qwen3", "qwen3_moe", "gemma3_text"}
_EXPERTS = {"mixtral", "gpt_oss", "qwen2_moe", "qwen3_moe", "glm4_moe"}


def model_from_config(raw: Mapping[str, Any], *, name: str, origin: str) -> Model:
    """Translate a config. Raises CheckpointError or UnsupportedModelError naming `origin`, the field and the fault."""
    outer, raw = raw, text_config(raw, MODEL_TYPES)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{origin} names no model_type, so the architecture is unknown")
    kind = _SAME_SHAPE.get(model_type, model_type)
    if kind not in _BUILDERS:
        alike = (
            "its fields look like llama's, but matrices may differ, so nothing is guessed; "
            if set(raw) >= _LLAMA
            else ""
        )
        raise UnsupportedModelError(
            f"{origin}: headrace does not know the shape of models of type {model_type!r}; {alike}"
            f"{near_names(model_type, _BUILDERS)}known: {', '.join(sorted(_BUILDERS))}"
        )
    fields = Fields(raw, origin, class_defaults(model_type))
    shape = _BUILDERS[kind](fields, kind)
    model = shape.model(name=name, source=origin)
    if fields.assumed:
        assumed = f"{origin} leaves {', '.join(fields.assumed)} to what transformers' class of {model_type} has"
        model = replace(model, notes=(assumed,))
    stored = str(raw.get("torch_dtype") or raw.get("dtype")).removeprefix("torch.")
    if stored in DTYPES:
        model = requantised(model, stored)
    quantization = outer.get("quantization_config") or raw.get("quantization_config")
    return quantised_as_stored(model, shape, quantization, fields) if quantization else model


# -- families -----------------------------------------------------------------------------------------------------


def _gated(fields: Fields, kind: str) -> ModelShape:
    """Llama and its kin: grouped-query attention, gated feed-forward, RMS norms; dense or with experts.

    Phi joins its matrices, which changes no sum; PaLM has one key-value head and a norm for attention and feed-forward.
    """
    hidden, layers = fields.count("hidden_size"), _layers(fields, "num_hidden_layers")
    heads = fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", default=1 if kind == "palm" else heads)
    head_dim = _head_dim(fields, hidden, heads)
    _divides(fields, heads, kv_heads)
    other = _attention_biases(fields, kind, hidden, (heads + 2 * kv_heads) * head_dim)
    if kind in _HEAD_NORMS or (kind == "glm4_moe" and fields.flag("use_qk_norm")):
        other += 2 * head_dim  # norms of queries and keys
    if kind == "gpt_oss":
        other += heads  # sinks
    queries, keys = hidden * heads * head_dim, hidden * kv_heads * head_dim
    if kind == "phi3":
        matrices = {"self_attn.qkv_proj": queries + 2 * keys, "self_attn.o_proj": queries}
    else:
        matrices = dict(zip(_named("self_attn.{}_proj", "q k v o"), (queries, keys, keys, queries), strict=True))
    attention = _grouped(matrices, other, heads, kv_heads, head_dim)
    norms = {"gemma2": 4, "gemma3_text": 4, "palm": 1}.get(kind, 2) * hidden
    dense = _gated_feed(hidden, fields.count("intermediate_size"), joined=kind == "phi3")
    if kind == "llama" and fields.flag("mlp_bias"):
        dense = replace(dense, other=2 * dense.inner + hidden)
    feeds = _expert_layers(fields, kind, hidden, layers, dense) if kind in _EXPERTS else [dense] * layers
    windows = _windows(fields, kind, layers)
    return ModelShape(
        hidden=hidden,
        vocab=fields.count("vocab_size"),
        layers=[LayerShape(attention, feed, norms, window) for feed, window in zip(feeds, windows, strict=True)],
        context=context_tokens(fields, fields.count("max_position_embeddings", default=2048)),
        tied=fields.flag("tie_word_embeddings", default=kind == "palm"),
        other=hidden,
    )


def _attention_biases(fields: Fields, kind: str, hidden: int, qkv_width: int) -> int:
    """Elements of the biases of queries, keys and values, and of the output where the family has one."""
    if kind in _ALL_BIASES:
        return (qkv_width + hidden) * fields.flag("attention_bias")
    if kind == "qwen2_moe":
        return qkv_width * fields.flag("qkv_bias", default=True)
    return qkv_width * (kind == "qwen2" or (kind == "glm4_moe" and fields.flag("attention_bias")))


def _expert_layers(
    fields: Fields, kind: str, hidden: int, layers: int, dense: FeedForwardShape
) -> list[FeedForwardShape]:
    """One feed-forward per layer: experts, where the config says so."""
    if kind == "glm4_moe":
        return _shared_and_routed(fields, kind, hidden, layers, dense)
    experts, per_token = _experts(fields, "num_local_experts", "num_experts", zero=kind.startswith("qwen"))
    if kind == "mixtral":
        names = ("block_sparse_moe.gate", "block_sparse_moe.experts.0.{}", "w1 w3 w2")
        return [_routed(hidden, dense.inner, experts, per_token, names)] * layers
    if kind == "gpt_oss":
        biases = experts * (2 * dense.inner + hidden) + experts
        names = ("mlp.router", "mlp.experts.0.{}_proj", "gate up down")
        return [replace(_routed(hidden, dense.inner, experts, per_token, names), other=biases)] * layers
    inner = fields.count("moe_intermediate_size")
    routed = replace(_routed(hidden, inner, experts, per_token), inner=dense.inner)
    if kind == "qwen2_moe":
        shared = _shared("mlp.shared_expert", hidden, fields.count("shared_expert_intermediate_size"))
        routed = replace(routed, matrices={**routed.matrices, **shared, "mlp.shared_expert_gate": hidden})
    step = fields.count("decoder_sparse_step", default=1)
    only = fields.raw.get("mlp_only_layers") or []
    if not isinstance(only, list) or any(type(index) is not int or not 0 <= index < layers for index in only):
        raise fields.wrong(f"mlp_only_layers is {only!r:.80}; a list of layer numbers below {layers} is expected")
    without = [not experts or index in only or (index + 1) % step > 0 for index in range(layers)]
    return [dense if plain else routed for plain in without]


def _shared_and_routed(
    fields: Fields, kind: str, hidden: int, layers: int, dense: FeedForwardShape
) -> list[FeedForwardShape]:
    """DeepSeek and GLM: a few dense layers, then shared and routed experts; but V2's, routers have a correction."""
    experts, per_token = _experts(fields, "n_routed_experts")
    inner = fields.count("moe_intermediate_size")
    routed = _routed(hidden, inner, experts, per_token)
    together = inner * fields.count("n_shared_experts", default=0, zero=True)
    shared = _shared("mlp.shared_experts", hidden, together) if together else {}
    biases = (2 * together + hidden) * (kind == "deepseek_v2" and together > 0 and fields.flag("mlp_bias"))
    other = biases if kind == "deepseek_v2" else experts
    routed = replace(routed, matrices={**routed.matrices, **shared}, other=other)
    first = fields.count("first_k_dense_replace", default=0, zero=True)
    return [routed if index >= first else dense for index in range(layers)]


def _latent(fields: Fields, kind: str) -> ModelShape:
    """DeepSeek V2 and V3, Kimi K2: latent attention, shared and routed experts after a few dense layers."""
    hidden, layers = fields.count("hidden_size"), _layers(fields, "num_hidden_layers")
    heads = fields.count("num_attention_heads")
    latent, rope = fields.count("kv_lora_rank"), fields.count("qk_rope_head_dim")
    nope, value = fields.count("qk_nope_head_dim"), fields.count("v_head_dim")
    query_latent, query = fields.count("q_lora_rank", default=0, zero=True), heads * (nope + rope)
    if query_latent:
        queries = {"self_attn.q_a_proj": hidden * query_latent, "self_attn.q_b_proj": query_latent * query}
    else:
        queries = {"self_attn.q_proj": hidden * query}
    biases = (query_latent + latent + rope + hidden) * fields.flag("attention_bias")
    attention = AttentionShape(
        matrices={
            **queries,
            "self_attn.kv_a_proj_with_mqa": hidden * (latent + rope),
            "self_attn.kv_b_proj": latent * heads * (nope + value),
            "self_attn.o_proj": heads * value * hidden,
        },
        other=query_latent + latent + biases,
        query_heads=heads,
        key_dim=latent + rope,
        value_dim=latent,
        kv_elements=latent + rope,
        kv_heads=1,
    )
    dense = _gated_feed(hidden, fields.count("intermediate_size"))
    if kind == "deepseek_v2" and fields.flag("mlp_bias"):
        dense = replace(dense, other=2 * dense.inner + hidden)
    feeds = _shared_and_routed(fields, kind, hidden, layers, dense)
    return ModelShape(
        hidden=hidden,
        vocab=fields.count("vocab_size"),
        layers=[LayerShape(attention, feed, 2 * hidden, 0) for feed in feeds],
        context=context_tokens(fields, fields.count("max_position_embeddings", default=4096)),
        tied=fields.flag("tie_word_embeddings"),
        other=hidden,
    )


def _gpt(fields: Fields, kind: str) -> ModelShape:
    """GPT, GPT-2 and GPT-J: the first two with learned positions, the last with a bias of the head."""
    if fields.flag("add_cross_attention"):
        raise UnsupportedModelError(f"{fields.origin}: headrace does not know the shape of cross-attention")
    hidden, heads = fields.count("hidden_size", "n_embd"), fields.count("num_attention_heads", "n_head")
    layers = _layers(fields, "num_hidden_layers", "n_layer")
    context = fields.count("n_positions", "max_position_embeddings", "n_ctx", default=2048)
    inner = 4 * hidden if kind == "openai-gpt" else fields.count("n_inner", default=4 * hidden)
    joined = kind != "gptj"
    names = ("attn.c_attn", "attn.c_proj") if joined else _named("attn.{}", "q_proj k_proj v_proj out_proj")
    feed = _two_matrices(hidden, inner, ("mlp.c_fc", "mlp.c_proj") if joined else ("mlp.fc_in", "mlp.fc_out"))
    norms = 4 * hidden if joined else 2 * hidden
    vocab = fields.count("vocab_size")
    return ModelShape(
        hidden=hidden,
        vocab=vocab,
        layers=[LayerShape(_joined(fields, hidden, heads, heads, names, bias=joined), feed, norms, 0)] * layers,
        context=context,
        tied=fields.flag("tie_word_embeddings"),
        other={"openai-gpt": 0, "gpt2": 2 * hidden}.get(kind, 2 * hidden + vocab),
        positions=context * hidden if joined else 0,
        path="transformer.h",
    )


def _opt(fields: Fields, _: str) -> ModelShape:
    """OPT: learned positions, of which two are never used; a table that may be narrower than the layers."""
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    layers, inner = _layers(fields, "num_hidden_layers"), fields.count("ffn_dim", default=4 * hidden)
    context = fields.count("max_position_embeddings", default=2048)
    bias, affine = fields.flag("enable_bias"), fields.flag("layer_norm_elementwise_affine")
    width = fields.count("word_embed_proj_dim", default=hidden)
    final = fields.flag("do_layer_norm_before") and not fields.flag("_remove_final_layer_norm")
    attention = _joined(
        fields, hidden, heads, heads, _named("self_attn.{}", "q_proj k_proj v_proj out_proj"), bias=bias
    )
    feed = _two_matrices(hidden, inner, ("fc1", "fc2"), bias=bias)
    return ModelShape(
        hidden=hidden,
        vocab=fields.count("vocab_size"),
        layers=[LayerShape(attention, feed, 4 * hidden * affine, 0)] * layers,
        context=context,
        tied=fields.flag("tie_word_embeddings"),
        other=2 * hidden * (final and affine) + (2 * width * hidden if width != hidden else 0),
        positions=(context + 2) * hidden,
        table_width=width,
        path="model.decoder.layers",
    )


def _bloom(fields: Fields, _: str) -> ModelShape:
    """BLOOM: biases everywhere, a norm after the embedding, no positions (ALiBi)."""
    hidden, heads = fields.count("hidden_size", "n_embed"), fields.count("num_attention_heads", "n_head")
    attention = _joined(fields, hidden, heads, heads, _named("self_attention.{}", "query_key_value dense"), bias=True)
    feed = _two_matrices(hidden, 4 * hidden, _named("mlp.{}", "dense_h_to_4h dense_4h_to_h"))
    return ModelShape(
        hidden=hidden,
        vocab=fields.count("vocab_size"),
        layers=[LayerShape(attention, feed, 4 * hidden, 0)] * _layers(fields, "num_hidden_layers", "n_layer"),
        context=fields.count("seq_length", "n_positions", default=2048),
        tied=fields.flag("tie_word_embeddings"),
        other=4 * hidden,
        path="transformer.h",
    )


def _gpt_neox(fields: Fields, _: str) -> ModelShape:
    """GPT-NeoX and Pythia: rotary positions, biases everywhere unless attention has none."""
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    names = _named("attention.{}", "query_key_value dense")
    attention = _joined(fields, hidden, heads, heads, names, bias=fields.flag("attention_bias"))
    inner = fields.count("intermediate_size", default=4 * hidden)
    feed = _two_matrices(hidden, inner, _named("mlp.{}", "dense_h_to_4h dense_4h_to_h"))
    return ModelShape(
        hidden=hidden,
        vocab=fields.count("vocab_size"),
        layers=[LayerShape(attention, feed, 4 * hidden, 0)] * _layers(fields, "num_hidden_layers"),
        context=context_tokens(fields, fields.count("max_position_embeddings", default=2048)),
        tied=fields.flag("tie_word_embeddings"),
        other=2 * hidden,
        path="gpt_neox.layers",
    )


def _falcon(fields: Fields, _: str) -> ModelShape:
    """Falcon: one key-value head, or groups in its new architecture; attention and feed-forward side by side."""
    hidden, heads = fields.count("n_embed", "hidden_size"), fields.count("num_attention_heads")
    grouped, parallel = fields.flag("new_decoder_architecture"), fields.flag("parallel_attn")
    kv_heads = 1 if fields.flag("multi_query") and not grouped else heads
    kv_heads = fields.count("num_kv_heads", default=heads) if grouped else kv_heads
    bias = fields.flag("bias")
    names = _named("self_attention.{}", "query_key_value dense")
    inner = fields.count("ffn_hidden_size", default=4 * hidden)
    both_norms = fields.count("num_ln_in_parallel_attn", default=2 if grouped else 1, zero=True) == 2
    context = fields.count("max_position_embeddings", default=2048)
    layer = LayerShape(
        _joined(fields, hidden, heads, kv_heads, names, bias=bias),
        _two_matrices(hidden, inner, _named("mlp.{}", "dense_h_to_4h dense_4h_to_h"), bias=bias),
        4 * hidden if both_norms or not parallel else 2 * hidden,
        0,
    )
    return ModelShape(
        hidden=hidden,
        vocab=fields.count("vocab_size"),
        layers=[layer] * _layers(fields, "num_hidden_layers"),
        context=context if fields.flag("alibi") else context_tokens(fields, context),
        tied=fields.flag("tie_word_embeddings"),
        other=2 * hidden,
        path="transformer.h",
    )


_GATED = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 palm mixtral qwen2_moe qwen3_moe gpt_oss glm4_moe"
_BUILDERS: dict[str, Callable[[Fields, str], ModelShape]] = {
    **dict.fromkeys(_GATED.split(), _gated),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _latent),
    **dict.fromkeys(("gpt2", "openai-gpt", "gptj"), _gpt),
    "opt": _opt,
    "bloom": _bloom,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
}
MODEL_TYPES = (*_BUILDERS, *_SAME_SHAPE)
"""values of model_type whose shape is known"""


# -- parts --------------------------------------------------------------------------------------------------------


def _layers(fields: Fields, *names: str) -> int:
    layers = fields.count(*names)
    if layers > _MOST_LAYERS:
        raise fields.wrong(f"{names[0]} is {layers}; at most {_MOST_LAYERS} make sense")
    return layers


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    head_dim = fields.count("head_dim", default=0)
    if not head_dim and hidden % heads:
        raise fields.wrong(f"hidden_size {hidden} is no multiple of {heads} attention heads")
    return head_dim or hidden // heads


def _divides(fields: Fields, heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise fields.wrong(f"{heads} attention heads are no multiple of {kv_heads} key-value heads")


def _named(form: str, names: str) -> tuple[str, ...]:
    return tuple(form.format(name) for name in names.split())


def _gated_feed(hidden: int, inner: int, *, joined: bool = False) -> FeedForwardShape:
    size = hidden * inner
    if joined:
        return FeedForwardShape(inner=inner, matrices={"mlp.gate_up_proj": 2 * size, "mlp.down_proj": size})
    return FeedForwardShape(inner=inner, matrices=dict.fromkeys(_named("mlp.{}_proj", "gate up down"), size))


def _shared(module: str, hidden: int, inner: int) -> Matrices:
    return dict.fromkeys(_named(module + ".{}_proj", "gate up down"), hidden * inner)


def _experts(fields: Fields, *names: str, zero: bool = False) -> tuple[int, int]:
    """How many there are, and how many a token uses."""
    experts = fields.count(*names, zero=zero)
    per_token = fields.count("num_experts_per_tok", "experts_per_token")
    if experts and per_token > experts:
        raise fields.wrong(f"num_experts_per_tok is {per_token}, but there are {experts} experts")
    return experts, per_token


def _routed(
    hidden: int,
    inner: int,
    experts: int,
    per_token: int,
    names: tuple[str, str, str] = ("mlp.gate", "mlp.experts.0.{}_proj", "gate up down"),
) -> FeedForwardShape:
    router, form, matrices = names
    return FeedForwardShape(
        inner=inner,
        matrices={router: hidden * experts},
        expert=dict.fromkeys(_named(form, matrices), hidden * inner),
        num_experts=experts,
        per_token=per_token,
    )


def _two_matrices(hidden: int, inner: int, names: tuple[str, ...], *, bias: bool = True) -> FeedForwardShape:
    return FeedForwardShape(inner=inner, matrices=dict.fromkeys(names, hidden * inner), other=(inner + hidden) * bias)


def _joined(
    fields: Fields, hidden: int, heads: int, kv_heads: int, names: tuple[str, ...], *, bias: bool
) -> AttentionShape:
    """Attention of the older families, its matrices named one by one or the first three as one."""
    if hidden % heads:
        raise fields.wrong(f"hidden size {hidden} is no multiple of {heads} attention heads")
    _divides(fields, heads, kv_heads)
    head_dim = hidden // heads
    width = (heads + 2 * kv_heads) * head_dim
    sizes = (width * hidden, hidden * hidden) if len(names) == 2 else (hidden * hidden,) * 4
    return _grouped(dict(zip(names, sizes, strict=True)), (width + hidden) * bias, heads, kv_heads, head_dim)


def _grouped(matrices: Matrices, other: int, heads: int, kv_heads: int, head_dim: int) -> AttentionShape:
    return AttentionShape(
        matrices=matrices,
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
    used = not kind.startswith("qwen") or fields.flag("use_sliding_window")
    if kinds is not None:
        named = _layer_types(fields, kinds, layers, window)
        return [window if used and name == "sliding_attention" else 0 for name in named]
    if not window or not used or kind in {"llama", "gemma"}:
        return [0] * layers
    if kind == "gemma3_text":
        pattern = fields.count("sliding_window_pattern", "_sliding_window_pattern", default=6)
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
