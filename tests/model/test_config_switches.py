"""Every switch of every family, built by transformers: as many parameters, and what a class ignores is ignored."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from headrace.model.from_config import MODEL_TYPES, model_from_config

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    **{kind: {"head_dim": 16} for kind in ("qwen3", "gemma", "gemma2", "gemma3_text", "gpt_oss")},
    **{kind: {"num_experts": 4, "shared_expert_intermediate_size": 48}
       for kind in ("qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text", "qwen3_omni_moe_text")},
    **{kind: {"num_local_experts": 4, "head_dim": 16} for kind in ("mixtral", "gpt_oss")},
    **{kind: {
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    } for kind in ("deepseek_v2", "deepseek_v3")},
    "glm4_moe": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon": {"num_kv_heads": 2},
    **{kind: {"rotary_dim": 8} for kind in ("gpt2", "openai-gpt", "gptj")},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
}  # fmt: skip
FAMILIES = [kind for kind in MODEL_TYPES if kind in CONFIG_MAPPING]
"""the library lacks PaLM, and knows Kimi K2 as the DeepSeek V3 it is"""
NOT_SIZES = {"use_cache", "output_router_logits", "add_cross_attention"}
"""switches of generation and training; cross-attention is refused"""
COMBINED: dict[str, list[dict[str, Any]]] = {
    "falcon": [
        {"new_decoder_architecture": grouped, "parallel_attn": parallel, "num_ln_in_parallel_attn": norms,
         "multi_query": multi, "bias": grouped}
        for grouped in (True, False) for parallel in (True, False) for multi in (True, False) for norms in (None, 1, 2)
    ],
    "opt": [{"do_layer_norm_before": before, "layer_norm_elementwise_affine": False, "enable_bias": False}
            for before in (True, False)],
    "deepseek_v2": [{"q_lora_rank": None, "attention_bias": True, "mlp_bias": True}, {"n_shared_experts": 1}],
    "deepseek_v3": [{"q_lora_rank": None, "attention_bias": True}, {"n_shared_experts": 2}],
    "qwen2_moe": [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {"num_experts": 0}],
    "qwen3_moe": [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {"attention_bias": True, "num_experts": 0}],
    "gpt2": [{"n_inner": 80}, {"tie_word_embeddings": False}],
    "llama": [{"num_key_value_heads": None}],
    "gemma": [{"num_key_value_heads": 1, "tie_word_embeddings": False}],
    "glm4_moe": [{"use_qk_norm": True, "attention_bias": True, "head_dim": 24}],
}  # fmt: skip


def switches(kind: str) -> dict[str, bool]:
    """The fields of a config class that are true or false, with what they are."""
    own = dataclasses.fields(CONFIG_MAPPING[kind])
    return {field.name: field.default for field in own if isinstance(field.default, bool)}


BASE = {field.name for field in dataclasses.fields(transformers.PretrainedConfig)}
ALL = {name for kind in FAMILIES for name in switches(kind) if name not in BASE | NOT_SIZES} | {
    "use_bias", "qkv_bias", "bias", "add_bias", "mlp_bias", "attention_bias", "use_qk_norm", "lm_head_bias",
    "attention_out_bias", "add_qkv_bias", "no_bias", "use_parallel_residual", "parallel_residual", "qk_layernorm",
}  # fmt: skip


def cases(kind: str) -> list[dict[str, Any]]:
    own = {name: value for name, value in switches(kind).items() if name in ALL | {"tie_word_embeddings"}}
    foreign = ALL - set(own)
    flipped = [{name: not value} for name, value in own.items()]
    return [{}, *flipped, dict.fromkeys(foreign, True), dict.fromkeys(foreign, False), *COMBINED.get(kind, [])]


def parameters_of(config: Any) -> int:
    """Of the library's causal model; of a text model within another one, its own and a head's."""
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config) if causal else text_model_class(config)(config)
    buffers = [buffer for name, buffer in model.named_buffers() if "e_score_correction_bias" in name]
    tied = causal or getattr(config, "tie_word_embeddings", False)
    head = 0 if tied else config.vocab_size * config.hidden_size
    return head + sum(int(tensor.numel()) for tensor in [*model.parameters(), *buffers])


def text_model_class(config: Any) -> Any:
    module = importlib.import_module(type(config).__module__.replace("configuration", "modeling"))
    found = [item for name, item in vars(module).items() if name.endswith("TextModel")]
    return next(item for item in found if item.config_class is type(config))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_switch_means_what_it_means_to_transformers(kind: str) -> None:
    for case in cases(kind):
        raw = {**SIZES, **OWN.get(kind, {}), **case}
        config = transformers.AutoConfig.for_model(kind, **raw, pad_token_id=None)
        model = model_from_config({"model_type": kind, **raw}, name="model", origin="config.json")
        assert model.parameters == parameters_of(config), case
        assert not model.notes
