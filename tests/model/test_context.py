"""How many tokens a model takes: positions and what stretches them, as published models have them."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.errors import CheckpointError
from headrace.model.config_fields import Fields
from headrace.model.context import context_tokens
from headrace.model.from_config import model_from_config


def tokens(positions: int, scaling: Any, kind: str = "llama", **raw: Any) -> int:
    raw = {"model_type": kind, "rope_scaling": scaling, **raw}
    return context_tokens(Fields(raw, "config.json"), positions)


@pytest.mark.parametrize(
    ("positions", "scaling", "expected"),
    [
        (2048, None, 2048),
        (2048, {"type": "linear", "factor": 4.0}, 8192),  # the field's old name
        (32, {"rope_type": "dynamic", "factor": 4.0}, 128),
        (2048, {"rope_type": "linear", "factor": 1.5}, 3072),
        (2048, {"rope_type": "dynamic", "factor": 0.5}, 2048),
        (40960, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),  # Qwen3
        (163840, {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),  # DeepSeek V3
        (32768, {"rope_type": "yarn", "factor": 4.0}, 131072),
        (131072, {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}, 131072),  # 3.2
        (8192, {"rope_type": "llama3", "factor": 8.0}, 65536),
        (4096, {"rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096}, 131072),
        (4096, {"rope_type": "mrope", "factor": 4.0}, 4096),
        (4096, {"full_attention": {"rope_type": "yarn", "factor": 2.0}, "sliding_attention": {}}, 8192),
    ],
)
def test_what_scaling_makes_of_the_positions(positions: int, scaling: Any, expected: int) -> None:
    assert tokens(positions, scaling) == expected
    assert tokens(positions, None, rope_parameters=scaling) == expected


def test_where_the_field_is_the_stretched_length() -> None:
    assert tokens(131072, {"type": "su", "long_factor": [1.0]}, "phi3", original_max_position_embeddings=4096) == 131072
    assert tokens(131072, {"rope_type": "linear", "factor": 8.0}, "gemma3_text") == 131072


def test_a_factor_that_is_no_number_is_refused() -> None:
    for factor in ("4", True, 0, -1, float("inf"), float("nan")):
        with pytest.raises(CheckpointError, match=r"config\.json: rope scaling: factor is"):
            tokens(32, {"rope_type": "linear", "factor": factor})


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        *((kind, {}, 128) for kind in ("llama", "mistral", "qwen2", "gemma", "phi3", "gpt_neox", "falcon")),
        ("falcon", {"alibi": True}, 32),
        ("opt", {}, 32),
    ],
)
def test_models_without_rotary_positions_are_not_stretched(kind: str, changes: dict[str, Any], expected: int) -> None:
    raw = {
        "model_type": kind, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    }  # fmt: skip
    assert model_from_config({**raw, **changes}, name="model", origin="config.json").context_tokens == expected
