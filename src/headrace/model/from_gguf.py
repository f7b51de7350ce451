"""A model from a GGUF file: its metadata read as the config.json it was made from, its bytes those of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.errors import CheckpointCorruptError, UnsupportedModelError
from headrace.model.formats import find_format, is_format
from headrace.model.from_config import model_from_config
from headrace.model.from_index import with_stored_bytes
from headrace.model.gguf_index import GgufIndex
from headrace.model.model import Model

_MODEL_TYPES = {
    # GGUF architecture: model_type; others have the same name
    "qwen2moe": "qwen2_moe",
    "qwen2vl": "qwen2",
    "qwen3moe": "qwen3_moe",
    "qwen3vl": "qwen3",
    "qwen3vlmoe": "qwen3_moe",
    "gemma3": "gemma3_text",
    "gpt-oss": "gpt_oss",
    "gptneox": "gpt_neox",
    "glm4moe": "glm4_moe",
    "mistral3": "mistral",
}
_FIELDS = {
    # config field: GGUF key after the architecture's name
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "sliding_window": "attention.sliding_window",
    "kv_lora_rank": "attention.kv_lora_rank",
    "q_lora_rank": "attention.q_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "n_shared_experts": "expert_shared_count",
}
_ROPE_SCALING = {"type": "type", "factor": "factor", "original_max_position_embeddings": "original_context_length"}
_WIDTHS = {
    # config field that older files lack: tensor whose rows are so many
    "moe_intermediate_size": "ffn_gate_exps.weight",
    "shared_expert_intermediate_size": "ffn_gate_shexp.weight",
}


def model_from_gguf(path: Path) -> Model:
    """Return the model of a GGUF file (or its parts), its bytes those of its tensors.

    Raises CheckpointError for what cannot be read and UnsupportedModelError for unknown architectures.
    """
    index = GgufIndex.from_file(path)
    architecture = index.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointCorruptError(f"{path} names no general.architecture")
    config = _config_of(index, architecture)
    model = with_stored_bytes(
        model_from_config(config, name=path.stem, origin=str(path)), index.tensors, origin=str(path)
    )
    prevailing: Counter[str] = Counter()
    for tensor in index.tensors:
        prevailing[tensor.type_name] += tensor.size_bytes
    name = max(prevailing, key=prevailing.__getitem__)
    return replace(model, weight_format=find_format(name).name if is_format(name) else name)


def _config_of(index: GgufIndex, architecture: str) -> dict[str, Any]:
    """Translate metadata into the fields of a config.json; what a file does not say, its tensors show."""
    tensors = {tensor.name: tensor for tensor in index.tensors}
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointCorruptError(f"{index.path} holds no table token_embd.weight")
    in_layers = {name.split(".", 2)[-1]: tensor for name, tensor in tensors.items() if name.startswith("blk.")}
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in index.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    shapes = {field: in_layers[name].shape for field, name in _WIDTHS.items() if name in in_layers}
    widths = {field: shape[1] for field, shape in shapes.items() if len(shape) > 1}
    # a key that is not there is null here: transformers' defaults are not those of GGUF files
    config: dict[str, Any] = {field: _one_number(own.get(key), widths.get(field)) for field, key in _FIELDS.items()}
    config |= {
        "model_type": _MODEL_TYPES.get(architecture, architecture),
        "vocab_size": embedding.shape[1],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "attn_q.bias" in in_layers or "attn_qkv.bias" in in_layers,
        "mlp_bias": "ffn_up.bias" in in_layers,
        "use_qk_norm": "attn_q_norm.weight" in in_layers,
        "rope_scaling": {name: own.get(f"rope.scaling.{key}") for name, key in _ROPE_SCALING.items()},
    }
    if type(beyond := own.get("nextn_predict_layers")) is int and isinstance(config["num_hidden_layers"], int):
        config["num_hidden_layers"] -= beyond  # layers that predict further tokens are no part of a pass
    return config | _of_one_architecture(architecture, config, own, in_layers, index.path)


def _of_one_architecture(
    architecture: str,
    config: Mapping[str, Any],
    own: Mapping[str, Any],
    in_layers: Collection[str],
    path: Path,
) -> dict[str, Any]:
    """What is called otherwise, or is not said, in files of one architecture."""
    context = config["max_position_embeddings"]
    match architecture:
        case "llama" if config["num_experts"]:
            return {"model_type": "mixtral", "num_local_experts": config["num_experts"]}
        case "gpt2" | "bloom" | "gptj":
            return {"n_positions": context}
        case "falcon":
            kv_heads = config["num_key_value_heads"]
            grouped = "attn_norm_2.weight" in in_layers
            return {"new_decoder_architecture": grouped, "num_kv_heads": kv_heads, "multi_query": kv_heads == 1}
        case "glm4moe":
            return {"n_routed_experts": config["num_experts"]}
        case "deepseek2":
            key = own.get("attention.key_length_mla", own.get("attention.key_length"))
            value = own.get("attention.value_length_mla", own.get("attention.value_length"))
            if not isinstance(key, int) or not isinstance(value, int):
                raise UnsupportedModelError(f"{path}: a latent attention without its head lengths")
            return {
                "model_type": "deepseek_v3"
                if any(name.startswith("exp_probs_b") for name in in_layers)
                else "deepseek_v2",
                "qk_nope_head_dim": key - int(config["qk_rope_head_dim"] or 64),
                "v_head_dim": value,
                "n_routed_experts": config["num_experts"],
            }
    return {}


def _one_number(value: Any, otherwise: int | None) -> Any:
    """Where a file gives an entry for each layer, the largest: models know one number."""
    if isinstance(value, list):
        return max((item for item in value if isinstance(item, int)), default=otherwise)
    return otherwise if value is None else value
