"""Every report at several widths: no line is longer than the width, and no word and no number is broken."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from typer.main import get_command

from cli_checkpoints import write_model
from headrace.cli.main import app, main
from headrace.cli.output import LEAST_WIDTH, Output
from headrace.cli.plan_report import LEAST
from headrace.cli.table import Table, wrapped
from safety_net.answers import HERE
from safety_net.checkpoints import write_checkpoint

COMMANDS: dict[str, object] = get_command(app).commands  # type: ignore[attr-defined]
WIDTHS = (80, 100, 140)
VERY_WIDE = 5000
DRAWN = re.compile(r"[─█▒░|#o]+")
"""what pictures in text consist of: they are drawn for the width, so they differ"""
MACHINES = HERE / "machines"
REPORTS = {
    "devices": "plan gpt-3 --machine 8xa100-80 --batch 64",
    "many-devices": "plan deepseek-v3 --machine 8xh200 --batch 4096",
    "streamed": "plan llama-3.1-405b --machine rtx-4090 --weights int4 --prompt-tokens 500",
    "nothing-fits": "plan gpt-3*1000 --machine rtx-4090 --host-memory 1GB",
    "cpu": f"plan {{llama}} --machine {MACHINES}/two-cores.toml --memory 1GB",
    "cpu-too-small": f"plan {{llama}} --machine {MACHINES}/two-cores.toml --memory 160MB",
    "gpu": f"plan {{llama}} --machine {MACHINES}/desktop.toml --memory 1GB --host-memory 2GB",
    "gpu-resident": f"plan {{llama}} --machine {MACHINES}/desktop.toml --batch 16",
    "fleet": "fleet gpt-3 --machine 8xh100 --copies 1e6 --tokens-per-second 10 --slo 25 --max-first-token 2",
    "fleet-of-one": "fleet gpt-3 --machine 8xa100-80 --copies 1 --tokens-per-second 5 --training-tokens 300e9",
    "claims": "claims",
    "claim": "claims copies-llama70b",
    "models": "models",
    "model": "models deepseek-v3",
    "machines": "machines",
    "machine": "machines 8xh100",
    "measured-machine": f"machines {MACHINES}/server.toml",
    "published": "accuracy --published {some_rows}",
    "accuracy": "accuracy",
    "refused": "plan gpt-3 --machine 8xa100-80 --strategy nonsense",
}


@pytest.fixture(scope="module")
def some_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published measurements: enough of them for every part of the report."""
    path = tmp_path_factory.mktemp("p") / "p.csv"
    rows = (HERE.parent / "data" / "published_measurements.csv").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(rows[:80]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of headers, by a short path: an unbreakable path may be longer than a line."""
    directory = tmp_path_factory.mktemp("c")
    write_checkpoint(directory, "llama-3gb")
    return directory / "llama-3gb"


def report(capsys: pytest.CaptureFixture[str], command: str, width: int) -> str:
    with mock.patch.dict(os.environ, {"COLUMNS": str(width)}):
        main(command.split())
    captured = capsys.readouterr()
    return captured.out + captured.err


def tokens(text: str) -> Counter[str]:
    return Counter(word for word in text.split() if not DRAWN.fullmatch(word))


@pytest.mark.parametrize("name", REPORTS)
def test_no_line_is_too_long_and_nothing_is_broken(
    name: str, llama: Path, some_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = REPORTS[name].format(llama=llama, some_rows=some_rows)
    whole = tokens(report(capsys, command, VERY_WIDE))
    assert whole
    for width in WIDTHS:
        text = report(capsys, command, width)
        long = [line for line in text.splitlines() if len(line) > width and str(llama) not in line]
        assert not long
        broken = tokens(text) - whole
        assert not broken, f"at {width} columns"


def test_what_runs_say_is_not_wider_than_80_columns_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, made_up_speeds: None
) -> None:
    model, requests = write_model(tmp_path / "m"), tmp_path / "in.jsonl"
    requests.write_text('{"prompt": "w5 w6", "max_tokens": 3}\n')
    monkeypatch.setenv("HEADRACE_HISTORY", str(tmp_path / "h.jsonl"))
    run = ["run", str(model), "--prompt", "w5 w6 w7", "--ignore-eos", "--max-new-tokens", "4"]
    text = ""
    for arguments in (run, ["batch", str(model), str(requests), str(tmp_path / "out.jsonl")], ["accuracy"]):
        with mock.patch.dict(os.environ, {"COLUMNS": "80"}):
            assert main(arguments) == 0
        captured = capsys.readouterr()
        text += captured.out + captured.err
    for heading in ("memory held", "answer tokens per second", "median"):
        assert heading in text, "there is a table of each"
    assert [line for line in text.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []


def test_a_table_leaves_out_its_least_columns_one_after_another() -> None:
    table = Table(
        columns=("name", "how", "first", "second"),
        rows=[["a", "ten words of which some stand in a further line", "1,234,567", "12.3 ms"]],
        words=("how",),
        least=("second", "how"),
    )
    assert "12.3 ms" in table.text(100)
    assert "ten words of which" in table.text(45)
    assert "second" not in table.text(45)
    assert "how" not in table.text(30)
    assert "1,234,567" in table.text(10), "what always stays is not cut"


def test_numbers_stay_with_what_they_count_and_words_stay_whole() -> None:
    text = "- " + "a pass takes 12.3 ms on 8 devices " * 5
    lines = wrapped(text, 40, hanging=2).splitlines()
    assert max(map(len, lines)) <= 40
    assert all(line.startswith("  ") for line in lines[1:])
    assert not any(re.search(r"\d$", line) for line in lines)
    path = "/" + "long/" * 30
    assert path in wrapped(f"written to {path} just now", 40)


def test_width_is_that_of_columns_or_80(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "93")
    assert Output().width == 93
    monkeypatch.setenv("COLUMNS", "7")
    assert Output().width == LEAST_WIDTH
    monkeypatch.delenv("COLUMNS")
    assert Output().width == 80


def test_what_a_plan_leaves_out_first_is_not_what_it_is_about() -> None:
    assert not {"strategy", "per pass", "$ per 750 words", "waits for"} & set(LEAST)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_no_line_of_a_help_is_longer_than_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command.split(), "--help"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []
