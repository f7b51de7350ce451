"""Models by name, with what publishers add to names."""

from __future__ import annotations

import pytest

from headrace.errors import CheckpointError, InvalidRequestError
from headrace.model.catalogue import find_model, model_entries, named_model


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
        ("Smaug-Llama-3-70B", "llama-3-70b"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        ("Kimi-K2.5", "kimi-k2"),
        ("Qwen/Qwen3-235B-A22B", "qwen3-235b-a22b"),
        ("Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("gpt-oss-20b-MXFP4", "gpt-oss-20b"),
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


@pytest.mark.parametrize(
    ("text", "weight_format"),
    [
        ("llama-3-8b@int4", "int4"),
        ("Meta-Llama-3.1-8B-Instruct-4bit", "int4"),
        ("Qwen/Qwen2.5-Coder-32B-Instruct-AWQ", "int4-g128"),
        ("Qwen3-8B-Q4_K_M", "q4_k_m"),
        ("Llama-3.1-8B-Instruct-FP8", "fp8"),
        ("Llama-3.1-8B-Instruct", "bf16"),
        ("Qwen3-8B-4bit@fp16", "fp16"),
        ("gpt-oss-120b", "mxfp4"),
    ],
)
def test_a_name_that_tells_a_format_has_it(text: str, weight_format: str) -> None:
    assert find_model(text).weight_format == weight_format


def test_a_descendant_says_whose_shape_it_is_given() -> None:
    assert "shape of llama-3-70b" in find_model("Smaug-Llama-3-70B").notes[-1]


@pytest.mark.parametrize("text", ["mixtral-8x99b", "mistral-small-4-119b", "codestral-mamba-7b", "gpt-neox-20b-2b"])
def test_a_relative_of_another_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="there is no model"):
        find_model(text)


def test_no_alias_stands_for_two_models() -> None:
    names = [entry.name for entry in model_entries()]
    assert len(names) == len(set(names))
