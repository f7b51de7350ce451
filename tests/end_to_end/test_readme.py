"""What README.md tells people to type works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cli_checkpoints import write_model

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("headrace ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    write_model(folder / "my-model", chat=True)
    (folder / "questions.jsonl").write_text('{"custom_id": "a", "prompt": "w5 w6", "max_tokens": 3}\n')
    return folder


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_readme(line: str, folder: Path) -> None:
    words = shlex.split(line, comments=True)
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=200
    )
    if "cuda" in words and not torch.cuda.is_available():
        assert done.returncode == 2
        assert "headrace: --device cuda: torch" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_python_of_the_readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (code,) = blocks("python")
    ids = torch.arange(3, 11).repeat(4, 1)
    exec(code, {"inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}})  # noqa: S102


def test_the_set_up_is_two_commands_that_the_makefile_knows() -> None:
    set_up = README.split("## Set up")[1].split("## Use")[0]
    targets = re.findall(r"^make (\w+)", set_up, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_file_that_the_readme_points_to_exists() -> None:
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
