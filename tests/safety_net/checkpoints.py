"""Checkpoints of real shape whose files are holes: plans read the headers alone."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Tensors = Iterator[tuple[str, tuple[int, ...]]]

ELEMENT_BYTES = {"BF16": 2, "F32": 4}


class Checkpoint(NamedTuple):
    """What is written: config.json, the tensors in the order of the files, and the number of files."""

    config: dict[str, Any]
    dtype: str
    shards: int
    tensors: list[tuple[str, tuple[int, ...]]]


def _llama(config: dict[str, Any]) -> Tensors:
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    gemma, experts = config["model_type"] == "gemma3_text", config.get("num_local_experts", 0)
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        yield layer + "input_layernorm.weight", (hidden,)
        if experts:
            yield layer + "block_sparse_moe.gate.weight", (experts, hidden)
            for expert in range(experts):
                prefix = f"{layer}block_sparse_moe.experts.{expert}."
                yield prefix + "w1.weight", (inner, hidden)
                yield prefix + "w2.weight", (hidden, inner)
                yield prefix + "w3.weight", (inner, hidden)
        else:
            yield layer + "mlp.down_proj.weight", (hidden, inner)
            yield layer + "mlp.gate_proj.weight", (inner, hidden)
            yield layer + "mlp.up_proj.weight", (inner, hidden)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        if gemma:
            yield layer + "post_feedforward_layernorm.weight", (hidden,)
            yield layer + "pre_feedforward_layernorm.weight", (hidden,)
            yield layer + "self_attn.k_norm.weight", (head,)
            yield layer + "self_attn.q_norm.weight", (head,)
        yield layer + "self_attn.k_proj.weight", (keys, hidden)
        yield layer + "self_attn.o_proj.weight", (hidden, queries)
        yield layer + "self_attn.q_proj.weight", (queries, hidden)
        yield layer + "self_attn.v_proj.weight", (keys, hidden)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden)


def _gpt2(config: dict[str, Any]) -> Tensors:
    """The names without a prefix, and the masks that old files hold and plans leave out."""
    hidden, positions = config["n_embd"], config["n_positions"]
    for number in range(config["n_layer"]):
        layer = f"h.{number}."
        yield layer + "attn.bias", (1, 1, positions, positions)
        yield layer + "attn.c_attn.bias", (3 * hidden,)
        yield layer + "attn.c_attn.weight", (hidden, 3 * hidden)
        yield layer + "attn.c_proj.bias", (hidden,)
        yield layer + "attn.c_proj.weight", (hidden, hidden)
        for norm in ("ln_1", "ln_2"):
            yield f"{layer}{norm}.bias", (hidden,)
            yield f"{layer}{norm}.weight", (hidden,)
        yield layer + "mlp.c_fc.bias", (4 * hidden,)
        yield layer + "mlp.c_fc.weight", (hidden, 4 * hidden)
        yield layer + "mlp.c_proj.bias", (hidden,)
        yield layer + "mlp.c_proj.weight", (4 * hidden, hidden)
    yield "ln_f.bias", (hidden,)
    yield "ln_f.weight", (hidden,)
    yield "wpe.weight", (positions, hidden)
    yield "wte.weight", (config["vocab_size"], hidden)


LLAMA_3GB = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
GEMMA_3_12B = {
    "model_type": "gemma3_text",
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "layer_types": [("full" if number % 6 == 5 else "sliding") + "_attention" for number in range(48)],
    "tie_word_embeddings": True,
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
GPT2_XL = {
    "model_type": "gpt2",
    "n_embd": 1600,
    "n_layer": 48,
    "n_head": 25,
    "n_positions": 1024,
    "vocab_size": 50257,
    "activation_function": "gelu_new",
}

CHECKPOINTS = {
    "llama-3gb": Checkpoint(LLAMA_3GB, "BF16", 2, list(_llama(LLAMA_3GB))),
    "gemma-3-12b": Checkpoint(GEMMA_3_12B, "BF16", 5, list(_llama(GEMMA_3_12B))),
    "mixtral-8x7b": Checkpoint(MIXTRAL_8X7B, "BF16", 19, list(_llama(MIXTRAL_8X7B))),
    "gpt2-xl": Checkpoint(GPT2_XL, "F32", 1, list(_gpt2(GPT2_XL))),
}


def write_checkpoint(directory: Path, name: str) -> None:
    """Write `directory/name`: its headers take a few kilobytes of the disk, its weights none."""
    made = CHECKPOINTS[name]
    directory = directory / name
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(made.config))
    each = math.ceil(len(made.tensors) / made.shards)
    weight_map = {}
    for number in range(made.shards):
        tensors = made.tensors[number * each : (number + 1) * each]
        of = f"-{number + 1:05d}-of-{made.shards:05d}" if made.shards > 1 else ""
        _write_shard(directory / f"model{of}.safetensors", made.dtype, tensors)
        weight_map.update({tensor: f"model{of}.safetensors" for tensor, _ in tensors})
    if made.shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _write_shard(path: Path, dtype: str, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + ELEMENT_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
