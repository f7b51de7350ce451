"""`headrace run` on an accelerator: the same text, plan and measurements by device and host, one-line refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from accelerator_machine import Gauge, make_up
from cli_checkpoints import write_model
from headrace.cli.main import main
from headrace.inference import api, calibration
from headrace.streaming import devices
from headrace.streaming.device import CpuDevice, Device
from headrace.streaming.fakes.accelerator import FakeAccelerator
from headrace.streaming.pressure import Moment, Pressure

PROMPT = ["--prompt", "w5 w6 w7", "--max-new-tokens", "6", "--ignore-eos", "--no-chat"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU, and here is one")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    """What `--device cuda` opens."""
    made = FakeAccelerator(memory_bytes=1 << 30)

    def open_made(name: str | Device = "auto") -> Device:
        return made if name == "cuda" else CpuDevice()

    for module in (devices, api):
        monkeypatch.setattr(module, "open_device", open_made)
    make_up(monkeypatch)
    return made


def run(capsys: pytest.CaptureFixture[str], model: Path, *options: str) -> dict[str, Any]:
    assert main(["run", str(model), *PROMPT, *options, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_json_says_where_blocks_lived_and_what_was_copied(
    model: Path, device: FakeAccelerator, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    options = ["--memory", "200MB", "--host-memory", "200MB", "--strategy", "overlap", "--trace", str(trace)]
    report = run(capsys, model, "--device", "cuda", *options)
    plan, measured, possible = report["plan"], report["measured"], report["possible"]
    assert plan["device"] == "fake:0"
    assert plan["num_blocks"] == plan["resident_blocks"] + plan["streamed_blocks"] + plan["cpu_blocks"]
    assert plan["streamed_blocks"] == plan["host_stored_blocks"] + plan["disk_blocks"] > 0
    assert [plan["places"].count(place) for place in ("device", "host", "disk")] == [
        plan["resident_blocks"],
        plan["host_stored_blocks"],
        plan["disk_blocks"],
    ]
    assert plan["memory_bytes"] <= plan["budget_bytes"] == 200_000_000
    assert plan["host_memory_bytes"] <= plan["host_budget_bytes"] == 200_000_000
    assert 0 < measured["peak_memory_bytes"] - measured["process_overhead_bytes"] <= plan["budget_bytes"]
    assert measured["bytes_copied"] >= measured["passes"] * plan["streamed_bytes_per_pass"]
    assert measured["peak_host_memory_bytes"] > measured["host_overhead_bytes"] > 0
    assert possible["copied_bytes_per_s"] >= max(2e8, measured["copied_bytes_per_s"]), (
        "the made-up rate, or what was seen"
    )
    assert measured["decode_s_per_pass"] > 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["cat"] for event in events if event["ph"] == "X"} >= {"read", "copy", "compute"}
    on_processor = run(capsys, model, "--device", "cpu", "--memory", "200MB", "--dtype", "bfloat16")
    assert report["text"] == on_processor["text"]
    assert on_processor["plan"]["device"] == "cpu"
    assert "copied_bytes_per_s" not in on_processor["possible"]


def test_the_table_names_link_and_host(
    model: Path, device: FakeAccelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--memory", "200MB", "--host-memory", "200MB", "--strategy", "overlap"]
    assert main(["run", str(model), *PROMPT, "--device", "cuda", *options]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "headrace may hold 200 MB of fake:0, and 200 MB of the host" in told
    assert re.search(r"of 4 blocks \d on fake:0, \d (in host memory|on the disk)", told), told
    assert "copied to the device" in told
    assert "memory held on the host" in told
    assert "peak on fake:0" in told
    assert any(f"a pass waits for {what}" in told for what in ("the link", "the accelerator", "the disk"))


def test_drafts_work_on_an_accelerator(
    model: Path, device: FakeAccelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--memory", "200MB", "--host-memory", "200MB", "--draft", "lookup"]
    report = run(capsys, model, "--device", "cuda", *options)
    plain = run(capsys, model, "--device", "cuda", *options[:4])
    assert report["text"] == plain["text"]
    assert report["drafts"]["kind"] == "lookup"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--device", "cuda", "--memory", "2GiB"], "only 1.07 GB of its 1.07 GB are free"),
        (["--device", "cuda", "--memory", "10MB"], "Raise --memory to"),
        (["--device", "cpu", "--host-memory", "1GiB"], "--host-memory is for an accelerator"),
        (["--device", "cpu", "--cpu-blocks"], "--cpu-blocks is for an accelerator"),
        (["--device", "cuda", "--host-memory", "12 parsecs"], "12 parsecs"),
        (["--device", "cuda", "--memory", "300MB", "--dtype", "float32", "--compile"], "--compile needs weights"),
    ],
)
def test_what_cannot_be_is_refused_in_one_message(
    model: Path, device: FakeAccelerator, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert main(["run", str(model), *PROMPT, *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert told in shown.err
    assert "Traceback" not in shown.err
    assert device.held_bytes() == 0


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "tpu"])
def test_a_device_that_is_not_there_ends_with_code_2(
    model: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["run", str(model), *PROMPT, "--device", name]) == 2
    shown = capsys.readouterr()
    assert "device" in shown.err
    assert "Traceback" not in shown.err


def test_other_work_while_measuring_is_told_before_the_run_and_in_the_report(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, device: FakeAccelerator
) -> None:
    busy = Pressure(cpu=0.5)
    monkeypatch.setattr(calibration, "PressureGauge", lambda: Gauge(busy))
    assert main(["run", str(model), *PROMPT, "--device", "cpu", "--memory", "200MB", "--json"]) == 0
    shown = capsys.readouterr()
    assert busy.notes()[0] in shown.err
    assert busy.notes()[0] in json.loads(shown.out)["notes"]


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_other_work_during_the_run_is_told_at_its_end(
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    device: FakeAccelerator,
    share: float,
) -> None:
    monkeypatch.setattr(Moment, "cpu_share", lambda _before, _after: share)
    assert main(["run", str(model), *PROMPT, "--device", "cpu", "--memory", "200MB", "--json"]) == 0
    shown = capsys.readouterr()
    told = "the CPU was busy with other work for 40% of this run"
    assert (told in shown.err) is (told in json.loads(shown.out)["notes"][-1]) is (share > 0)
