"""One question, one answer: however the model is named, and whoever asks, the same machine gives the same numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import headrace
from headrace.accuracy import history_file
from headrace.cli.main import main
from safety_net.answers import HERE, write_checkpoints

MACHINES = HERE / "machines"
STORED_AS = {"llama-3gb": "bf16", "gemma-3-12b": "bf16", "mixtral-8x7b": "bf16", "gpt2-xl": "fp32"}
ON_A_CPU = [
    ("llama-3gb", "two-cores", {"memory": "250MB"}),
    ("llama-3gb", "two-cores", {"memory": "1GB", "batch": 4}),
    ("llama-3gb", "two-cores", {"memory": "160MB"}),
    ("llama-3gb", "two-cores", {"memory": "1500MB", "strategy": "sequential", "dtype": "float32"}),
    ("llama-3gb", "sixteen-cores", {"memory": "4GB", "prompt_tokens": 500}),
    ("llama-3gb", "sixteen-cores", {"memory": "1GB", "read_limit": "500MB/s"}),
    ("gemma-3-12b", "two-cores", {"memory": "6GB"}),
    ("gemma-3-12b", "sixteen-cores", {"memory": "16GB", "batch": 3}),
    ("gemma-3-12b", "sixteen-cores", {"memory": "40GB", "draft_tokens": 3}),
    ("mixtral-8x7b", "two-cores", {"memory": "4GB"}),
    ("mixtral-8x7b", "sixteen-cores", {"memory": "30GB"}),
    ("gpt2-xl", "two-cores", {"memory": "2GB"}),
    ("gpt2-xl", "sixteen-cores", {"memory": "12GB"}),
]
ON_A_GPU = [
    ("llama-3gb", "desktop", {"memory": "450MB", "host_memory": "8GB"}),
    ("llama-3gb", "desktop", {"memory": "1GB", "host_memory": "2GB"}),
    ("llama-3gb", "server", {"memory": "1500MB", "host_memory": "1GB", "device": "cuda:1"}),
    ("gemma-3-12b", "desktop", {"memory": "8GB", "host_memory": "30GB", "cpu_blocks": True}),
    ("gemma-3-12b", "server", {"memory": "1GB", "host_memory": "20GB"}),
    ("mixtral-8x7b", "server", {"memory": "40GB", "host_memory": "60GB", "prompt_tokens": 100}),
    ("gpt2-xl", "desktop", {"memory": "3GB", "host_memory": "2GB"}),
    ("gpt2-xl", "server", {"memory": "8GB", "host_memory": "8GB", "batch": 16, "cache_on_host": True}),
]
QUESTIONS = ON_A_CPU + ON_A_GPU


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(directory)
    return directory


@pytest.fixture(autouse=True)
def nothing_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(history_file.VARIABLE, "")


def by_command(capsys: pytest.CaptureFixture[str], model: Path, machine: str, options: dict[str, Any]) -> Any:
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    capsys.readouterr()
    assert main(["plan", str(model), "--machine", str(MACHINES / f"{machine}.toml"), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number of an answer by its place."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, f"{path}[{index}]")
    elif isinstance(value, int | float):
        yield path, value


@pytest.mark.parametrize(("name", "machine", "options"), QUESTIONS)
def test_a_checkpoint_its_own_format_by_name_and_python_are_answered_alike(
    checkpoints: Path, capsys: pytest.CaptureFixture[str], name: str, machine: str, options: dict[str, Any]
) -> None:
    plain = by_command(capsys, checkpoints / name, machine, options)
    assert len(dict(numbers(plain))) > 50
    named = by_command(capsys, checkpoints / name, machine, {**options, "weights": STORED_AS[name]})
    assert named == plain
    assert headrace.plan(checkpoints / name, machine=MACHINES / f"{machine}.toml", **options) == plain
    for item in plain["strategies"]:
        if item["fits"]:
            assert list(item["memory_bytes"]) == ["device", "host", "disk"]
            on_gpu = (name, machine, options) in ON_A_GPU
            assert (item["memory_bytes"]["device"] > 0) == on_gpu, "a CPU's own memory is the host's"


MOST_APART = 5e-4
"""Of a config and its checkpoint, where the plans are the same: files are read in pages, biases and norms are counted
apart."""

ANOTHER_PLAN = 0.02
"""Where the plans are not: pages make layers of a file differ in size a little, by which the search ranks them."""


@pytest.mark.parametrize(("name", "machine", "options"), QUESTIONS)
def test_a_config_alone_is_answered_like_its_checkpoint(
    checkpoints: Path, name: str, machine: str, options: dict[str, Any]
) -> None:
    file = MACHINES / f"{machine}.toml"
    stored = headrace.plan(checkpoints / name, machine=file, **options)
    config = headrace.plan(checkpoints / name / "config.json", machine=file, weights=STORED_AS[name], **options)
    assert config["recommended"] == stored["recommended"]
    assert config["model"]["num_blocks"] == stored["model"]["num_blocks"]
    for own, other in zip(stored["strategies"], config["strategies"], strict=True):
        assert set(own) == set(other)
        assert own["fits"] == other["fits"]
        if own["fits"]:
            streamed = (own["streamed_bytes_per_pass"], other["streamed_bytes_per_pass"])
            most = MOST_APART if streamed[1] == pytest.approx(streamed[0], rel=MOST_APART) else ANOTHER_PLAN
            for key in ("prefill_s", "decode_s_per_pass", "total_s", "tokens_per_s", "memory_bytes", "low", "high"):
                assert other[key] == pytest.approx(own[key], rel=most), (own["name"], key)
        else:
            assert other["required_bytes"] == pytest.approx(own["required_bytes"], rel=MOST_APART)
