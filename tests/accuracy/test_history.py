"""The history of runs: lines that survive, errors by stage, constants that runs teach."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli_checkpoints import write_model
from headrace.accuracy.history import RunRecord, accuracy, learn
from headrace.accuracy.history_file import VARIABLE, history_path, read_history
from headrace.cli.main import main
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.machine.machine_file import machine_to_toml
from measured_machines import computer

RECORD = RunRecord(
    at="2026-11-24T10:00:00+00:00",
    machine="bench",
    model="m",
    active_parameters=1e9,
    stored_dtype="BF16",
    compute_dtype="float32",
    strategy="overlap",
    budget_bytes=1 << 30,
    sequences=1,
    prompt_tokens=16,
    generated_tokens=32,
    read_limited=False,
    binds="disk",
    predicted_prefill_s=2.0,
    measured_prefill_s=2.5,
    predicted_decode_s=1.1,
    measured_decode_s=1.0,
    measured_read_bytes_per_s=2e9,
    streamed_blocks=20,
)
CURVE = ComputeCurve(compute_dtype="float32", stored_dtype="BF16", points=(CurvePoint(1, 1e-9), CurvePoint(64, 8e-9)))
MACHINE = computer([CURVE], read_bytes_per_s=1.5e9)


def changed(**fields: object) -> RunRecord:
    return RunRecord(**{**dataclasses.asdict(RECORD), **fields})


def test_a_line_and_back() -> None:
    assert RunRecord.from_line(RECORD.to_line()) == RECORD


@given(st.integers(0, 600))
def test_a_torn_line_is_left_out(length: int) -> None:
    line = RECORD.to_line()
    torn = line[: min(length, len(line) - 2)]
    assert RunRecord.from_line(torn) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 3),
        ("sequences", "1"),
        ("sequences", True),
        ("measured_decode_s", -1),
        ("read_limited", 1),
        ("binds", None),
    ],
)
def test_a_line_of_another_kind_is_left_out(field: str, value: object) -> None:
    raw = json.loads(RECORD.to_line())
    raw[field] = value
    assert RunRecord.from_line(json.dumps(raw)) is None
    del raw[field]
    assert RunRecord.from_line(json.dumps(raw)) is None


def test_errors_by_stage_and_configuration() -> None:
    records = [changed(predicted_decode_s=value) for value in (1.0, 1.1, 1.5)] + [
        changed(strategy="resident", binds="compute")
    ]
    found = {(item.stage, item.configuration): item for item in accuracy(records)}
    decode = found["decode", "all"]
    assert decode.n == 4
    assert decode.median_abs_error == pytest.approx(0.1)
    assert decode.worst == pytest.approx(0.5)
    assert found["prefill", "all"].median_abs_error == pytest.approx(0.2)
    assert found["decode", "resident, float32, waits for compute"].n == 1
    assert accuracy([]) == []


def test_runs_that_waited_for_the_disk_teach_its_rate() -> None:
    records = [changed(measured_read_bytes_per_s=rate) for rate in (1.9e9, 2.0e9, 2.1e9)]
    learned, sentences = learn(MACHINE, records)
    rate = learned.require_disk().bytes_per_s
    assert (rate.low, rate.expected, rate.high) == (1.9e9, 2.0e9, 2.1e9)
    assert learned.processor == MACHINE.processor
    assert "learned from 3 runs" in sentences[0]
    assert "1.50 GB/s" in sentences[0]
    assert rate.source == sentences[0]


@pytest.mark.parametrize("other", [{"machine": "another"}, {"read_limited": True}, {"binds": "compute"}])
def test_runs_that_tell_nothing_of_the_disk_do_not(other: dict[str, object]) -> None:
    learned, _ = learn(MACHINE, [changed(**other), RECORD, RECORD])
    assert learned.disk == MACHINE.disk


def test_runs_beside_other_work_teach_nothing() -> None:
    records = [changed(binds="compute", measured_decode_s=1.2, busy=True)] * 3
    assert learn(MACHINE, records) == (MACHINE, [])


def test_a_line_of_an_earlier_version_is_read_without_what_was_added_since() -> None:
    older = json.loads(RECORD.to_line())
    del older["busy"]
    assert RunRecord.from_line(json.dumps(older)) == RECORD


def test_runs_that_waited_for_the_processor_teach_the_curve() -> None:
    records = [changed(binds="compute", measured_decode_s=seconds) for seconds in (1.2, 1.3, 1.25)]
    learned, sentences = learn(MACHINE, records)
    (curve,) = learned.processor.arithmetic.curves
    assert [point.seconds_per_parameter for point in curve.points] == pytest.approx([1.25e-9, 10e-9])
    assert "1.25 times" in sentences[0]


def test_a_run_is_kept_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "deep" / "history.jsonl"))
    write_model(tmp_path / "model")
    for _ in range(2):
        assert main(["run", str(tmp_path / "model"), "--prompt", "a b c", "--max-new-tokens", "6", "--ignore-eos"]) == 0
    capsys.readouterr()
    records = read_history()
    assert len(records) == 2
    assert records[0].measured_decode_s > 0
    with (tmp_path / "deep" / "history.jsonl").open("a") as file:
        file.write('{"torn": ')
    assert main(["accuracy", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["runs"] == 2
    assert {item["stage"] for item in made["stages"]} == {"prefill", "decode"}
    assert main(["accuracy"]) == 0
    assert "2 runs in" in capsys.readouterr().out


def test_a_history_that_cannot_be_written_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "history.jsonl"))
    write_model(tmp_path / "model")
    assert main(["run", str(tmp_path / "model"), "--prompt", "a b c", "--max-new-tokens", "3"]) == 0
    assert "not kept in the history" in capsys.readouterr().err


def test_the_history_can_be_turned_off_and_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert history_path() is None
    assert read_history() == []
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "headrace" / "history.jsonl"


def test_a_plan_says_what_was_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    history = tmp_path / "history.jsonl"
    history.write_text("".join(changed(measured_read_bytes_per_s=3e9).to_line() for _ in range(3)))
    monkeypatch.setenv(VARIABLE, str(history))
    write_model(tmp_path / "model")
    curves = tuple(
        dataclasses.replace(CURVE, compute_dtype=compute, stored_dtype=stored)
        for compute in ("float32", "bfloat16")
        for stored in ("F32", "BF16")
    )
    machine = tmp_path / "machine.toml"
    machine.write_text(machine_to_toml(computer(curves, read_bytes_per_s=1.5e9)))
    ask = ["plan", str(tmp_path / "model"), "--machine", str(machine), "--json"]
    assert main(ask) == 0
    lesson = "learned from 3 runs: the disk reads 3.00 GB/s (probed: 1.50 GB/s) (--no-learned keeps the file's)"
    learned = json.loads(capsys.readouterr().out)
    assert lesson in learned["notes"]
    assert learned["machine"]["read_bytes_per_s"] == 3e9
    assert main([*ask, "--no-learned"]) == 0
    kept = capsys.readouterr()
    assert lesson not in json.loads(kept.out)["notes"]
    assert kept.err == ""
    assert json.loads(kept.out)["machine"]["read_bytes_per_s"] == 1.5e9


def test_published_is_reached_by_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "data" / "published_measurements.csv"
    assert main(["accuracy", "--published", str(file), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert len(made["rows"]) == 658
    assert main(["accuracy", "--published", str(tmp_path / "none.csv")]) == 2
    assert "no such file" in capsys.readouterr().err
