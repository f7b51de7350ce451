"""Shapes from configs: parameters exact to the last one, against published totals and against transformers itself."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import CheckpointError, HeadraceError, UnsupportedModelError
from headrace.model.catalogue import ModelEntry, find_model, model_entries
from headrace.model.from_config import model_from_config
from headrace.model.model import Model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
QWEN_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}


def model(raw: dict[str, Any]) -> Model:
    return model_from_config(raw, name="model", origin="config.json")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt-2", 124_439_808),
        ("gpt-2-xl", 1_557_611_200),
        ("opt-6.7b", 6_658_473_984),
        ("opt-350m", 331_196_416),
        ("bloom-176b", 176_247_271_424),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("mixtral-8x7b", 46_702_792_704),
        ("mistral-7b", 7_241_732_096),
        ("falcon-7b", 6_921_720_704),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("deepseek-v3", 671_026_419_200),
        ("gpt-oss-20b", 20_914_757_184),
        ("gpt-oss-120b", 116_829_156_672),
        ("gemma-2-9b", 9_241_705_984),
        ("gpt-neox-20b", 20_554_567_680),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_published_totals_to_the_last_parameter(name: str, parameters: int) -> None:
    assert find_model(name).parameters == parameters


SMALL = [
    {**LLAMA, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2, "vocab_size": 128},
    {**LLAMA, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2, "vocab_size": 128, "attention_bias": True, "mlp_bias": True,
     "tie_word_embeddings": True},
    *(
        {"model_type": kind, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16}
        for kind in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
    ),
    {"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
     "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "num_local_experts": 4,
     "num_experts_per_tok": 2},
    QWEN_MOE,
    {**QWEN_MOE, "decoder_sparse_step": 2},
    {**QWEN_MOE, "mlp_only_layers": [0]},
    {**QWEN_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 48},
    DEEPSEEK,
    {**DEEPSEEK, "q_lora_rank": None},
    {**DEEPSEEK, "model_type": "deepseek_v2"},
    {"model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "num_local_experts": 4,
     "num_experts_per_tok": 2, "sliding_window": 32},
    {"model_type": "glm4_moe", "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
     "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
     "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
     "use_qk_norm": True, "attention_bias": True},
    {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32},
    {"model_type": "openai-gpt", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32},
    {"model_type": "opt", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
     "vocab_size": 128, "max_position_embeddings": 32, "word_embed_proj_dim": 64},
    {"model_type": "opt", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
     "vocab_size": 128, "max_position_embeddings": 32, "word_embed_proj_dim": 48, "do_layer_norm_before": False},
    *(
        {"model_type": kind, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128,
         "intermediate_size": 96, "ffn_dim": 80, "n_inner": 112, "ffn_hidden_size": 48}
        for kind in ("gpt2", "openai-gpt", "bloom", "gptj", "opt", "gpt_neox", "falcon")
    ),
    {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    {"model_type": "gpt_neox", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
     "intermediate_size": 96, "vocab_size": 128},
    {"model_type": "gptj", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "rotary_dim": 8},
    {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128},
    {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
     "vocab_size": 128, "new_decoder_architecture": True, "bias": True},
]  # fmt: skip


def transformers_parameters(config: Any) -> int:
    """Count the parameters of the model that the library builds, without memory for them."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    buffers = [buffer for name, buffer in model.named_buffers() if "e_score_correction_bias" in name]
    return sum(int(tensor.numel()) for tensor in [*model.parameters(), *buffers])


@pytest.mark.parametrize("raw", SMALL, ids=lambda raw: str(raw["model_type"]))
def test_transformers_builds_as_many_parameters(raw: dict[str, Any]) -> None:
    config = transformers.AutoConfig.for_model(**raw, pad_token_id=None)
    assert model(raw).parameters == transformers_parameters(config)


EXACT = [
    entry
    for entry in model_entries()
    if not entry.source.startswith("APPROXIMATION") and entry.config["model_type"] != "palm"
]


@pytest.mark.parametrize("entry", EXACT, ids=lambda entry: entry.name)
def test_transformers_builds_the_catalogue_s_models_with_as_many_parameters(entry: ModelEntry) -> None:
    """Whole models at their real size; the library lacks PaLM alone, and knows Kimi K2 as the DeepSeek V3 it is."""
    raw = {name: value for name, value in entry.config.items() if name not in {"quantization_config", "torch_dtype"}}
    raw["model_type"] = {"kimi_k2": "deepseek_v3"}.get(raw["model_type"], raw["model_type"])
    raw["q_lora_rank"] = raw.get("q_lora_rank") or None
    config = transformers.AutoConfig.for_model(**raw, pad_token_id=None)
    assert entry.model().parameters == transformers_parameters(config)


def test_the_cache_of_each_kind_of_attention() -> None:
    assert find_model("gpt-3").kv_bytes_per_token() == 4_718_592
    assert find_model("opt-30b").kv_bytes_per_token() == 1_376_256
    assert find_model("llama-3-70b").kv_bytes_per_token() == 327_680
    assert find_model("llama-3-8b").kv_bytes_per_token() == 131_072
    assert find_model("deepseek-v3").kv_bytes_per_token() == 70_272
    assert find_model("falcon-7b").kv_bytes_per_token() == 2 * 32 * 64 * 2
    assert find_model("palm-540b").kv_bytes_per_token() == 2 * 118 * 256 * 2


