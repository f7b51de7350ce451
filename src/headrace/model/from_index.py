"""Models with the exact bytes of a checkpoint or a GGUF file: what the tensors take as they are stored."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.dtypes import DTYPES, STORED_DTYPES
from headrace.errors import CheckpointCorruptError, UnsupportedModelError
from headrace.model.config_fields import read_config
from headrace.model.formats import find_format, is_format
from headrace.model.from_config import model_from_config
from headrace.model.gguf_index import GgufIndex, GgufTensor
from headrace.model.model import Layer, LayerGroup, Model
from headrace.model.safetensors_index import TensorEntry, TensorIndex

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blk|block)\.(\d+)\.")
_EXPERT = re.compile(r"(?:\.experts\.|_exps\.)")
_ATTENTION = re.compile(r"(?:self_attn|attention|\.attn\.|attn_(?:q|k|v|qkv|output|kv))")
_TABLE = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tokens_embed|token_embd)\.weight$")
_POSITIONS = re.compile(r"(?:^|\.)(?:wpe|embed_positions|positions_embed|position_embd)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.(?:weight|qweight|scales|qzeros|g_idx)$")
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
    "sliding_window": "attention.sliding_window",
    "kv_lora_rank": "attention.kv_lora_rank",
    "q_lora_rank": "attention.q_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "n_shared_experts": "expert_shared_count",
}


def model_from_checkpoint(directory: Path) -> Model:
    """Return the model of a safetensors checkpoint directory, its bytes those of its tensors.

    Raises CheckpointError for what cannot be read and UnsupportedModelError for unknown architectures.
    """
    index = TensorIndex.from_directory(directory)
    path = directory / "config.json"
    made = model_from_config(read_config(path), name=directory.resolve().name, origin=str(path))
    return with_stored_bytes(made, index.entries.values(), origin=str(directory))


def model_from_gguf(path: Path) -> Model:
    """Return the model of a GGUF file (or its parts), its bytes those of its tensors."""
    index = GgufIndex.from_file(path)
    architecture = index.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointCorruptError(f"{path} names no general.architecture")
    config = _config_of(index.metadata, architecture, index, path)
    made = model_from_config(config, name=path.stem, origin=str(path))
    model = with_stored_bytes(made, index.tensors, origin=str(path))
    prevailing: dict[str, int] = {}
    for tensor in index.tensors:
        prevailing[tensor.type_name] = prevailing.get(tensor.type_name, 0) + tensor.size_bytes
    name = max(prevailing, key=lambda kind: prevailing[kind])
    return replace(model, weight_format=find_format(name).name if is_format(name) else name)


def _config_of(metadata: Mapping[str, Any], architecture: str, index: GgufIndex, path: Path) -> dict[str, Any]:
    """Translate GGUF metadata into the fields of a config.json."""
    kinds: dict[str, str] = {"qwen3moe": "qwen3_moe", "qwen2moe": "qwen2_moe", "phi3": "phi3", "gemma3": "gemma3_text"}
    kinds |= {"gpt-oss": "gpt_oss", "deepseek2": "deepseek_v3", "gptneox": "gpt_neox"}
    config: dict[str, Any] = {"model_type": kinds.get(architecture, architecture)}
    for field, key in _FIELDS.items():
        value: Any = metadata.get(f"{architecture}.{key}")
        if isinstance(value, list):  # one entry per layer: models know one number
            value = max((item for item in value if isinstance(item, int)), default=None)
        if value is not None:
            config[field] = value
    if config.get("num_experts") and architecture == "llama":
        config |= {"model_type": "mixtral", "num_local_experts": config["num_experts"]}
    if architecture == "gpt2":
        config["n_positions"] = config.get("max_position_embeddings", 1024)
    embedding = next((tensor for tensor in index.tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointCorruptError(f"{path} holds no table token_embd.weight")
    config["vocab_size"] = embedding.shape[1]
    config["tie_word_embeddings"] = not any(tensor.name == "output.weight" for tensor in index.tensors)
    if config["model_type"] == "deepseek_v3":
        prefix = f"{architecture}.attention."
        mla_key = metadata.get(f"{prefix}key_length_mla", metadata.get(f"{prefix}key_length"))
        mla_value = metadata.get(f"{prefix}value_length_mla", metadata.get(f"{prefix}value_length"))
        if not isinstance(mla_key, int) or not isinstance(mla_value, int):
            raise UnsupportedModelError(f"{path}: a latent attention without its head lengths")
        config |= {
            "qk_nope_head_dim": mla_key - int(config.get("qk_rope_head_dim", 64)),
            "v_head_dim": mla_value,
            "n_routed_experts": config.get("num_experts"),
        }
    return config


def with_stored_bytes(made: Model, stored: Collection[TensorEntry | GgufTensor], *, origin: str) -> Model:
    """Replace the computed bytes by the stored ones: layer by layer, experts apart, ends and the rest apart."""
    layers: dict[int, dict[str, float]] = {}
    table = positions = head = rest = 0.0
    for tensor in stored:
        match = _LAYER.search(tensor.name)
        if match is not None:
            part = _part(tensor)
            tally = layers.setdefault(int(match[1]), {})
            tally[part] = tally.get(part, 0.0) + tensor.size_bytes
        elif _HEAD.search(tensor.name):
            head += tensor.size_bytes
        elif _TABLE.search(tensor.name):
            table += tensor.size_bytes
        elif _POSITIONS.search(tensor.name):
            positions += tensor.size_bytes
        else:
            rest += tensor.size_bytes
    count = made.num_layers
    missing = [number for number in range(count) if number not in layers]
    if missing:
        raise CheckpointCorruptError(
            f"{origin}: the config promises {count} layers, but the weights of layer {missing[0]} "
            f"({len(missing)} in all) are not there"
        )
    rest += sum(sum(tally.values()) for number, tally in layers.items() if number >= count)
    sized = [_sized(layer, layers[number]) for number, layer in enumerate(made.layers())]
    groups = tuple(LayerGroup(layer=layer, count=len(list(run))) for layer, run in itertools.groupby(sized))
    if not (table or head):
        raise CheckpointCorruptError(f"{origin}: neither an embedding table nor a head is there")
    return replace(
        made,
        groups=groups,
        embedding_bytes=(table or head) + positions,
        head_bytes=head or table,
        tied=not (table and head),
        other_bytes=rest,
        weight_format=_stored_format(made.weight_format, stored),
        source=origin,
    )


def _stored_format(named: str, stored: Collection[TensorEntry | GgufTensor]) -> str:
    """The format that most bytes are in: of 16 and 32 bits a config says nothing, or what a model was trained in."""
    sizes: Counter[str] = Counter()
    for tensor in stored:
        if isinstance(tensor, TensorEntry) and tensor.dtype in STORED_DTYPES:
            sizes[tensor.dtype] += tensor.size_bytes
    plain = named in {dtype.short_name for dtype in DTYPES.values()}
    return STORED_DTYPES[max(sizes, key=sizes.__getitem__)].short_name if plain and sizes else named


def _part(tensor: TensorEntry | GgufTensor) -> str:
    if len(tensor.shape) < 2:
        return "other"
    if _EXPERT.search(tensor.name):
        return "expert"
    return "attention" if _ATTENTION.search(tensor.name) else "feed_forward"


def _sized(layer: Layer, tally: Mapping[str, float]) -> Layer:
    experts = tally.get("expert", 0.0)
    return replace(
        layer,
        attention_bytes=tally.get("attention", 0.0),
        feed_forward_bytes=tally.get("feed_forward", 0.0) + (0.0 if layer.num_experts else experts),
        expert_bytes=experts / layer.num_experts if layer.num_experts else 0.0,
        other_bytes=tally.get("other", 0.0),
    )
