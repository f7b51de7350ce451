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
    assert [layer.attention_bytes / layer.attention_parameters for layer in first.layers()] == [1.4, 1, 1, 1]
    wanted = {
        **compressed(num_bits=4, type="int", group_size=32),
        "ignore": ["re:.*self_attn.*", "re:.*shared_experts.*"],
    }
    experts = next(model(wanted, EXPERTS).layers())
    assert experts.attention_bytes == 2 * experts.attention_parameters
    assert experts.expert_bytes * 8 == 4.5 * experts.expert_parameters


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def bits_of_parts(quantization: dict[str, Any], raw: dict[str, Any] = LLAMA, layer: int = 0) -> tuple[float, float]:
    """Bits of a weight in attention and feed-forward, on average."""
    made = list(model(quantization, raw).layers())[layer]
    attention = made.attention_bytes * 8 / made.attention_parameters
    return attention, made.feed_forward_bytes * 8 / made.feed_forward_parameters


def test_rules_of_gptq_are_followed_matrix_by_matrix() -> None:
    four, eight = 4 + 20 / 128, 8 + 24 / 128
    rules = {"-:.*down_proj.*": {}, "+:.*gate_proj.*": {"bits": 8}, r".*\.2\..*": {"bits": 8}}
    mixed = {**GPTQ, "dynamic": rules}
    assert bits_of_parts(mixed) == pytest.approx((four, (four + eight + 16) / 3))
    assert bits_of_parts(mixed, layer=2) == pytest.approx((eight, (eight + eight + 16) / 3)), "the first rule counts"
    grouped = {**GPTQ, "dynamic": {r"+:model\.layers\.1\.self_attn": {"bits": 2, "group_size": 32, "sym": False}}}
    assert bits_of_parts(grouped) == pytest.approx((four, four))
    assert bits_of_parts(grouped, layer=1) == pytest.approx((2 + 18 / 32, four))


def test_gptq_of_named_modules_and_of_the_head() -> None:
    some = {**GPTQ, "modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.q_proj"], ["mlp.up_proj"]]}
    four = 4 + 20 / 128
    assert bits_of_parts(some) == pytest.approx(((four + 16) / 2, (four + 32) / 3))
    with_head = model({**GPTQ, "lm_head": True})
    assert with_head.head_bytes * 8 == pytest.approx(four * with_head.head_parameters)
    assert model({**GPTQ, "lm_head": True}, {**LLAMA, "tie_word_embeddings": True}).head_bytes == 2 * 1024 * HIDDEN


def test_modules_go_by_the_names_that_their_family_gives_them() -> None:
    phi = {**LLAMA, "model_type": "phi3"}
    kept = {"quant_method": "fp8", "modules_to_not_convert": ["gate_up_proj", "qkv_proj"]}
    assert bits_of_parts(kept, phi) == pytest.approx(((48 * 16 + 32 * 8) / 80, (2 * 16 + 8) / 3))
    assert bits_of_parts(kept) == (8, 8)
    nested = {"quant_method": "fp8", "modules_to_not_convert": ["language_model.model.layers.0.mlp"]}
    assert bits_of_parts(nested) == (8, 16)
    assert bits_of_parts(nested, layer=1) == (8, 8)
    gpt = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 32}
    first = {"quant_method": "fp8", "modules_to_not_convert": ["transformer.h.0.mlp.c_fc"]}
    assert bits_of_parts(first, gpt) == (8, 12)


def test_one_expert_may_be_kept_and_another_not() -> None:
    one = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.mlp.experts.3.up_proj", "mlp.gate"]}
    layer, other = list(model(one, EXPERTS).layers())[:2]
    assert layer.expert_bytes / layer.expert_parameters == pytest.approx(1 + 1 / 3 / 8)
    assert other.expert_bytes / other.expert_parameters == 1
    assert other.feed_forward_bytes == 2 * other.feed_forward_parameters, "the router"


def test_groups_of_compressed_tensors_are_for_their_targets() -> None:
    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    eight = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    groups = {
        "group_0": {"targets": ["re:.*self_attn.*"], "weights": eight},
        "group_1": {"targets": ["Linear"], "weights": four},
    }
    both = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["re:.*down_proj", "lm_head"]}
    assert bits_of_parts(both) == pytest.approx((8 + 16 / 128**2, (2 * (4 + 16 / 128) + 16) / 3))
    assert model(both).head_bytes == 2 * 1024 * HIDDEN
    assert model({**both, "ignore": []}).head_bytes * 8 == pytest.approx((4 + 16 / 128) * 1024 * HIDDEN)
    some = {"quant_method": "compressed-tensors", "config_groups": {"a": groups["group_0"]}}
    assert bits_of_parts(some)[1] == 16, "what no group is for is not quantised"
    in_bytes = {**compressed(num_bits=4, type="int", group_size=32), "format": "int-quantized"}
    assert bits_of_parts(in_bytes) == pytest.approx((8.5, 8.5))


def test_other_fields_that_change_sizes() -> None:
    assert bits_of_parts({"quant_method": "fp8", "modules_to_convert": ["self_attn"]}) == (8, 16)
    whole = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True}
    assert bits_of_parts(whole) == (16, 16)
    nested = {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "exclude_modules": ["*self_attn*"]}}
    assert bits_of_parts(nested) == (16, 8)


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
        ({**GPTQ, "adapter": {"rank": 64}}, "has 'adapter', of which headrace does not know"),
        ({**GPTQ, "dynamic": {"+:.*": {"lora": 8}}}, r"dynamic\.\+:\.\* has 'lora'"),
        ({**GPTQ, "dynamic": {"-:(": {}}}, "no regular expression"),
        ({**GPTQ, "dynamic": {"+:.*": {"bits": 5}}}, "bits is 5"),
        ({**GPTQ, "dynamic": ["-:.*"]}, "an object of rules"),
        ({**GPTQ, "modules_in_block_to_quantize": ["q_proj"]}, "a list of lists"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
        ({**compressed(num_bits=4), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**compressed(num_bits=4), "format": "marlin-24"}, "format is 'marlin-24'"),
        (compressed(num_bits=4, levels=3), "has 'levels'"),
    ],
)
def test_what_a_quantization_config_cannot_mean(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message) as caught:
        model(quantization)
    assert "config.json" in str(caught.value)
