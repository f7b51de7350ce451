"""What a config leaves out, as transformers' classes have it; and the text model within models of several inputs."""

from __future__ import annotations

import dataclasses
import tomllib
from importlib import resources
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from headrace.errors import CheckpointError, UnsupportedModelError
from headrace.model.config_fields import text_config
from headrace.model.from_config import MODEL_TYPES, model_from_config

TABLE = tomllib.loads(resources.files("headrace.model").joinpath("class_defaults.toml").read_text(encoding="utf-8"))
READ = {name for values in TABLE["of_class"].values() for name in values}
KNOWN = [kind for kind in MODEL_TYPES if kind in CONFIG_MAPPING]


@pytest.mark.parametrize("kind", KNOWN)
def test_the_table_has_what_the_class_has(kind: str) -> None:
    own = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[kind]) if field.name in READ}
    assert TABLE["of_class"][kind] == {name: value for name, value in own.items() if value not in (None, False)}


def test_a_nested_text_model_is_the_one_that_transformers_takes() -> None:
    for outer, inner in TABLE["text_model"].items():
        assert inner in MODEL_TYPES
        assert CONFIG_MAPPING[outer](text_config={"hidden_size": 64}).text_config.model_type == inner


GEMMA = {
    "model_type": "gemma3",
    "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                    "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                    "sliding_window": 1024},
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152},
}  # fmt: skip
LLAVA = {
    "model_type": "llava",
    "text_config": {"max_position_embeddings": 4096, "torch_dtype": "float16", "vocab_size": 32064},
}


def model(raw: dict[str, Any]) -> Any:
    return model_from_config(raw, name="model", origin="config.json")


def test_published_configs_that_leave_fields_out() -> None:
    """gemma-3-4b-it less its vision tower and projector; the Llama 2 of LLaVA 1.5, its tables 64 rows longer."""
    gemma, llava = model(GEMMA), model(LLAVA)
    assert gemma.parameters == 4_300_079_472 - 416_866_032 - 2_950_272
    assert (gemma.context_tokens, gemma.weight_format) == (131072, "bf16")
    assert [layer.window_tokens for layer in gemma.layers()][:6] == [1024] * 5 + [0]
    assert llava.parameters == 6_738_415_616 + 2 * 64 * 4096
    assert llava.weight_format == "fp16"
    assert "num_attention_heads" in gemma.notes[0]


@pytest.mark.parametrize(
    "raw",
    [
        {"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2", "num_hidden_layers": 4}},
        {"model_type": "multi_modality", "language_config": {"model_type": "qwen2", "num_hidden_layers": 4}},
        {"model_type": "qwen2_5_omni", "thinker_config": {
            "model_type": "qwen2_5_omni_thinker", "text_config": {"model_type": "qwen2", "num_hidden_layers": 4}}},
        {"model_type": "llava_onevision", "text_config": {"num_hidden_layers": 4}},
        {"model_type": "qwen2", "num_hidden_layers": 4, "text_config": {"num_hidden_layers": 8}},
    ],
)  # fmt: skip
def test_the_text_model_is_found_wherever_it_is(raw: dict[str, Any]) -> None:
    assert model(raw).parameters == model({"model_type": "qwen2", "num_hidden_layers": 4}).parameters


def test_older_configs_have_all_fields_side_by_side() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    flat = model({"model_type": "qwen2_vl", **text, "vocab_size": 151936, "vision_config": {"hidden_size": 32}})
    assert flat.parameters == model({"model_type": "qwen2", "intermediate_size": 29568, **text}).parameters


def test_tied_embeddings_and_dtype_may_be_those_of_the_whole() -> None:
    raw = {"model_type": "llava", "text_config": {}, "tie_word_embeddings": True, "dtype": "float32"}
    assert model(raw).tied
    assert model(raw).weight_format == "fp32"
    assert not model({**raw, "text_config": {"tie_word_embeddings": False}}).tied


def test_a_field_that_is_null_is_not_the_class_s() -> None:
    with pytest.raises(CheckpointError, match="hidden_size is missing"):
        model({"model_type": "llama", "hidden_size": None})
    llama = {"model_type": "mistral", "num_attention_heads": 32}
    assert next(model(llama).layers()).kv_heads == 8
    assert next(model({**llama, "num_key_value_heads": None}).layers()).kv_heads == 32


def test_an_unknown_text_model_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="'cohere2'"):
        model({"model_type": "aya_vision", "text_config": {"model_type": "cohere2"}})
    assert text_config({"model_type": ["llama"], "text_config": {}}, MODEL_TYPES)["model_type"] == ["llama"]
