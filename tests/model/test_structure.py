"""Configs are read as published, parts of a checkpoint found by name; what contradicts itself is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import CheckpointError, UnsupportedModelError
from headrace.model.config_fields import read_config
from headrace.model.from_config import model_from_config
from headrace.model.model import Model
from headrace.model.safetensors_index import TensorEntry
from headrace.model.stored_model import as_transformers_caches
from headrace.model.structure import parts_by_name, refuse_other_models

Raw = dict[str, Any]


def config(model_type: str, hidden: int, layers: int, heads: int, vocab: int, context: int, **fields: Any) -> Raw:
    """Return a config with the field names that most architectures share."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        **fields,
    }


def gqa(kv_heads: int, ffn: int, **fields: Any) -> Raw:
    return {"num_key_value_heads": kv_heads, "intermediate_size": ffn, **fields}


GEMMA_KINDS = ["sliding_attention"] * 5 + ["full_attention"]

# As published on the model hub, cut down to what matters: the config, then (hidden, ffn, layers, heads, kv heads, head
# dim, vocabulary, context), window of the first and of the last layer, experts, experts per token.
PUBLISHED: dict[str, tuple[Raw, tuple[int, ...], tuple[int, int], tuple[int, int]]] = {
    "llama": (
        config("llama", 4096, 32, 32, 128256, 8192, **gqa(8, 14336), architectures=["LlamaForCausalLM"]),
        (4096, 14336, 32, 32, 8, 128, 128256, 8192),
        (0, 0),
        (0, 0),
    ),
    "mistral": (
        config("mistral", 4096, 32, 32, 32000, 32768, **gqa(8, 14336), sliding_window=4096),
        (4096, 14336, 32, 32, 8, 128, 32000, 32768),
        (4096, 4096),
        (0, 0),
    ),
    "mistral-without-window": (
        config("mistral", 4096, 32, 32, 32768, 32768, **gqa(8, 14336), sliding_window=None),
        (4096, 14336, 32, 32, 8, 128, 32768, 32768),
        (0, 0),
        (0, 0),
    ),
    "qwen2": (
        config("qwen2", 3584, 28, 28, 152064, 32768, **gqa(4, 18944), sliding_window=131072, use_sliding_window=False),
        (3584, 18944, 28, 28, 4, 128, 152064, 32768),
        (0, 0),
        (0, 0),
    ),
    "qwen3": (
        config("qwen3", 2560, 36, 32, 151936, 40960, **gqa(8, 9728), head_dim=128, sliding_window=None),
        (2560, 9728, 36, 32, 8, 128, 151936, 40960),
        (0, 0),
        (0, 0),
    ),
    "gemma": (
        config("gemma", 2048, 18, 8, 256000, 8192, **gqa(1, 16384), head_dim=256),
        (2048, 16384, 18, 8, 1, 256, 256000, 8192),
        (0, 0),
        (0, 0),
    ),
    "gemma2": (
        config(
            "gemma2",
            3584,
            4,
            16,
            256000,
            8192,
            **gqa(8, 14336),
            head_dim=256,
            sliding_window=4096,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        (3584, 14336, 4, 16, 8, 256, 256000, 8192),
        (4096, 0),
        (0, 0),
    ),
    "gemma3_text": (
        config(
            "gemma3_text",
            1152,
            6,
            4,
            262144,
            32768,
            **gqa(1, 6912),
            head_dim=256,
            sliding_window=512,
            layer_types=GEMMA_KINDS,
        ),
        (1152, 6912, 6, 4, 1, 256, 262144, 32768),
        (512, 0),
        (0, 0),
    ),
    "phi3": (
        config("phi3", 3072, 32, 32, 32064, 4096, **gqa(32, 8192), sliding_window=2047),
        (3072, 8192, 32, 32, 32, 96, 32064, 4096),
        (2047, 2047),
        (0, 0),
    ),
    "mixtral": (
        config("mixtral", 4096, 32, 32, 32000, 32768, **gqa(8, 14336), num_local_experts=8, num_experts_per_tok=2),
        (4096, 14336, 32, 32, 8, 128, 32000, 32768),
        (0, 0),
        (8, 2),
    ),
    "qwen3_moe": (
        config(
            "qwen3_moe",
            2048,
            48,
            32,
            151936,
            40960,
            **gqa(4, 6144),
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        (2048, 6144, 48, 32, 4, 128, 151936, 40960),
        (0, 0),
        (128, 8),
    ),
    "gpt2": (
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
        (768, 3072, 12, 12, 12, 64, 50257, 1024),
        (0, 0),
        (0, 0),
    ),
    "opt": (
        config("opt", 768, 12, 12, 50272, 2048, ffn_dim=3072),
        (768, 3072, 12, 12, 12, 64, 50272, 2048),
        (0, 0),
        (0, 0),
    ),
    "gpt_neox": (
        config("gpt_neox", 6144, 44, 64, 50432, 2048, intermediate_size=24576),
        (6144, 24576, 44, 64, 64, 96, 50432, 2048),
        (0, 0),
        (0, 0),
    ),
    # Falcon's three forms. The grouped heads of the new one are repeated to all heads before they are cached.
    "falcon": (
        config("falcon", 8192, 60, 128, 65024, 2048, new_decoder_architecture=True, num_kv_heads=8),
        (8192, 32768, 60, 128, 128, 64, 65024, 2048),
        (0, 0),
        (0, 0),
    ),
    "falcon-multi-query": (
        config("falcon", 4544, 32, 71, 65024, 2048, new_decoder_architecture=False, multi_query=True),
        (4544, 18176, 32, 71, 1, 64, 65024, 2048),
        (0, 0),
        (0, 0),
    ),
    "falcon-classic": (
        config("falcon", 2048, 24, 32, 50304, 2048, multi_query=False, alibi=True),
        (2048, 8192, 24, 32, 32, 64, 50304, 2048),
        (0, 0),
        (0, 0),
    ),
}


def streamed(raw: Raw, *, origin: str = "c") -> Model:
    refuse_other_models(raw, origin=origin)
    return as_transformers_caches(model_from_config(raw, name="model", origin=origin), raw)


def dimensions(model: Model) -> tuple[int, ...]:
    layer = next(model.layers())
    assert layer.kv_elements_per_token == 2 * layer.kv_heads * layer.key_dim
    return (
        model.hidden_size,
        layer.intermediate_size,
        model.num_layers,
        layer.query_heads,
        layer.kv_heads,
        layer.key_dim,
        model.vocab_size,
        model.context_tokens,
    )


def windows_of(model: Model) -> tuple[int, ...]:
    return tuple(layer.window_tokens for layer in model.layers())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    raw, expected, windows, experts = PUBLISHED[name]
    model = streamed(raw)
    assert dimensions(model) == expected
    assert (windows_of(model)[0], windows_of(model)[-1]) == windows
    layer = next(model.layers())
    assert (layer.num_experts, layer.experts_per_token) == experts


def llama(**fields: Any) -> Raw:
    """Return a small config; a field given as None is left out."""
    raw = {**config("llama", 64, 4, 8, 320, 128, **gqa(4, 96)), **fields}
    return {key: value for key, value in raw.items() if value is not None}


# -- what may be left out ----------------------------------------------------------------------------------------------


def test_defaults() -> None:
    model = streamed(llama(num_key_value_heads=None, max_position_embeddings=None))
    assert dimensions(model) == (64, 96, 4, 8, 8, 8, 320, 2048)
    own = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}
    assert dimensions(streamed(own)) == (64, 256, 2, 4, 4, 16, 128, 1024)


def test_null_is_the_same_as_absent() -> None:
    raw = {**llama(), "head_dim": None, "num_key_value_heads": None, "quantization_config": None, "architectures": None}
    assert next(streamed(raw).layers()).kv_heads == 8


def test_a_head_dim_of_its_own_need_not_divide_the_width() -> None:
    model = streamed(llama(hidden_size=100, num_attention_heads=6, num_key_value_heads=3, head_dim=32))
    assert (model.hidden_size, next(model.layers()).key_dim) == (100, 32)


# -- sliding windows ---------------------------------------------------------------------------------------------------

KINDS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": 8}, (0, 0, 0, 0)),  # where the kinds are unknown, from above: the whole context
        ({"sliding_window": 8, "layer_types": KINDS}, (0, 8, 0, 8)),
        ({"sliding_window": 8, "layer_types": KINDS, "use_sliding_window": False}, (0, 8, 0, 8)),  # Qwen's alone
        ({"model_type": "gemma3_text", "sliding_window": 8, "head_dim": 8}, (0, 0, 0, 0)),
        ({"model_type": "mistral", "sliding_window": 8}, (8, 8, 8, 8)),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": KINDS}, (0, 8, 0, 8)),
        ({"model_type": "phi3", "sliding_window": 8}, (8, 8, 8, 8)),
        ({"model_type": "qwen2", "sliding_window": 8, "layer_types": KINDS}, (0, 0, 0, 0)),  # off unless switched on
        ({"model_type": "qwen2", "sliding_window": 8, "layer_types": KINDS, "use_sliding_window": True}, (0, 8, 0, 8)),
        ({"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True}, (0, 0, 0, 0)),
        (
            {"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
            (0, 0, 0, 0),
        ),
    ],
)
def test_sliding_windows(fields: Raw, windows: tuple[int, ...]) -> None:
    assert windows_of(streamed(llama(**fields))) == windows


def test_falcon_caches_its_grouped_heads_repeated() -> None:
    """The config's two heads stay the model's own; the runtime's cache holds all four."""
    raw = config("falcon", 64, 2, 4, 128, 64, new_decoder_architecture=True, num_kv_heads=2)
    own = next(model_from_config(raw, name="model", origin="c").layers())
    cached = next(streamed(raw).layers())
    assert (own.kv_heads, own.kv_elements_per_token) == (2, 2 * 2 * 16)
    assert (cached.kv_heads, cached.kv_elements_per_token) == (4, 2 * 4 * 16)
    assert cached.parameters == own.parameters


# -- parts by name -----------------------------------------------------------------------------------------------------


def entries(**shapes: tuple[int, ...]) -> list[TensorEntry]:
    """Tensors by name, in which `__` stands for a dot."""
    return [
        TensorEntry(name=name.replace("__", "."), dtype="F32", shape=shape, file_index=0, offset=0, size_bytes=size)
        for name, shape in shapes.items()
        for size in [4 * math.prod(shape)]
    ]


@pytest.mark.parametrize(
    ("table", "head", "prefix"),
    [
        ("model__embed_tokens__weight", "lm_head__weight", "model__layers"),
        ("transformer__wte__weight", "lm_head__weight", "transformer__h"),
        ("backbone__embeddings__weight", "head__weight", "backbone__blocks"),
        (
            "language_model__model__embed_tokens__weight",
            "language_model__lm_head__weight",
            "language_model__model__layers",
        ),
        ("something__else", "output_projection__weight", "decoder__stack"),
    ],
)
def test_parts_are_found_whatever_their_names(table: str, head: str, prefix: str) -> None:
    layers = {f"{prefix}__{layer}__experts__{number}__w": (8, 8) for layer in range(3) for number in range(4)}
    made = entries(**{table: (32, 8), head: (32, 8), "final_norm": (8,), "vision__blocks__0__w": (8, 8)}, **layers)
    parts = parts_by_name(made, num_layers=2, vocab_size=32, origin="c")
    assert (parts.layers, parts.embedding.name) == (prefix.replace("__", "."), table.replace("__", "."))
    assert parts.head is not None
    assert parts.head.name == head.replace("__", ".")
    assert [len(tensors) for tensors in parts.layer_tensors] == [4, 4], (
        "what lies beyond the config's layers is left out"
    )
    assert {entry.name for entry in parts.fixed} == {"final_norm", "vision.blocks.0.w"}


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [None, 7, ["llama"]])
def test_a_config_without_an_architecture_is_refused(model_type: object) -> None:
    with pytest.raises(CheckpointError, match="the file names no model_type"):
        streamed(llama() | {"model_type": model_type}, origin="the file")


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -4, 4.0, "4", True, [4], 2**40])
def test_sizes_without_sense_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"the file: {field} is"):
        streamed(llama() | {field: value}, origin="the file")


