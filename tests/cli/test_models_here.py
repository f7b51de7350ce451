"""`headrace models --here`: what is on this disk, as a table and as one object."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from headrace.cli.main import main
from tiny_models import save_tiny


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache" / "hf"))
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def test_models_are_listed_with_sizes_and_reasons(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = save_tiny("llama", folder / "tiny", dtype=torch.float32, shard="1GB")
    for name in ("one", "two"):
        shutil.copytree(tiny, folder / name)
        config = json.loads((tiny / "config.json").read_text())
        quantization = {"quant_method": "gptq", "bits": 4}
        (folder / name / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    (folder / "a.gguf").write_bytes(b"GGUF")
    assert main(["models", "--here", "--dir", str(folder)]) == 0
    told = capsys.readouterr().out
    rows = {line.split()[0]: line for line in told.splitlines() if str(folder) in line and "KB" in line}
    assert (" yes " in rows["tiny"], " no " in rows["one"]) == (True, True)
    assert told.count("quantised weights (gptq)") == 2, "each names its own file"
    assert "a.gguf: headrace plans GGUF files" in told
    assert main(["models", "--here", "--dir", str(folder), "--json"]) == 0
    here = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["here"]}
    assert here["tiny"]["runs_here"]
    assert here["tiny"]["weights_bytes"] < here["tiny"]["size_bytes"]
    assert (here["a.gguf"]["runs_here"], here["a.gguf"]["weight_format"]) == (False, None)
    assert "GGUF" in here["a.gguf"]["why_not"]


def test_without_models_it_is_said_where_they_were_looked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--here", "--dir", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"no models in {folder.parent}/cache/hf/hub, {folder.parent}/cache/headrace/models, {folder};" in told
    assert "headrace pull OWNER/NAME" in told


def test_without_the_libraries_nothing_runs_and_all_is_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny("llama", folder / "tiny", dtype=torch.float32, shard="1GB")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["models", "--here", "--dir", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "tiny: running a model needs accelerate" in told
    assert "pip install 'headrace[run]'" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--dir", "/tmp"], "give --here as well"),
        (["gpt-3", "--here"], "leave out gpt-3, or --here"),
        (["--here", "--dir", "/nowhere"], "--dir /nowhere: there is no such directory"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", *options]) == 2
    assert told in capsys.readouterr().err
