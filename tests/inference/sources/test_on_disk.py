"""Models that lie on this disk are found wherever they are, and whether they run is what a run would say."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from headrace.inference.sources import on_disk
from headrace.inference.sources.on_disk import StoredHere, find_stored, judged, known_places
from headrace.paths import user_path
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny", dtype=torch.float32)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def change_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_models_are_found_in_caches_and_below_directories(tiny: Path, home: Path, tmp_path: Path) -> None:
    snapshots = home / "huggingface" / "hub" / "models--owner--name" / "snapshots"
    shutil.copytree(tiny, snapshots / "old")
    newer = shutil.copytree(tiny, snapshots / "new")
    (snapshots / "old").touch()
    old_s = (snapshots / "old").stat().st_mtime
    os.utime(newer, (old_s + 10, old_s + 10))
    shutil.copytree(tiny, home / "headrace" / "models" / "own")
    named = tmp_path / "named"
    shutil.copytree(tiny, named / "a" / "b" / "deep")
    (named / "quants").mkdir()
    for number in (1, 2):
        (named / "quants" / f"big-0000{number}-of-00002.gguf").write_bytes(bytes(100))
    (named / "no-model").mkdir()
    (named / "no-model" / "config.json").write_text("{}")
    (named / "link").symlink_to(named / "a")
    found = find_stored([named, named, tmp_path / "nowhere"])
    assert [(entry.name, entry.place) for entry in found] == [
        ("owner/name", "hub cache"), ("own", "headrace's cache"), ("deep", str(named)),
        ("big-00001-of-00002.gguf", str(named)),
    ]  # fmt: skip
    assert found[0].path == newer
    assert [entry.size_bytes for entry in found][1:] == [
        sum(path.stat().st_size for path in tiny.glob("*.safetensors")), found[2].size_bytes, 200
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a/hub"}, "/a/hub"),
        ({"HF_HOME": "~/b"}, "~/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
    ],
)
def test_the_hub_s_cache_is_where_its_library_has_it(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert known_places()["hub cache"] == user_path(expected)


def test_a_model_runs_in_memory_or_streamed_or_not(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = StoredHere("tiny", tiny, "here")
    model = stored.described()
    assert model is not None
    assert model.weights_bytes == sum(path.stat().st_size for path in tiny.glob("*.safetensors")) - sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in tiny.glob("*.safetensors")
    )
    assert judged(stored) == ("", False)
    monkeypatch.setattr(on_disk, "default_budget_bytes", lambda: int(model.weights_bytes) - 1)
    assert judged(stored) == ("", True)
    monkeypatch.setattr(on_disk, "default_budget_bytes", lambda: 4096)
    assert "headrace may hold 4.10 KB of what is free now: close other programs" in judged(stored).why_not


def test_why_a_model_does_not_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def why_not(directory: Path) -> str:
        return judged(StoredHere("broken", directory, "here")).why_not

    broken = shutil.copytree(tiny, tmp_path / "broken")
    next(broken.glob("model-00002-*")).unlink()
    assert "repeat the download" in why_not(broken)
    assert StoredHere("broken", broken, "here").described() is None
    quantised = shutil.copytree(tiny, tmp_path / "quantised")
    change_config(quantised, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised weights (gptq)" in why_not(quantised)
    other = shutil.copytree(tiny, tmp_path / "other")
    change_config(other, num_hidden_layers=9)
    assert "9 layers" in why_not(other)
    assert "does not run them" in why_not(tmp_path / "a.gguf")

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by a field of the config")

    monkeypatch.setattr("headrace.inference.dry_pass.build_without_weights", fail)
    assert why_not(tiny) == "transformers does not build it: ZeroDivisionError: by a field of the config"
