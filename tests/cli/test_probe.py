"""`headrace probe` and its devices: which are listed, which is measured, what is refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from accelerator_machine import Gauge
from headrace.cli.main import main
from headrace.machine.machine_file import load_machine, machine_from_toml
from headrace.streaming import cuda_device, devices
from headrace.streaming.cuda_device import GpuDescription
from headrace.streaming.device import CpuDevice, Device
from headrace.streaming.fakes.accelerator import Drive
from headrace.streaming.pressure import Pressure
from headrace.streaming.probe import machine as machine_probe
from headrace.streaming.probe.link import probe_accelerator
from machine.test_measured_machine import CURVE
from measured_machines import computer
from streaming.test_link import SMALL, BothWays

GPUS = [
    GpuDescription(0, "NVIDIA H200", 150_000_000_000, 149_000_000_000, "9.0", 132),
    GpuDescription(1, "NVIDIA T4", 16_000_000_000, 1_000_000_000, "7.5", 40),
]


@pytest.fixture(autouse=True)
def _known_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk and processor are not what is tested here; GPUs are those that a test puts in, whatever the machine has."""
    monkeypatch.setattr(
        machine_probe, "_probe_host", lambda _directory, accelerators, _progress: computer([CURVE], *accelerators)
    )
    monkeypatch.setattr(machine_probe, "PressureGauge", Gauge)
    monkeypatch.setattr(cuda_device, "list_gpus", list)
    monkeypatch.delenv(devices.VARIABLE, raising=False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(name: str) -> Device:
        if name == "cpu":
            return CpuDevice()
        return BothWays(name="cuda:1" if name == "cuda:1" else "cuda:0", drive=Drive.EAGER)

    monkeypatch.setattr(devices, "open_device", opened)
    monkeypatch.setattr(cuda_device, "list_gpus", lambda: GPUS)
    monkeypatch.setattr(machine_probe, "probe_accelerator", functools.partial(probe_accelerator, sizes=SMALL))


def probe_json(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    code = main(["probe", *options, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    report: dict[str, Any] = json.loads(captured.out)
    return report


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("options", "device", "name"),
    [([], "cuda:0", "NVIDIA H200"), (["--device", "cuda:1"], "cuda:1", "NVIDIA T4")],
)
def test_all_gpus_are_listed_and_one_is_measured(
    options: list[str], device: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = probe_json(capsys, *options)
    measured = report["processor"]
    assert (measured["device"], measured["name"]) == (device, name)
    rate = measured["copies"]["bytes_per_s"]
    assert 0 < rate["low"] <= rate["expected"]
    assert rate["source"].startswith("measured: copies of")
    assert report["disk"]["bytes_per_s"]["expected"] > 0
    assert measured["arithmetic"]["curves"][0]["points"][0]["seconds_per_parameter"] > 0
    assert "others" not in report
    assert [(gpu["device"], gpu["measured"]) for gpu in report["gpus"]] == [
        ("cuda:0", device == "cuda:0"),
        ("cuda:1", device == "cuda:1"),
    ]
    assert report["gpus"][1] == {
        "device": "cuda:1",
        "name": "NVIDIA T4",
        "memory_bytes": 16_000_000_000,
        "free_bytes": 1_000_000_000,
        "compute_capability": "7.5",
        "multiprocessors": 40,
        "measured": device == "cuda:1",
    }


@pytest.mark.usefixtures("two_gpus")
def test_what_is_written_holds_the_accelerator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "machine.toml"
    assert main(["probe", "--dir", str(tmp_path), "--out", str(path)]) == 0
    written = capsys.readouterr()
    assert written.out == ""
    assert "cuda:0: NVIDIA H200, 150 GB, 149 GB free, compute capability 9.0\n" in written.err
    assert "cuda:1: NVIDIA T4, 16.0 GB, 1.00 GB free, compute capability 7.5, not measured\n" in written.err
    assert "from page-locked memory" in written.err
    assert "cuda:0: copies" in written.err
    machine = load_machine(path)
    (accelerator,) = machine.accelerators
    assert (accelerator.device, machine.is_calibrated) == ("cuda:0", True)
    assert accelerator.copies is not None
    assert machine.links == {"host": accelerator.copies.link()}
    assert main(["probe"]) == 0
    text = capsys.readouterr().out
    assert machine_from_toml(text, origin="standard output").accelerators[0].name == "NVIDIA H200"


@pytest.mark.usefixtures("two_gpus")
def test_the_processor_alone_measures_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    report = probe_json(capsys, "--device", "cpu")
    assert report["processor"]["kind"] == "cpu"
    assert report["links"] == {}
    assert [gpu["measured"] for gpu in report["gpus"]] == [False, False]


def test_without_a_gpu_nothing_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    report = probe_json(capsys)
    assert (report["processor"]["kind"], report["gpus"], report["name"]) == ("cpu", [], "bench")


@pytest.mark.parametrize(
    ("device", "built_for", "message"),
    [
        ("cuda", None, "was built without CUDA"),
        ("cuda:3", "13.0", "sees no GPU here"),
        ("gpu", None, "unknown device 'gpu'; choose auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_measured(
    device: str,
    built_for: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine_probe, "_probe_host", None)
    assert main(["probe", "--device", device, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("headrace: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_other_work_meanwhile_is_told_and_kept_in_the_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    busy = Pressure(cpu=0.5)
    monkeypatch.setattr(machine_probe, "PressureGauge", lambda: Gauge(busy))
    report = probe_json(capsys, "--device", "cpu")
    assert (report["busy"], tuple(report["notes"])) == (0.5, busy.notes())
    file = tmp_path / "machine.toml"
    assert main(["probe", "--device", "cpu", "--out", str(file)]) == 0
    assert busy.notes()[0] in capsys.readouterr().err
    assert (load_machine(file).busy, load_machine(file).notes) == (0.5, busy.notes())


def test_a_quiet_machine_is_not_busy(capsys: pytest.CaptureFixture[str]) -> None:
    report = probe_json(capsys, "--device", "cpu")
    assert ("busy" in report, report["notes"]) == (False, [])
