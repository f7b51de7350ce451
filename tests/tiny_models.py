"""Tiny random models of every architecture that headrace streams, saved as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

_COMMON = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE = {**_COMMON, **_HEADS, **_SPECIAL, "max_position_embeddings": 128}
_MOE = {**_LLAMA_LIKE, "num_experts_per_tok": 2}
_GEMMA = {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 8}
_FALCON = {**_COMMON, **_SPECIAL, "num_attention_heads": 4, "max_position_embeddings": 128}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "llama-bias": ("LlamaConfig", {**_LLAMA_LIKE, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 16}),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": 8}),
    "gemma": ("GemmaConfig", {**_LLAMA_LIKE, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**_GEMMA, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "query_pre_attn_scalar": 16, "sliding_window_pattern": 3}),
    "phi3": ("Phi3Config", {**_LLAMA_LIKE, "sliding_window": None}),
    "gpt2": (
        "GPT2Config",
        {**_SPECIAL, "vocab_size": 320, "n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 128},
    ),
    "opt": (
        "OPTConfig",
        {**_SPECIAL, "vocab_size": 320, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 5}
        | {"num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 64},
    ),
    "opt-projected": (
        "OPTConfig",
        {**_SPECIAL, "vocab_size": 320, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 5}
        | {"num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32}
        | {"do_layer_norm_before": False},
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, **_SPECIAL, "num_attention_heads": 4, "max_position_embeddings": 128}),
    "falcon": ("FalconConfig", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-multi-query": ("FalconConfig", {**_FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon-alibi": ("FalconConfig", {**_FALCON, "multi_query": False, "alibi": True, "parallel_attn": False}),
    "mixtral": ("MixtralConfig", {**_MOE, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_MOE, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 48, "mlp_only_layers": []},
    ),
    "qwen3_moe-mixed": (
        "Qwen3MoeConfig",
        {**_MOE, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 48, "mlp_only_layers": [1]},
    ),
}


def save_tiny(
    name: str, directory: Path, *, dtype: torch.dtype = torch.bfloat16, shard: str = "100KB", **changes: Any
) -> Path:
    """Write the checkpoint of a tiny random model, in several shards; weights are large enough to matter."""
    class_name, options = CONFIGS[name]
    config = getattr(transformers, class_name)(**{**options, **changes})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def resident_reference(directory: Path, dtype: torch.dtype) -> Any:
    """transformers' own resident model, loaded as its users load it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
