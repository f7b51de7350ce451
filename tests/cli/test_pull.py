"""`headrace pull`: the directory on standard output, progress beside it, mistakes told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from headrace.cli.main import main
from headrace.cli.pull_command import PullProgress
from hub_stand_in import HubStandIn
from tiny_models import save_tiny


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubStandIn:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")  # what the command sets is taken back
    repository = save_tiny("llama", tmp_path / "repository", dtype=torch.float32, shard="1GB")
    return HubStandIn(monkeypatch, tmp_path / "cache", repository)


def test_the_directory_is_the_result(hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "owner/name", "--dir", str(tmp_path / "there")]) == 0
    first = capsys.readouterr()
    assert first.out == f"{tmp_path / 'there'}\n"
    assert "asking the hub" in first.err
    assert "owner/name: 3 files, " in first.err
    assert main(["pull", "owner/name", "--dir", str(tmp_path / "there"), "--quiet"]) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'there'}\n", "")
    hub.failure = ConnectionError("no route")
    assert main(["pull", "owner/name", "--dir", str(tmp_path / "there"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["path"], report["fetched_bytes"]) == (str(tmp_path / "there"), 0)
    assert "this was fetched before" in report["remark"]


def test_mistakes_are_told(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.failure = ConnectionError("no route")
    assert main(["pull", "owner/name"]) == 2
    assert "does not answer (no route)" in capsys.readouterr().err
    assert main(["pull", "name"]) == 2
    assert "'name' is no hub id; those look like owner/name" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["pull", "owner/name"]) == 2
    assert "pip install 'headrace[run]'" in capsys.readouterr().err


def test_what_is_left_is_reckoned_from_what_came() -> None:
    now = [0.0]
    progress = PullProgress("owner/name", clock=lambda: now[0])
    assert progress.share.words == "owner/name: asking the hub what there is"
    now[0] = 10.0
    progress.heard(0, 4_000_000)
    assert progress.share.words == "0 B of 4.00 MB"
    now[0] = 12.0
    progress.heard(1_000_000, 4_000_000)
    assert progress.share == (1_000_000, 4_000_000, "1.00 MB of 4.00 MB, 500 KB/s, 6 s left")
