"""Formats of weights: bits of the named ones, and the bytes that a quantization_config stands for."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from headrace.model.catalogue import find_model
from headrace.model.formats import FORMATS, find_format, requantised
from headrace.model.from_config import model_from_config
from headrace.model.gguf_index import BLOCKS
from headrace.model.model import Model

HIDDEN = 4096
LLAMA = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
}
EXPERTS = {**LLAMA, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}


def model(quantization: Any, raw: dict[str, Any] = LLAMA) -> Model:
    return model_from_config({**raw, "quantization_config": quantization}, name="model", origin="config.json")


def compressed(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_format_takes_its_bits(name: str) -> None:
    plain = find_model("llama-3-8b")
    made = requantised(plain, name)
    layer = next(made.layers())
    assert layer.feed_forward_bytes * 8 / layer.feed_forward_parameters == pytest.approx(FORMATS[name].bits)
    assert made.parameters == plain.parameters
    assert made.weight_format == name
    assert made.kv_bytes_per_token() == plain.kv_bytes_per_token()


@pytest.mark.parametrize(
    ("name", "bits"),
    [("q4_0", 4.5), ("q8_0", 8.5), ("q6_k", 6.5625), ("mxfp4", 4.25), ("nvfp4", 4.5), ("int4-g32", 4.5),
     ("int4-g128", 4.15625), ("iq4_xs", 4.25), ("tq1_0", 1.6875), ("nf4", 4.126953125), ("q4_k_m", 4.85)],
)  # fmt: skip
def test_bits_per_weight_as_defined(name: str, bits: float) -> None:
    assert FORMATS[name].bits == bits


def test_every_block_type_of_gguf_has_a_format() -> None:
    assert {name for name, block, _ in BLOCKS.values() if block > 1} - {"q2_k"} <= set(FORMATS)


def test_ends_and_norms_keep_16_bits_except_in_gguf_files() -> None:
    plain, int4, q4 = (find_model(f"llama-3.1-8b{suffix}") for suffix in ("", "@int4", "@q4_0"))
    assert (int4.embedding_bytes, int4.head_bytes, int4.other_bytes) == (
        plain.embedding_bytes, plain.head_bytes, plain.other_bytes
    )  # fmt: skip
    assert q4.embedding_bytes * 8 == 4.5 * q4.embedding_parameters
    assert q4.head_bytes * 8 == 6.5625 * q4.head_parameters
    tied = find_model("llama-3.2-1b@q4_0")
    assert tied.embedding_bytes == tied.head_bytes


@pytest.mark.parametrize(
    ("name", "weights", "size_bytes"),
    [
        ("llama-3.1-8b", "q3_k_m", 4.02e9),
        ("llama-3.1-8b", "q5_k_m", 5.73e9),
        ("llama-3.1-8b", "q6_k", 6.60e9),
        ("llama-3.1-8b", "q8_0", 8.54e9),
    ],
)
def test_mixtures_are_as_large_as_published_files(name: str, weights: str, size_bytes: float) -> None:
    assert requantised(find_model(name), weights).weights_bytes == pytest.approx(size_bytes, rel=0.003)


def test_q4_k_m_is_within_4_percent_of_published_files() -> None:
    """Published: Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf has 4.92 GB, Qwen3-14B-Q4_K_M.gguf 9.00 GB."""
    assert requantised(find_model("llama-3.1-8b"), "q4_k_m").weights_bytes == pytest.approx(4.92e9, rel=0.04)
    assert requantised(find_model("qwen3-14b"), "Q4_K_M").weights_bytes == pytest.approx(9.00e9, rel=0.04)


def test_unknown_formats_are_refused_with_near_matches() -> None:
    assert find_format("FP16").name == "fp16"
    assert find_format("4bit").name == "int4"
    with pytest.raises(InvalidRequestError, match="did you mean q4_k_"):
        find_format("q4_k_x")


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, 4 + 20 / 32),
        ({"quant_method": "gptq", "bits": 3, "group_size": 64}, 3 + 19 / 64),
        ({"quant_method": "gptq", "bits": 8}, 8 + 24 / 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4 + 20 / HIDDEN),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 4.126953125),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8 + 32 / HIDDEN),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}, 8),
        (compressed(num_bits=4, type="int", strategy="group", group_size=32), 4.5),
        (compressed(num_bits=4, type="int", strategy="group", group_size=128, symmetric=False), 4 + 20 / 128),
        (compressed(num_bits=8, type="float", strategy="channel"), 8),
        (compressed(num_bits=8, type="int", strategy="channel"), 8 + 16 / HIDDEN),
        (compressed(num_bits=4, type="float", strategy="tensor_group", group_size=16), 4.5),
    ],
)
def test_stored_weights_take_the_bits_of_their_method(quantization: dict[str, Any], bits: float) -> None:
    made = model(quantization)
    for layer in made.layers():
        assert layer.attention_bytes * 8 == pytest.approx(bits * layer.attention_parameters)
        assert layer.feed_forward_bytes * 8 == pytest.approx(bits * layer.feed_forward_parameters)
        assert layer.other_bytes == 2 * layer.other_parameters
    assert made.head_bytes == 2 * made.head_parameters
    assert made.embedding_bytes == 2 * made.embedding_parameters


def test_modules_not_to_convert_keep_16_bits() -> None:
    """Names of modules, of one layer's modules, of patterns: as the methods write them."""
    attention = model({"quant_method": "fp8", "ignored_layers": ["self_attn", "lm_head"]})
    assert [layer.attention_bytes / layer.attention_parameters for layer in attention.layers()] == [2] * 4
    assert [layer.feed_forward_bytes / layer.feed_forward_parameters for layer in attention.layers()] == [1] * 4
    first = model({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.self_attn.o_proj"]})
    assert [layer.attention_bytes / layer.attention_parameters for layer in first.layers()] == [2, 1, 1, 1]
    wanted = {
        **compressed(num_bits=4, type="int", group_size=32),
        "ignore": ["re:.*self_attn.*", "re:.*shared_experts.*"],
    }
    experts = next(model(wanted, EXPERTS).layers())
    assert experts.attention_bytes == 2 * experts.attention_parameters
    assert experts.expert_bytes * 8 == 4.5 * experts.expert_parameters


def test_mxfp4_is_for_experts_alone() -> None:
    layer = next(model({"quant_method": "mxfp4"}, EXPERTS).layers())
    assert layer.expert_bytes * 8 == 4.25 * layer.expert_parameters
    assert layer.attention_bytes == 2 * layer.attention_parameters
    assert layer.feed_forward_bytes == 2 * layer.feed_forward_parameters


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 5}, "bits is 5"),
        ({"quant_method": "awq"}, "bits is missing"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0"),
        ({"quant_method": "gptq", "bits": "4"}, "bits is '4'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": "128"}, "weight_block_size"),
        ({"quant_method": "fp8", "ignored_layers": "lm_head"}, "ignored_layers"),
        ({"quant_method": "fp8", "ignored_layers": ["re:("]}, "no regular expression"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit"),
        ({"quant_method": "mxfp4"}, "experts only"),
        ({"quant_method": "modelopt", "quant_algo": "INT3"}, "INT3"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {}}}, "no weights"),
        (compressed(num_bits=5, type="int"), "int of 5 bits"),
        ({"quant_method": "hqq"}, "quantised by hqq; known: awq"),
    ],
)
def test_what_a_quantization_config_cannot_mean(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message) as caught:
        model(quantization)
    assert "config.json" in str(caught.value)
