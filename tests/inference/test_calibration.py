"""What measuring finds besides rates: other work on the machine, more memory asked for than there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import headrace
from accelerator_machine import Gauge, make_up
from headrace.inference import calibration, layer_timing
from headrace.inference.layer_timing import time_layer
from headrace.inference.load_options import LoadOptions
from headrace.inference.loading import Loading
from headrace.streaming import device_budget
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.device import CpuDevice
from headrace.streaming.pressure import Pressure
from headrace.streaming.probe import machine as machine_probe
from headrace.streaming.probe.machine import Slowdowns
from tiny_models import save_tiny

measure_disk = calibration._measure_disk
"""as it is before a test makes speeds up"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama") / "m")


@pytest.fixture(autouse=True)
def _made_up_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch)
    monkeypatch.setattr(device_budget, "free_bytes", lambda: 1 << 30)
    monkeypatch.setattr(device_budget, "total_bytes", lambda: 2 << 30)


def test_other_work_is_told_and_widens_what_is_predicted(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "PressureGauge", lambda: Gauge(Pressure(cpu=0.5)))
    with headrace.load(directory, memory="64MB", prompt_tokens=8, max_tokens=24) as model:
        assert model.headrace.scenario.busy == 0.5
        assert model.headrace.warnings == Pressure(cpu=0.5).notes()
        assert set(model.headrace.warnings) < set(model.headrace.notes)


@pytest.mark.parametrize(("memory", "noted"), [("2GiB", False), ("64MB", False), ("3GiB", True)])
def test_more_memory_than_there_is_is_told_with_what_is_free(directory: Path, memory: str, noted: bool) -> None:
    with headrace.load(directory, memory=memory, prompt_tokens=8, max_tokens=24) as model:
        assert model.headrace.scenario.busy == 0.0
        told = (
            "--memory is more than 2.15 GB, all that this machine has: planned as if it had so much, but 1.07 GB are "
            "free; give --memory 1024MiB",
        )
        assert model.headrace.warnings == (told if noted else ())


def test_the_disk_is_read_between_computing_where_both_go_on_later(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One figure of the rate: that of the rounds in which reading and computing take turns."""
    monkeypatch.setattr(calibration, "CONTENTION_MIN_BYTES", 0)
    monkeypatch.setattr(machine_probe, "handover_seconds", lambda *_args: 1e-4)
    monkeypatch.setattr(machine_probe, "contention", lambda *_args, **_options: Slowdowns(1.2, 1.5, 3e8))
    checkpoint = Checkpoint(directory)

    def loading(**options: Any) -> Loading:
        device = CpuDevice()
        return Loading.of(checkpoint, LoadOptions(memory="64MB", **options).checked(checkpoint.model, device), device)

    disk = measure_disk(loading(), "float32")
    assert disk == pytest.approx((3e8, 2e8, 1.2, 1e-4))
    limited = measure_disk(loading(read_limit=1e8), "float32")
    assert limited == pytest.approx((1e8, 1e8, 1 + 0.2 * 0.5, 1e-4)), "held back, it slows computing less"
    checkpoint.close()


def test_a_layer_is_timed_with_tokens_of_many_kinds(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token again and again would go to the same few experts, which are then all that is computed."""
    seen: list[torch.Tensor] = []
    run = layer_timing._Stage._pass

    def noted(stage: Any, ids: torch.Tensor, cache: dict[str, Any]) -> None:
        seen.append(ids)
        run(stage, ids, cache)

    monkeypatch.setattr(calibration, "time_layer", time_layer)
    monkeypatch.setattr(layer_timing._Stage, "_pass", noted)
    headrace.load(directory, memory="64MB", batch=2, prompt_tokens=8, max_tokens=24).close()
    distinct = {tuple(ids.shape): len(set(ids.flatten().tolist())) for ids in seen}
    assert (distinct[2, 8], distinct[2, 1]) == (16, 2), "prompts, and a token of each"
