"""Engines as data: each table of `engines.toml` is read whole or refused, with the field that is wrong."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any

import pytest

from headrace.errors import MachineError
from headrace.machine.engine import CONSTANTS, engine_named, engines, read_engine


def table(**changed: Any) -> dict[str, Any]:
    text = resources.files("headrace.machine").joinpath("engines.toml").read_text(encoding="utf-8")
    raw: dict[str, Any] = tomllib.loads(text)["engine"][0]
    return {name: value for name, value in (raw | changed).items() if value is not None}


def test_every_constant_has_a_source_and_a_believable_range() -> None:
    assert len(engines()) > 15
    for engine in engines().values():
        for name in CONSTANTS:
            constant = getattr(engine, name)
            assert constant.source
            if name.endswith("_s"):
                assert constant.high < 0.1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"memory_share": None}, "memory_share is missing"),
        ({"memory_shares": 0.5}, "unknown entry memory_shares; did you mean memory_share"),
        ({"memory_share": {"expected": 0.5, "low": 0.6, "high": 0.7}}, "memory_share: low <= expected <= high"),
        ({"layer_overhead_s": 3e-6}, "layer_overhead_s is 3e-06, without a unit"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(MachineError, match=message):
        read_engine(table(**changed))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("FlexGen 0.1.7 (W4), as measured by DeepSpeed", "flexgen"),
        ("DeepSpeed-Inference int8", "deepspeed-inference"),
        ("DeepSpeed", "zero-inference"),
        ("Ollama", "llama.cpp"),
        ("oLLM", "airllm"),
        ("llama.cpp (as measured by KTransformers)", "llama.cpp"),
        ("something new", "present"),
    ],
)
def test_the_engine_is_the_one_that_a_source_names_first(text: str, name: str) -> None:
    assert engine_named(text).name == name
