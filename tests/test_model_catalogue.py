"""Models by name, with what publishers add to names; scaling; weight formats."""

from __future__ import annotations

import pytest

from headrace.errors import CheckpointError, InvalidRequestError
from headrace.planning.model_catalogue import find_model, model_entries, named_model
from headrace.planning.scaling import scaled
from headrace.planning.weight_format import FORMATS, find_format, requantised


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("GPT-3", "gpt-3"),
        ("gpt3", "gpt-3"),
        ("OPT-175B", "opt-175b"),
        ("BLOOM-176B", "bloom"),
        ("PaLM-540B", "palm-540b"),
        ("Megatron-Turing-NLG-530B", "mt-nlg-530b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Meta-Llama-3.1-8B-Instruct-4bit", "llama-3.1-8b"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        ("Kimi-K2.5", "kimi-k2"),
        ("Qwen/Qwen3-235B-A22B", "qwen3-235b-a22b"),
        ("Qwen3-30B-A3B-Instruct-2507-4bit", "qwen3-30b-a3b"),
    ],
)
def test_names_as_people_write_them(text: str, name: str) -> None:
    assert find_model(text).name == name


def test_a_file_s_name_tells_the_model() -> None:
    assert named_model("Mistral-7B-Instruct-v0.3-Q4_K_M.gguf").name == "mistral-7b-v0.3"
    assert named_model("ConicCat_Qwen3.5-27B-Writer-Q4_K_M.gguf").name == "qwen3.5-27b"
    with pytest.raises(CheckpointError, match="does not exist"):
        find_model("Mistral-7B-Instruct-v0.3-Q4_K_M.gguf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpt-33", "did you mean gpt-3"),
        ("lama-3-8b", "did you mean llama-3-8b"),
        ("", "headrace models"),
        ("xyzzy", "headrace models"),
        ("gpt-3*", "no factor"),
        ("gpt-3*many", "no factor"),
        ("gpt-3*0", "a factor lies between"),
        ("gpt-3*-3", "a factor lies between"),
        ("gpt-3*1e30", "a factor lies between"),
        ("gpt-3*nan", "a factor lies between"),
        ("gpt-3*10:depth=2", "depth=SHARE"),
        ("gpt-3*10:width=1", "depth=SHARE"),
        ("gpt-3@int5", "did you mean int"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        find_model(text)


@pytest.mark.parametrize("name", ["gpt-3", "llama-3-8b", "mixtral-8x7b", "deepseek-v3", "gpt-oss-20b"])
@pytest.mark.parametrize("factor", [0.5, 2, 10, 1000])
def test_a_scaled_model_has_so_many_times_the_parameters(name: str, factor: float) -> None:
    before, after = find_model(name), find_model(f"{name}*{factor}")
    assert after.parameters / before.parameters == pytest.approx(factor, rel=0.01)
    if after.weight_format != "mxfp4":  # its experts have fewer bits than the rest, and the two grow apart
        assert after.weights_bytes / before.weights_bytes == pytest.approx(factor, rel=0.01)
    assert after.num_layers == pytest.approx(before.num_layers * factor ** (1 / 3), abs=0.5)
    assert sum(group.count for group in after.groups) == after.num_layers


def test_gpt_3_a_thousand_times_larger() -> None:
    """960 layers of ten times the width: 10 x 10 squared."""
    large = find_model("gpt-3*1000")
    assert large.num_layers == 960
    assert large.hidden_size == pytest.approx(122_880, rel=0.01)
    assert "96 -> 960 layers" in large.notes[-1]


def test_the_rule_can_be_changed() -> None:
    deep = find_model("gpt-3*100:depth=1")
    assert deep.num_layers == 9600
    assert deep.hidden_size == pytest.approx(12288, rel=0.01)
    wide = scaled(find_model("gpt-3"), 100, depth_share=0)
    assert wide.num_layers == 96
    assert wide.parameters / find_model("gpt-3").parameters == pytest.approx(100, rel=0.01)


def test_one_key_value_head_stays_one() -> None:
    assert next(find_model("palm-540b*8").layers()).kv_heads == 1
    assert next(find_model("deepseek-v3*8").layers()).kv_elements_per_token == 576


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_format_takes_its_bits(name: str) -> None:
    plain = find_model("llama-3-8b")
    made = requantised(plain, name)
    layer = next(made.layers())
    assert layer.feed_forward_bytes * 8 / layer.feed_forward_parameters == pytest.approx(FORMATS[name].bits)
    assert made.parameters == plain.parameters
    assert made.weight_format == name


def test_q4_k_m_is_as_large_as_published_files() -> None:
    """Published: Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf has 4.92 GB, Qwen3-14B-Q4_K_M.gguf 9.00 GB."""
    assert requantised(find_model("llama-3.1-8b"), "q4_k_m").weights_bytes == pytest.approx(4.92e9, rel=0.04)
    assert requantised(find_model("qwen3-14b"), "Q4_K_M").weights_bytes == pytest.approx(9.00e9, rel=0.04)


def test_unknown_formats_are_refused_with_near_matches() -> None:
    assert find_format("FP16").name == "fp16"
    assert find_format("4bit").name == "int4"
    with pytest.raises(InvalidRequestError, match="did you mean q4_k_"):
        find_format("q4_k_x")


def test_no_alias_stands_for_two_models() -> None:
    names = [entry.name for entry in model_entries()]
    assert len(names) == len(set(names))
