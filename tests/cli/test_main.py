"""Whole commands in this process: what a run leaves behind, and what its options do to the text."""

from __future__ import annotations

import errno
import io
import json
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from cli_checkpoints import write_model
from headrace import __version__
from headrace.cli.command import require_run_libraries
from headrace.cli.main import main
from headrace.cli.options import DtypeChoice
from headrace.cli.text_stream import TextStream
from headrace.dtypes import DTYPES
from headrace.errors import DependencyError
from headrace.inference.token_text import TokenTexts
from headrace.machine.machine_file import machine_from_toml
from headrace.streaming.probe import machine as machine_probe

pytestmark = pytest.mark.usefixtures("made_up_speeds")

PROMPT = ["--prompt", "w5 w6 w7", "--dtype", "float32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _own_interrupt_handler() -> Iterator[None]:
    former = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, former)


def run_json(capsys: pytest.CaptureFixture[str], model: Path, *options: str) -> dict[str, Any]:
    code = main(["run", str(model), *PROMPT, *options, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    report: dict[str, Any] = json.loads(captured.out)
    return report


class FullDisk(io.StringIO):
    """A stream behind which there is no room."""

    def write(self, _text: str) -> int:
        """Fail as the operating system does."""
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdin", "stdout", "stderr"]])
def test_closed_standard_streams_are_the_null_device(closed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    assert main(["machines", "rtx-4090"]) == 0
    assert main(["machines", "no-such-machine"]) == 2
    for name in closed:
        getattr(sys, name).close()


def test_a_full_disk_behind_standard_output_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert main(["machines", "rtx-4090"]) == 2
    assert "standard output cannot be written: No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", FullDisk())
    assert main(["machines", "no-such-machine"]) == 2
    sys.stdout.close()


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("headrace")]


def test_ctrl_c_closes_the_stream_and_ends_its_threads(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def interrupted(_self: object, _value: object) -> None:
        seen.append(readers())
        raise KeyboardInterrupt

    monkeypatch.setattr(TextStream, "put", interrupted)
    assert main(["run", str(model), *PROMPT, "--strategy", "overlap"]) == 130
    assert any(name.startswith("headrace-reader") for name in seen[0])
    assert readers() == []
    assert "interrupted" in capsys.readouterr().err


def test_what_model_code_prints_does_not_reach_standard_output(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TokenTexts.text

    def talkative(texts: TokenTexts, tokens: list[int]) -> str:
        print("a remark from a library")  # noqa: T201
        return text(texts, tokens)

    monkeypatch.setattr(TokenTexts, "text", talkative)
    report = run_json(capsys, model, "--max-new-tokens", "3")
    assert len(report["text"].split()) == 3


def test_the_version_is_told_with_what_it_runs_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--version"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"headrace {__version__}"
    assert f"python {platform.python_version()}, torch {metadata.version('torch')}, transformers " in second
    monkeypatch.setattr("headrace.cli.main.LIBRARIES", ("no-such-library",))
    assert main(["--version"]) == 0
    assert "no-such-library not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "completed"), [("headrace pl", "plan"), ("headrace run m --strat", "--strategy"), ("headrace run -q", "")]
)
def test_shells_complete_commands_and_options(
    words: str, completed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_HEADRACE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    main([])
    assert capsys.readouterr().out.strip().startswith(completed)


def test_a_quiet_run_says_nothing_but_its_text_and_what_ends_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = ["--quiet", "--max-new-tokens", "3"]
    assert main(["run", str(model), *PROMPT, *quiet, "--trace", str(tmp_path / "trace.json")]) == 0
    told = capsys.readouterr()
    assert (len(told.out.split()), told.err) == (3, "")
    assert main(["run", str(model), "--prompt", "", "-q"]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_a_run_names_the_file_that_keeps_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADRACE_HISTORY", str(tmp_path / "history.jsonl"))
    assert main(["run", str(model), *PROMPT, "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().err.count(f"history: {tmp_path / 'history.jsonl'} (headrace accuracy reads it;") == 1
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1


def test_the_end_of_text_ends_a_run_unless_ignored(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_json(capsys, model, "--max-new-tokens", "6")
    second = int(whole["text"].split()[1].removeprefix("w"))
    config = model / "generation_config.json"
    former = config.read_text()
    config.write_text(json.dumps({"bos_token_id": 1, "eos_token_id": second}))
    try:
        ended = run_json(capsys, model, "--max-new-tokens", "6")
        ignored = run_json(capsys, model, "--max-new-tokens", "6", "--ignore-eos")
        forced = run_json(capsys, model, "--max-new-tokens", "6", "--min-new-tokens", "4")
    finally:
        config.write_text(former)
    assert ended["generated_tokens"] == 2
    assert ended["text"] == " ".join(whole["text"].split()[:2])
    assert (ignored["generated_tokens"], ignored["text"]) == (6, whole["text"])
    assert forced["generated_tokens"] >= 4


def test_draws_are_repeatable_by_seed_and_differ_without_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hot = ["--max-new-tokens", "8", "--temperature", "5", "--top-k", "40000"]
    first = run_json(capsys, model, *hot, "--seed", "1")["text"]
    assert run_json(capsys, model, *hot, "--seed", "1")["text"] == first
    assert run_json(capsys, model, *hot, "--seed", "2")["text"] != first
    assert run_json(capsys, model, "--max-new-tokens", "8")["text"] != first


def test_beams_are_planned_for_and_shown_at_the_end(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = run_json(capsys, model, "--max-new-tokens", "4")
    beams = run_json(capsys, model, "--max-new-tokens", "4", "--num-beams", "3")
    assert beams["plan"]["kv_cache_bytes"] == 3 * alone["plan"]["kv_cache_bytes"]
    assert main(["run", str(model), *PROMPT, "--max-new-tokens", "4", "--num-beams", "3"]) == 0
    assert capsys.readouterr().out == beams["text"] + "\n"


def test_several_prompts_give_all_texts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, model, "--prompt", "w9", "--max-new-tokens", "3")
    assert report["text"] == report["texts"][0]
    assert [len(text.split()) for text in report["texts"]] == [3, 3]
    assert (report["prompt_tokens_each"], report["generated_tokens_each"]) == ([3, 1], [3, 3])
    assert (report["prompt_tokens"], report["generated_tokens"]) == (4, 6)


def test_a_single_token_is_enough(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, model, "--max-new-tokens", "1")
    assert (report["generated_tokens"], report["measured"]["passes"]) == (1, 1)
    assert main(["run", str(model), *PROMPT, "--max-new-tokens", "1"]) == 0  # the table has no further pass to show


def test_one_missing_library_of_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(DependencyError, match=r"a test needs accelerate, .* pip install 'headrace\[run\]'"):
        require_run_libraries("a test")


def test_probe_writes_a_machine_that_plan_reads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine_probe, "PROBE_FILE_BYTES", 16 << 20)
    machine = tmp_path / "machine.toml"
    assert main(["probe", "--dir", str(tmp_path), "--out", str(machine), "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    written = machine_from_toml(machine.read_text(), origin="the file")
    assert written.disk is not None
    assert written.disk.bytes_per_s.expected > 0
    assert report["disk"]["bytes_per_s"]["expected"] == pytest.approx(written.disk.bytes_per_s.expected)
    assert report["out"] == str(machine)
    assert "disk" in captured.err
    assert main(["plan", str(model), "--machine", str(machine), "--memory", "100MB", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["machine"]["read_bytes_per_s"] == pytest.approx(written.disk.bytes_per_s.expected)
    assert planned["machine"]["name"] == report["name"] == written.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["machine.toml"]  # the probe's file is gone


def test_the_dtypes_to_choose_from_are_all_that_are_computed_in() -> None:
    assert {choice.value for choice in DtypeChoice} == {"auto", *DTYPES}


@pytest.mark.parametrize(
    ("command", "options", "told"),
    [
        ("run", (*PROMPT, "--draft-tokens", "4"), "give --draft lookup as well"),
        ("run", (*PROMPT, "--draft", "lookup", "--draft-tokens", "0"), "--draft-tokens must be at least 1"),
        ("plan", ("--acceptance", "0.5"), "give --draft-tokens as well"),
        ("plan", ("--expert-hit-rate", "0.5"), "name a machine as well"),
        ("plan", ("--expert-hit-rate", "0.5", "--machine", "rtx-4090"), "has no experts"),
    ],
)
def test_an_option_without_effect_is_refused(
    model: Path, command: str, options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(model), *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert told in shown.err


def test_a_plan_for_this_machine_counts_drafts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def strategies(*options: str) -> dict[str, Any]:
        assert main(["plan", str(model), "--json", *options]) == 0
        return {item["name"]: item for item in json.loads(capsys.readouterr().out)["strategies"]}

    drafted, plain = strategies("--draft-tokens", "4", "--acceptance", "1"), strategies()
    for name, found in drafted.items():
        assert found["tokens_per_s"] * found["decode_s_per_pass"] == pytest.approx(5)
        assert plain[name]["tokens_per_s"] * plain[name]["decode_s_per_pass"] == pytest.approx(1)
        assert sum(found["memory_bytes"].values()) >= sum(plain[name]["memory_bytes"].values())
