"""What is followed of a generation_config.json, what is left aside, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import CheckpointError
from headrace.inference.generation_defaults import FILE, read_generation_config, read_generation_defaults

VOCABULARY = 20


def read(directory: Path, **options: Any) -> Any:
    (directory / FILE).write_text(json.dumps({"eos_token_id": [2, 3], **options}))
    return read_generation_defaults(directory, VOCABULARY)


def test_penalties_apply_always_and_ways_of_drawing_where_tokens_are_drawn(tmp_path: Path) -> None:
    defaults = read(tmp_path, repetition_penalty=1.3, temperature=0.6, top_p=0.9, do_sample=True, num_beams=4)
    assert defaults.ends == {2, 3}
    assert defaults.describe(draws=False) == ", repetition_penalty 1.3, as the model asks"
    assert "top_p 0.9" in defaults.describe(draws=True)
    greedy, drawn = (defaults.config(do_sample=draws, top_p=None) for draws in (False, True))
    assert (greedy.repetition_penalty, greedy.top_p, greedy.do_sample, greedy.num_beams) == (1.3, None, False, None)
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.6, 0.9, 50)
    assert defaults.config(do_sample=True, top_p=0.5, top_k=7).top_p == 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("penalty_alpha", 0.6),
        ("num_return_sequences", 3),
        ("guidance_scale", 2.0),
        ("num_beam_groups", 2),
        ("dola_layers", "low"),
    ],
)
def test_other_ways_of_generating_are_left_aside_by_name(tmp_path: Path, field: str, value: object) -> None:
    defaults = read(tmp_path, **{field: value})
    assert defaults.left_aside.startswith(f"{FILE} asks for {field} {value!r}")
    assert getattr(defaults.config(), field) is None


@pytest.mark.parametrize(
    ("field", "value"), [("return_dict_in_generate", True), ("cache_implementation", "quantized"), ("max_length", 20)]
)
def test_what_changes_no_text_is_nobodys_concern(tmp_path: Path, field: str, value: object) -> None:
    defaults = read(tmp_path, **{field: value})
    assert defaults.left_aside == ""
    assert getattr(defaults.config(), field) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", -1),
        ("repetition_penalty", "much"),
        ("bad_words_ids", []),
        ("suppress_tokens", "x"),
        ("sequence_bias", [[[VOCABULARY], 1.0]]),
        ("temperature", "hot"),
        ("stop_strings", [5]),
        ("stop_strings", 5),
        ("eos_token_id", "</s>"),
    ],
)
def test_a_value_that_cannot_be_followed_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"{FILE}: {field} .*give --no-model-defaults") as refused:
        read(tmp_path, **{field: value})
    assert repr(value) in str(refused.value)
    if field != "eos_token_id":
        assert read_generation_defaults(tmp_path, VOCABULARY, followed=False).fields == {"eos_token_id": [2, 3]}


def test_a_temperature_of_nothing_says_that_nothing_is_drawn(tmp_path: Path) -> None:
    assert read(tmp_path, temperature=0.0).config(do_sample=True).temperature is None


def test_without_the_file_the_config_says_what_ends_a_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 7}')
    assert read_generation_defaults(tmp_path, VOCABULARY).ends == {7}
    assert read_generation_config(tmp_path) is None


def test_users_of_generate_get_the_file_as_it_is_but_for_the_kind_of_cache(tmp_path: Path) -> None:
    read(tmp_path, return_dict_in_generate=True, cache_implementation="quantized")
    config = read_generation_config(tmp_path)
    assert config is not None
    assert (config.return_dict_in_generate, config.cache_implementation) == (True, None)