def test_gpt_3_is_350_gb_and_takes_11_v100() -> None:
    size = find_model("gpt-3").weights_bytes
    assert round(size / 1e9, -1) == 350
    assert -(-size // 32e9) == 11


def test_a_window_bounds_the_cache() -> None:
    oss = find_model("gpt-oss-120b")
    long, longer = (oss.kv_cache_bytes(sequences=1, context_tokens=tokens) for tokens in (10_000, 20_000))
    assert longer - long == 18 * 2 * 8 * 64 * 2 * 10_000, "half of the layers see a window of 128 only"
    every = model({**LLAMA, "model_type": "mistral", "sliding_window": 4096})
    assert every.kv_cache_bytes(sequences=1, context_tokens=8192) == 4096 * 131_072
    mixed = model({**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 12, "sliding_window": 512})
    assert [layer.window_tokens for layer in mixed.layers()] == ([512] * 5 + [0]) * 2
    named = ["full_attention", "sliding_attention"] * 16
    windowed = {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8, "layer_types": named}
    given = model({**LLAMA, **windowed})
    assert [layer.window_tokens for layer in given.layers()] == [0, 8] * 16


def test_a_token_uses_some_of_the_experts() -> None:
    mixtral = find_model("mixtral-8x7b")
    assert mixtral.active_parameters / 1e9 == pytest.approx(12.75, abs=0.01)
    layer = next(mixtral.layers())
    assert layer.experts_touched(1) == pytest.approx(2)
    assert layer.experts_touched(1000) == pytest.approx(8)
    deepseek = next(layer for layer in find_model("deepseek-v3").layers() if layer.num_experts)
    assert deepseek.experts_touched(16) / 256 == pytest.approx(0.398, abs=0.001)
    assert deepseek.experts_touched(64) / 256 == pytest.approx(0.869, abs=0.001)
    assert deepseek.experts_touched(128) / 256 == pytest.approx(0.983, abs=0.001)


def test_gpt_oss_is_as_large_as_its_files() -> None:
    """The total_size of their published indexes (experts in MXFP4, all else in bf16), to the byte."""
    assert find_model("gpt-oss-120b").weights_bytes == 65_248_815_744
    assert find_model("gpt-oss-20b").weights_bytes == 13_761_264_768


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "no model_type"),
        ({"model_type": "lama"}, "did you mean llama"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": 4097}, "no multiple of 32 attention heads"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"hidden_size": 4096.0}, "hidden_size is 4096.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 2**50}, "hidden_size is"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**6}, "at most 100000"),
        ({"num_key_value_heads": 7}, "no multiple of 7 key-value heads"),
        ({"num_key_value_heads": 64}, "no multiple of 64 key-value heads"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 8}, "there are 4 experts"),
        ({"model_type": "mixtral", "num_local_experts": None}, "num_local_experts is missing"),
        ({"model_type": "mistral", "sliding_window": 16, "layer_types": ["full_attention"]}, "1 entries for 32"),
        ({"model_type": "mistral", "sliding_window": -16}, "sliding_window is -16"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"model_type": "phi3", "layer_types": ["sliding_attention"] * 32}, "gives it no width"),
        ({"model_type": "mistral", "layer_types": ["linear_attention"] * 32}, "linear_attention"),
        ({"model_type": "mistral", "layer_types": 32}, "layer_types has 32"),
        ({"model_type": "llamoid"}, "fields look like llama's"),
        ({"quantization_config": {"quant_method": "magic"}}, "magic"),
        ({"quantization_config": 4}, "an object is expected"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message) as caught:
        model({**LLAMA, **change})
    assert "config.json" in str(caught.value)


def test_layers_without_experts_are_listed_by_number() -> None:
    for listed in (["0"], 3, [4], [-1], [True]):
        with pytest.raises(CheckpointError, match="mlp_only_layers"):
            model({**QWEN_MOE, "mlp_only_layers": listed})


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=8), st.integers(), max_size=2),
)  # fmt: skip


@given(st.sampled_from([LLAMA, *SMALL]), st.data())
@settings(deadline=None, max_examples=300)
def test_whatever_a_field_holds_nothing_but_our_errors_comes(raw: dict[str, Any], data: st.DataObject) -> None:
    fields = sorted({*raw, "layer_types", "sliding_window", "mlp_only_layers", "quantization_config", "text_config"})
    changed = {**raw, data.draw(st.sampled_from(fields)): data.draw(JUNK)}
    with contextlib.suppress(HeadraceError):
        made = model(changed)
        assert made.parameters > 0
        assert made.weights_bytes > 0


def test_a_config_file_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    assert find_model(str(path)).parameters == 8_030_261_248
    assert find_model(str(tmp_path)).parameters == 8_030_261_248
    path.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        find_model(str(path))
    with pytest.raises(CheckpointError, match="does not exist"):
        find_model(str(tmp_path / "other.json"))


def test_every_model_of_the_catalogue_has_a_shape_and_a_source() -> None:
    entries = model_entries()
    assert len(entries) > 100
    for entry in entries:
        made = entry.model()
        assert entry.source
        assert made.weights_bytes > made.parameters * 0.4
        assert made.kv_bytes_per_token() > 0
