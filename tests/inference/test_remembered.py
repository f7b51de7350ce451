"""A second start takes what the first one measured, and nothing else: same scenario, only where it holds."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import headrace
from accelerator_machine import Gauge, make_up
from headrace.errors import BudgetError, InvalidRequestError
from headrace.inference import calibration, remembered
from headrace.inference.calibration import Calibration, calibrate
from headrace.inference.load_options import LoadOptions
from headrace.inference.loading import Loading
from headrace.inference.remembered import calibrated, circumstances
from headrace.planning.workload import Packed
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.device import CpuDevice, Device
from headrace.streaming.fakes.accelerator import FakeAccelerator
from headrace.streaming.pressure import Pressure
from tiny_models import save_tiny

Find = Callable[..., Calibration]
WORK: dict[str, Any] = {"memory": "64MB", "prompt_tokens": 8, "max_tokens": 24}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama") / "m")


@pytest.fixture
def checkpoint(directory: Path) -> Iterator[Checkpoint]:
    opened = Checkpoint(directory)
    yield opened
    opened.close()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where measurements of this test lie; its clock stands still."""
    monkeypatch.setenv(remembered.VARIABLE, str(tmp_path / "measured"))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    make_up(monkeypatch)
    return tmp_path / "measured"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each measurement."""
    found: list[int] = []

    def counted(*args: Any, **options: Any) -> Calibration:
        found.append(1)
        return calibrate(*args, **options)

    monkeypatch.setattr(remembered, "calibrate", counted)
    return found


def loading(checkpoint: Checkpoint, device: Device | None = None, **options: Any) -> Loading:
    opened = CpuDevice() if device is None else device
    return Loading.of(checkpoint, LoadOptions(**{**WORK, **options}).checked(checkpoint.model, opened), opened)


def an_accelerator() -> FakeAccelerator:
    return FakeAccelerator(memory_bytes=1 << 30)


@pytest.mark.parametrize(
    ("made", "options", "packed"),
    [
        (CpuDevice, {}, None),
        (CpuDevice, {"dtype": "float32", "batch": 3, "read_limit": 1e8, "draft_tokens": 0}, None),
        (CpuDevice, {}, Packed(positions=24, pass_tokens=16, samples=1, longest=24)),
        (an_accelerator, {"memory": "200MB", "host_memory": "200MB"}, None),
        (
            an_accelerator,
            {"memory": "200MB", "host_memory": "200MB", "cpu_blocks": True, "cache_on_host": True, "read_limit": 1e8},
            None,
        ),
    ],
)
def test_the_second_start_has_the_same_scenario(
    checkpoint: Checkpoint, kept: Path, measured: list[int], made: Any, options: dict[str, Any], packed: Any
) -> None:
    first = calibrated(loading(checkpoint, made(), **options), packed=packed)
    second = calibrated(loading(checkpoint, made(), **options), packed=packed)
    assert len(measured) == 1
    assert second.scenario == first.scenario
    assert second.notes == ("speeds were measured just now (--fresh measures again)", *first.notes)


def test_what_is_remembered_takes_the_librarys_memory_as_measuring_does(
    checkpoint: Checkpoint, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before memory is counted: later it would be taken out of the budget."""
    multiplied: list[torch.Size] = []
    linear = functional.linear

    def noted(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        multiplied.append(rows.shape)
        return linear(rows, weight)

    calibrated(loading(checkpoint, batch=2))
    monkeypatch.setattr(functional, "linear", noted)
    calibrated(loading(checkpoint, batch=2))
    assert [rows for rows, _ in multiplied] == [2 * WORK["prompt_tokens"]]


def test_fresh_measures_again_and_is_what_is_remembered(
    checkpoint: Checkpoint, kept: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(loading(checkpoint))
    monkeypatch.setattr(calibration, "_measure_disk", lambda *_args: calibration._Disk(5e8, 5e8, 1.0, 1e-4))
    assert calibrated(loading(checkpoint, fresh=True)).scenario.known_rates.read_bytes_per_s == 5e8
    assert calibrated(loading(checkpoint)).scenario.known_rates.read_bytes_per_s == 5e8
    assert len(measured) == 2


@pytest.mark.parametrize(
    "changed",
    [{"batch": 2}, {"dtype": "float32"}, {"read_limit": 1e8}, {"attention": "eager"}, {"prompt_tokens": 3}],
)
def test_what_speeds_depend_on_is_measured_again(
    checkpoint: Checkpoint, kept: Path, measured: list[int], changed: dict[str, Any]
) -> None:
    calibrated(loading(checkpoint))
    calibrated(loading(checkpoint, **changed))
    assert len(measured) == 2


def test_another_budget_or_strategy_is_served(checkpoint: Checkpoint, kept: Path, measured: list[int]) -> None:
    calibrated(loading(checkpoint))
    found = calibrated(loading(checkpoint, memory="70MB", strategy="sequential"))
    assert found.scenario.budget_bytes == 70_000_000
    assert len(measured) == 1


def test_a_prompt_of_similar_length_takes_its_share_of_the_time(
    checkpoint: Checkpoint, kept: Path, measured: list[int]
) -> None:
    first = calibrated(loading(checkpoint)).scenario
    longer = calibrated(loading(checkpoint, prompt_tokens=12, max_tokens=28)).scenario
    assert len(measured) == 1
    curve, (before,), (after,) = first.known_rates.known_curve, first.known_rates.layers, longer.known_rates.layers
    assert after.prefill_s / before.prefill_s == pytest.approx(
        curve.seconds_per_parameter(12) / curve.seconds_per_parameter(8)
    )
    assert after.decode_s == before.decode_s


def test_the_more_similar_of_two_measurements_serves(
    checkpoint: Checkpoint, kept: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for prompt_tokens, rate in ((8, 1e8), (20, 2e8)):
        monkeypatch.setattr(calibration, "_measure_disk", lambda *_args, r=rate: calibration._Disk(r, r, 1.0, 1e-4))
        calibrated(loading(checkpoint, prompt_tokens=prompt_tokens, max_tokens=prompt_tokens + 16))
    for prompt_tokens, rate in ((9, 1e8), (16, 2e8)):
        found = calibrated(loading(checkpoint, prompt_tokens=prompt_tokens, max_tokens=prompt_tokens + 16))
        assert found.scenario.known_rates.read_bytes_per_s == rate
    assert len(measured) == 2


def test_other_weights_versions_and_threads_are_other_circumstances(
    directory: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def now() -> dict[str, Any]:
        opened = Checkpoint(directory)
        try:
            return circumstances(loading(opened))
        finally:
            opened.close()

    before = now()
    assert now() == before
    shard = next(directory.glob("*.safetensors"))
    stamp = shard.stat()
    shard.touch()
    assert now()["checkpoint"] != before["checkpoint"]
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert now() == before
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"another {name}")
    assert now()["versions"] != before["versions"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert now()["machine"] != before["machine"]


def test_busy_measurements_serve_a_short_while(
    checkpoint: Checkpoint, kept: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "PressureGauge", lambda: Gauge(Pressure(cpu=0.5)))
    first = calibrated(loading(checkpoint))
    second = calibrated(loading(checkpoint))
    assert second.scenario.busy == 0.5
    assert second.warnings == first.warnings == Pressure(cpu=0.5).notes()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + remembered.KEPT_BUSY_S)
    monkeypatch.setattr(calibration, "PressureGauge", Gauge)
    assert calibrated(loading(checkpoint)).scenario.busy == 0.0
    monkeypatch.setattr(time, "time", lambda: now + 20 * 86400)
    old = calibrated(loading(checkpoint))
    assert "speeds were measured 20 days ago (--fresh measures again)" in old.notes
    assert old.age_s == pytest.approx(20 * 86400, rel=0.01)
    assert len(measured) == 2


@pytest.mark.parametrize("when_s", [-3600.0, remembered.KEPT_S + 3600])
def test_too_old_ones_and_those_of_another_clock_do_not_serve(
    checkpoint: Checkpoint, kept: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch, when_s: float
) -> None:
    calibrated(loading(checkpoint))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + when_s)
    calibrated(loading(checkpoint))
    assert len(measured) == 2


def break_off(text: str) -> str:
    return text[: len(text) // 2]


def of_another_form(text: str) -> str:
    found = json.loads(text)
    found["measurements"][0]["rates"].pop("curve")
    return json.dumps(found)


def with_a_time_below_zero(text: str) -> str:
    found = json.loads(text)
    found["measurements"][0]["rates"]["curve"]["points"][0]["seconds_per_parameter"] = -1.0
    return json.dumps(found)


def of_another_machine(text: str) -> str:
    found = json.loads(text)
    found["circumstances"]["machine"]["cpus"] += 1
    return json.dumps(found)


def a_list(text: str) -> str:
    return f"[{text}]"


@pytest.mark.parametrize("damage", [break_off, of_another_form, with_a_time_below_zero, of_another_machine, a_list])
def test_a_damaged_file_is_measured_again_and_written_anew(
    checkpoint: Checkpoint, kept: Path, measured: list[int], damage: Callable[[str], str]
) -> None:
    calibrated(loading(checkpoint))
    (file,) = kept.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    for _ in range(2):
        calibrated(loading(checkpoint))
    assert len(measured) == 2
    assert list(kept.iterdir()) == [file]
    assert file.read_text().count('"rates"') == whole.count('"rates"')


def test_a_write_that_fails_leaves_the_old_file_and_says_so(
    checkpoint: Checkpoint, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(loading(checkpoint))
    (file,) = kept.iterdir()
    before = file.read_bytes()

    def refuse(*_args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    found = calibrated(loading(checkpoint, fresh=True))
    assert "what was measured is not kept for the next start: [Errno 13] Permission denied" in found.notes[-1]
    assert [(path, path.read_bytes()) for path in kept.iterdir()] == [(file, before)]


def test_nothing_is_kept_where_there_is_no_place(
    checkpoint: Checkpoint, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.parent.joinpath("a file").touch()
    monkeypatch.setenv(remembered.VARIABLE, str(kept.parent / "a file" / "below"))
    assert "not kept for the next start" in calibrated(loading(checkpoint)).notes[-1]
    monkeypatch.setenv(remembered.VARIABLE, "")
    assert remembered.measured_directory() is None
    monkeypatch.delenv(remembered.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert remembered.measured_directory() == Path("/somewhere/headrace/measured")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/one")
    assert remembered.measured_directory() == Path("/home/one/.cache/headrace/measured")


def test_a_budget_that_is_too_small_is_refused_as_before(
    checkpoint: Checkpoint, kept: Path, measured: list[int]
) -> None:
    calibrated(loading(checkpoint))
    with pytest.raises(BudgetError, match="--memory"):
        calibrated(loading(checkpoint, memory="1KiB"))


def test_what_a_small_budget_decided_is_not_remembered(
    checkpoint: Checkpoint, kept: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little memory on the host no layer of the CPU is timed; with more of it one has to be."""
    options: dict[str, Any] = {"cpu_blocks": True, "memory": "200MB", "host_memory": "200MB"}
    with monkeypatch.context() as little_memory:
        little_memory.setattr(calibration, "time_cpu_layer", lambda *_args: None)
        calibrated(loading(checkpoint, an_accelerator(), **options))
    found = calibrated(loading(checkpoint, an_accelerator(), **options)).scenario
    assert found.known_rates.cpu_layer is not None
    assert len(measured) == 2


def test_plans_and_runs_share_what_was_measured(directory: Path, kept: Path, measured: list[int]) -> None:
    with headrace.load(directory, **WORK) as model:
        prediction = model.headrace.prediction
    answer = headrace.plan(directory, memory="64MB", prompt_tokens=8, generate_tokens=16)
    assert len(measured) == 1
    assert answer["machine"]["source"] == "measured just now with this model"
    best = next(own for own in answer["strategies"] if own["name"] == answer["recommended"])
    assert best["decode_s_per_pass"] == prediction.decode_s_per_pass
    headrace.plan(directory, memory="64MB", prompt_tokens=8, generate_tokens=16, fresh=True)
    assert len(measured) == 2
    with pytest.raises(InvalidRequestError, match="--fresh measures this machine again, but --machine names one"):
        headrace.plan("gpt-3", machine="8xa100-80", fresh=True)