@pytest.mark.parametrize("field", ["num_key_value_heads", "intermediate_size", "head_dim", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -4, 4.5, "4", False])
def test_optional_sizes_without_sense_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"the file: {field} is"):
        streamed(llama() | {field: value}, origin="the file")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 65}, "hidden_size 65 is no multiple of 8 attention heads"),
        ({"num_key_value_heads": 3}, "8 attention heads are no multiple of 3 key-value heads"),
        ({"num_key_value_heads": 16}, "no multiple of 16"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"sliding_window": 8, "layer_types": KINDS[:3]}, "layer_types has 3 entries for 4 layers"),
        ({"sliding_window": 8, "layer_types": "sliding"}, "layer_types has 'sliding', not one entry each"),
        ({"sliding_window": 0, "layer_types": KINDS}, "sliding_window gives it no width"),
        ({"sliding_window": -8, "layer_types": KINDS}, "sliding_window is -8"),
        ({"sliding_window": True, "layer_types": KINDS}, "sliding_window is True"),
        ({"sliding_window": "8", "layer_types": KINDS}, "sliding_window is '8'"),
        ({"layer_types": KINDS}, "sliding_window gives it no width"),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": "yes"}, "true or false is expected"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "num_experts_per_tok is 8, but there are 4 experts"),
        ({"model_type": "qwen3_moe", "num_experts": -4, "num_experts_per_tok": 2}, "num_experts is -4"),
    ],
)
def test_contradictions_are_refused(fields: Raw, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        streamed(llama(**fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised weights \(gptq\)"),
        ({"quantization_config": {"bits": 4}}, r"quantised weights \(unknown\)"),
        ({"quantization_config": "fp8"}, r"quantised weights \(fp8\)"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"is_encoder_decoder": True}, "cross-attention"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is no causal"),
    ],
)
def test_forms_that_no_test_has_shown_right_are_refused(fields: Raw, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        streamed(llama(**fields))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "LlamaModel"])
def test_causal_language_models_are_accepted(name: str) -> None:
    streamed(llama(architectures=[name]))


# -- the file ----------------------------------------------------------------------------------------------------------


def test_reading_a_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama()))
    assert read_config(tmp_path / "config.json") == llama()


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"{'model_type': 'llama'}"])
def test_a_file_that_is_no_json_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize(("content", "found"), [("[]", "list"), ("7", "int"), ("null", "NoneType"), ('"x"', "str")])
def test_json_that_is_no_object_is_told(tmp_path: Path, content: str, found: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"holds {found} where an object is expected"):
        read_config(tmp_path / "config.json")


def test_a_directory_in_place_of_the_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_config(tmp_path / "config.json")
