"""What can go wrong with an accelerator: not there, too little memory, taken by others, failing in the middle."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import headrace
from accelerator_machine import make_up
from headrace.errors import BudgetError, InvalidRequestError, StreamError
from headrace.planning.plan import Placement
from headrace.streaming import device_budget
from headrace.streaming.device import CpuDevice
from headrace.streaming.devices import VARIABLE, open_device
from headrace.streaming.fakes.accelerator import Drive, FakeAccelerator
from tiny_models import resident_reference, save_tiny

IDS = torch.tensor([[5, 6, 7, 8]])
PLENTY: dict[str, Any] = {"memory": 1 << 30, "host_memory": 1 << 30, "prompt_tokens": 8, "max_tokens": 24}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU, and here is one")


@pytest.fixture(autouse=True)
def _made_up_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama") / "m")


# -- which device ------------------------------------------------------------------------------------------------------


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_refused_with_what_was_found(directory: Path, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"--device cuda: torch .* --device cpu"):
        headrace.load(directory, device=name, **PLENTY)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "", "CUDA", "cpu:0"])
def test_a_name_that_means_no_device_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="choose auto, cpu, cuda or cuda:N"):
        open_device(name)


@no_gpu
def test_auto_is_what_the_environment_names_or_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    assert isinstance(open_device("auto"), CpuDevice)
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(InvalidRequestError, match="--device cuda"):
        open_device("auto")
    assert isinstance(open_device("cpu"), CpuDevice), "what is asked for counts more"
    device = FakeAccelerator()
    assert open_device(device) is device


@pytest.mark.parametrize(
    "option", [{"host_memory": "1GiB"}, {"host_memory": 0}, {"cpu_blocks": True}, {"cache_on_host": True}]
)
def test_what_is_for_an_accelerator_is_refused_on_the_processor(directory: Path, option: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"is for an accelerator \(--device cuda\)"):
        headrace.load(directory, device="cpu", memory=1 << 30, **option)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_budget_above_what_is_free_is_refused_with_the_figures(directory: Path) -> None:
    device = FakeAccelerator(memory_bytes=300 << 20)
    others = device.allocate(100 << 20)
    with pytest.raises(BudgetError, match=r"only 210 MB of its 315 MB are free .*105 MB are held.* at most 200MiB"):
        headrace.load(directory, device=device, **{**PLENTY, "memory": 250 << 20})
    others.close()
    with headrace.load(directory, device=device, **{**PLENTY, "memory": 250 << 20}) as model:
        assert model.headrace.plan.budget_bytes == 250 << 20


def test_without_a_budget_what_is_free_is_taken_less_a_reserve(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_budget, "free_bytes", lambda: 8 << 30)
    options = {**PLENTY, "memory": None, "host_memory": None}
    with headrace.load(directory, device=FakeAccelerator(memory_bytes=2 << 30), **options) as model:
        assert model.headrace.plan.budget_bytes == (2 << 30) - (512 << 20)
        assert model.headrace.plan.host_budget_bytes == 7 << 30
    with headrace.load(directory, device=FakeAccelerator(memory_bytes=100 << 30), **options) as model:
        assert model.headrace.plan.budget_bytes == (100 << 30) - (5 << 30)


def test_host_memory_above_what_is_free_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_budget, "free_bytes", lambda: 1 << 29)
    with pytest.raises(BudgetError, match=r"--host-memory 1\.07 GB was asked for, but only 537 MB are free"):
        headrace.load(directory, device=FakeAccelerator(), **PLENTY)


def test_too_little_is_refused_before_anything_is_taken(directory: Path) -> None:
    device = FakeAccelerator()
    with pytest.raises(BudgetError, match="Raise --memory to") as refused:
        headrace.load(directory, device=device, **{**PLENTY, "memory": 1 << 20})
    assert device.peak_bytes() == 0
    least = refused.value.required_bytes
    assert least is not None
    with pytest.raises(BudgetError):
        headrace.load(directory, device=device, **{**PLENTY, "memory": least - 1})
    headrace.load(directory, device=device, **{**PLENTY, "memory": least}).close()
    with pytest.raises(BudgetError, match="--host-memory"):
        headrace.load(directory, device=device, **{**PLENTY, "host_memory": 1 << 20})


def test_two_models_share_a_device_and_the_second_takes_what_is_left(directory: Path) -> None:
    device = FakeAccelerator(memory_bytes=400 << 20)
    options = {**PLENTY, "memory": 390 << 20, "strategy": "resident"}
    with headrace.load(directory, device=device, **options) as first:
        held = device.held_bytes()
        assert held > 0
        with pytest.raises(BudgetError, match="are free"):
            headrace.load(directory, device=device, **{**options, "memory": 400 << 20})
        with headrace.load(directory, device=device, **{**options, "memory": 200 << 20}) as second:
            assert torch.equal(first(input_ids=IDS).logits, second(input_ids=IDS).logits)
        assert device.held_bytes() == held
    assert device.held_bytes() == 0


def test_a_prompt_whose_cache_does_not_fit_is_refused_before_the_first_pass(directory: Path) -> None:
    with pytest.raises(BudgetError) as refused:
        headrace.load(directory, device=FakeAccelerator(), **{**PLENTY, "memory": 1 << 20})
    assert refused.value.required_bytes is not None
    options = {**PLENTY, "memory": refused.value.required_bytes}
    with headrace.load(directory, device=FakeAccelerator(), **options) as model:
        with pytest.raises(BudgetError, match="of KV cache"):
            model.generate(IDS.repeat(8, 1), max_new_tokens=20, pad_token_id=0)
        assert model.headrace.passes == []


def test_room_for_passes_is_taken_at_the_start(directory: Path) -> None:
    device = FakeAccelerator()
    options = {**PLENTY, "batch": 64, "prompt_tokens": 100, "max_tokens": 128}
    with headrace.load(directory, device=device, **options) as model:
        memory = model.headrace.plan.memory
        assert device.reserved_bytes == memory.kv_cache_bytes + memory.work_space_bytes - (64 << 20)
        assert device.reserved_bytes > memory.kv_cache_bytes > 0


class RunsOut:
    """Stands for a feed-forward part that finds no memory, once."""

    def __init__(self, layer: Any) -> None:
        self._handle = layer.mlp.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self._handle.remove()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation")


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("strategy", ["resident", "overlap", "sequential"])
def test_running_out_of_memory_in_a_pass_is_told_and_the_model_goes_on(
    directory: Path, position: int, strategy: str
) -> None:
    device = FakeAccelerator(drive=Drive.LAZY)
    wanted = resident_reference(directory, torch.bfloat16)(input_ids=IDS).logits
    with headrace.load(directory, device=device, strategy=strategy, poison=True, **PLENTY) as model:
        RunsOut(model.model.layers[position])
        with pytest.raises(BudgetError, match=r"fake:0 ran out of memory in a pass: .*Tried to allocate 20.00 MiB\.\)"):
            model.generate(IDS, max_new_tokens=4, pad_token_id=0)
        model.headrace.stream.check_integrity()
        for _ in range(2):
            assert torch.equal(model(input_ids=IDS).logits, wanted)
    assert device.violations == []


# -- failures in the middle --------------------------------------------------------------------------------------------


def overlapping(directory: Path, device: FakeAccelerator) -> Any:
    """A model some of whose blocks come from host memory."""
    with pytest.raises(BudgetError) as refused:
        headrace.load(directory, device=device, **{**PLENTY, "memory": 1 << 20})
    assert refused.value.required_bytes is not None
    return headrace.load(directory, device=device, **{**PLENTY, "memory": refused.value.required_bytes + 100_000})


def test_a_copy_that_fails_names_the_block_and_closing_still_works(directory: Path) -> None:
    device = FakeAccelerator(drive=Drive.EAGER)
    model = overlapping(directory, device)
    assert Placement.HOST in model.headrace.plan.placements
    model(input_ids=IDS)
    device.fail_at_copy = device.copies + 3
    with pytest.raises(StreamError, match=r"(layer \d|head).*CUDA error: an illegal memory access"):
        model.generate(IDS, max_new_tokens=10, min_new_tokens=10, pad_token_id=0)
    model.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("headrace-reader")]
    assert device.held_bytes() == 0


@pytest.mark.parametrize("tied", [False, True])
def test_a_closed_model_holds_no_memory_of_the_device(tmp_path: Path, tied: bool) -> None:
    directory = save_tiny("llama-tied" if tied else "llama", tmp_path / "m")
    device = FakeAccelerator()
    model = overlapping(directory, device)
    for _ in range(2):
        model(input_ids=IDS)
    gc.collect()
    assert device.memories_alive() == 1
    model.close()
    gc.collect()
    assert device.memories_alive() == 0, "the model itself is still there, and may be for long"


def test_a_model_cannot_be_used_after_it_was_closed(directory: Path) -> None:
    model = overlapping(directory, FakeAccelerator())
    model.close()
    with pytest.raises(InvalidRequestError, match="closed"):
        model(input_ids=IDS)
