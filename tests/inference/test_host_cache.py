"""Keys and values on the host: attention sees what it would see of a cache that stays, whatever the queues do."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from headrace.errors import InvalidRequestError
from headrace.inference.host_cache import HostLayer, OffloadedCache
from headrace.inference.kv_cache import PreallocatedLayer
from headrace.streaming.device import Copied, CopyPart, DeviceEvent
from headrace.streaming.fakes.accelerator import Drive, FakeAccelerator

SHAPE = (3, 2, 8)  # sequences, heads, head size
STEPS = (5, 1, 1, 4, 1, 1, 1)


def states(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (SHAPE[0], SHAPE[1], tokens, SHAPE[2])
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def run(device: FakeAccelerator, layers: int, *, steps: Sequence[int] = STEPS) -> list[str]:
    """Play passes over some layers beside a cache that stays; return what differed."""
    visits = OffloadedCache(device, capacity_tokens=20)
    away = [HostLayer(visits) for _ in range(layers)]
    here = [PreallocatedLayer(20) for _ in range(layers)]
    problems = []
    for number, tokens in enumerate(steps):
        for index in range(layers):
            keys, values = states(tokens, 100 * number + index)
            got, wanted = away[index].update(keys, values), here[index].update(keys, values)
            for own, other in zip(got, wanted, strict=True):
                if not torch.equal(own, other):
                    problems.append(f"step {number}, layer {index}")
                if own.stride() != other.stride():
                    problems.append("strides differ, so might the kernels")
            if away[index].get_seq_length() != here[index].get_seq_length():
                problems.append("lengths differ")
    return problems


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("drive", [Drive.LAZY, Drive.EAGER, Drive.COPIES_FIRST, Drive.RANDOM])
def test_states_come_back_as_they_were(drive: Drive, layers: int) -> None:
    for seed in range(5):
        device = FakeAccelerator(drive=drive, seed=seed)
        assert run(device, layers) == []
        gc.collect()
        assert device.violations == []
        assert device._pinned == [], "page-locked memory goes with the cache"


class ComputingDoesNotWait(FakeAccelerator):
    """Attention begins before the states were brought."""

    def compute_after(self, event: DeviceEvent) -> None:
        return


class CopiesDoNotWait(FakeAccelerator):
    """States are brought before the latest were written, or over ones still to be written."""

    def copy(self, parts: Sequence[CopyPart], *, after: Sequence[DeviceEvent] = (), lane: int = 0) -> Copied:
        number = self.copies
        return super().copy(parts, lane=number % 2)  # and their queue's own order is lost


@pytest.mark.parametrize("broken", [ComputingDoesNotWait, CopiesDoNotWait])
def test_an_order_that_is_lost_is_caught(broken: type[FakeAccelerator]) -> None:
    found: list[Any] = []
    for drive in (Drive.LAZY, Drive.EAGER, Drive.RANDOM):
        for seed in range(5):
            try:
                found += run(broken(drive=drive, seed=seed), 3)
            except AssertionError as error:
                found.append(error)
    assert found


@pytest.mark.versions
def test_cropping_forgets_and_goes_on() -> None:
    visits = OffloadedCache(FakeAccelerator(), capacity_tokens=20)
    away, other = HostLayer(visits), HostLayer(visits)
    here = PreallocatedLayer(20)
    for number, tokens in enumerate((6, 3)):
        keys, values = states(tokens, number)
        away.update(keys, values)
        other.update(keys, values)
        here.update(keys, values)
    away.crop(-4)
    here.crop(-4)
    keys, values = states(2, 9)
    for own, wanted in zip(away.update(keys, values), here.update(keys, values), strict=True):
        assert torch.equal(own, wanted)
    away.crop(torch.tensor(-100))
    assert away.get_seq_length() == 0
    assert type(away.get_seq_length()) is int
    with pytest.raises(ValueError, match="negative"):
        away.crop(3)


@pytest.mark.parametrize("drive", [Drive.LAZY, Drive.COPIES_FIRST])
def test_a_cache_that_turns_out_too_short_grows(drive: Drive) -> None:
    device = FakeAccelerator(drive=drive)
    assert run(device, 3, steps=(5, 10, 5, 1, 30, 1, 1, 40, 2)) == []
    assert run(device, 2, steps=(50, 1)) == []
    gc.collect()
    assert device.violations == []
    assert device._pinned == []


@pytest.mark.versions
def test_reordering_permutes_the_sequences() -> None:
    visits = OffloadedCache(FakeAccelerator(), capacity_tokens=20)
    layers = [HostLayer(visits) for _ in range(3)]
    here = [PreallocatedLayer(20) for _ in range(3)]
    beams: Any = torch.tensor([2, 0, 0])
    for number in range(3):
        for index in range(3):
            keys, values = states(2, 10 * number + index)
            got, wanted = layers[index].update(keys, values), here[index].update(keys, values)
            assert all(torch.equal(own, other) for own, other in zip(got, wanted, strict=True))
        for index in range(3):
            layers[index].reorder_cache(beams)
            here[index].reorder_cache(beams)


def test_what_a_cache_on_the_host_cannot_do_is_refused() -> None:
    visits = OffloadedCache(FakeAccelerator(), capacity_tokens=4)
    layer = HostLayer(visits)
    layer.update(*states(3, 0))
    with pytest.raises(InvalidRequestError, match="repeated 2 times"):
        layer.batch_repeat_interleave(2)
    with pytest.raises(InvalidRequestError, match="taken out"):
        layer.batch_select_indices(torch.tensor([0]))
