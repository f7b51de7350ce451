"""A tiny random checkpoint of every type of causal language model that transformers can build."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
BUILD_S_MAX = 60

_LAYERS, _HEADS, _HIDDEN, _LONG, _VOCABULARY = 4, 4, 64, 128, 256
_SAME_FIELD = {
    # Fields that mean the same, under the names that config classes give them.
    _HIDDEN: "hidden_size n_embd d_model attention_hidden_size embedding_size lru_width",
    _LONG: "max_position_embeddings n_positions intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim "
    "d_ff ffn_hidden_size shared_intermediate_size",
    _LAYERS: "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_experts "
    "num_local_experts n_routed_experts moe_num_experts num_attention_heads n_head n_heads num_heads "
    "decoder_attention_heads encoder_attention_heads mamba_n_heads mamba_num_heads linear_num_value_heads",
    2: "num_key_value_heads num_experts_per_tok moe_topk linear_num_key_heads num_global_key_value_heads eos_token_id "
    "num_mem_blocks",
    1: "n_group topk_group first_k_dense_replace bos_token_id mamba_n_groups n_groups",
    0: "pad_token_id num_kv_shared_layers",
    16: "head_dim d_kv linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input global_head_dim "
    "attention_head_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank mamba_d_head "
    "mamba_head_dim",
    8: "rotary_dim state_size mamba_d_state ssm_state_size",
    _VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
_FIELDS = {name: size for size, names in _SAME_FIELD.items() for name in names.split()}
_LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_LATENT |= {"num_key_value_heads": _HEADS}
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_expand": 2},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_expand": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 32, "expand": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "ernie4_5_moe": {"moe_k": 2},
}


def config_of(kind: str) -> Any:
    """The config of a tiny model of this type."""
    plain = AutoConfig.for_model(kind)
    inner = getattr(plain, "text_config", None)
    owner = plain if inner is None else inner
    names = set(owner.to_dict())
    fields: dict[str, Any] = {name: size for name, size in _FIELDS.items() if name in names}
    if "kv_lora_rank" in names:
        fields |= _LATENT
        fields.pop("head_dim", None)
    fields |= _SPECIAL.get(kind, {})
    if inner is not None:
        fields = {"text_config": {**fields, "model_type": inner.model_type}}
    config = AutoConfig.for_model(kind, **fields)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def save_type(kind: str, directory: Path, **fields: Any) -> Any:
    """Save a random float32 model of this type, with `fields` in its config; return it as transformers loads it.

    Raises whatever transformers raises where it cannot make, run or load it.
    """
    with _time_limit(BUILD_S_MAX):
        torch.manual_seed(1)
        config = config_of(kind)
        config.update(fields)
        model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
        with torch.no_grad():
            model(input_ids=torch.ones(1, 6, dtype=torch.long), use_cache=True)
        model.save_pretrained(directory)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
