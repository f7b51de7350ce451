"""Seconds of a block by where it lives, and of a pass outside of its blocks."""

from __future__ import annotations

import dataclasses

import pytest

from headrace.errors import MachineError
from headrace.planning.block_times import BlockTimes, block_times
from headrace.planning.plan import Placement
from headrace.planning.rates import LayerTimes
from headrace.planning.workload import Workload
from planning_scenarios import CHUNK_BYTES, CPU, DEVICE, DISK, HOST, accelerator_rates, accelerator_scenario, model


def test_times_by_place() -> None:
    spec = model([700, 700])
    work = Workload(sequences=2, prompt_tokens=10, generate_tokens=5)
    rates = accelerator_rates(
        spec,
        disk_s=3.0,
        link_s=1.0,
        copy_latency_s=0.25,
        cpu_layer=LayerTimes(prefill_s=7.0, decode_s=5.0),
        activation_latency_s=0.5,
        activation_s_per_token=0.125,
        memory_copy_bytes_per_s=1e6,
    )
    scenario = accelerator_scenario(spec, work=work).at(rates)
    layer = spec.blocks[0]
    own = block_times(dataclasses.replace(scenario, device="cpu"), (DISK,) * 3)[0]
    assert own.copy_s == 0.0

    def times_in(place: Placement, *, pinned: bool = True) -> BlockTimes:
        found = block_times(dataclasses.replace(scenario, pinned=pinned), (place, DEVICE, DEVICE))
        assert found[1:] == block_times(scenario, (DEVICE,) * 3)[1:]
        return found[0]

    copy_s = layer.held_bytes / rates.link_bytes_per_s + 0.25
    assert times_in(DISK) == times_in(DEVICE)
    assert times_in(DISK)[:6] == (own.read_s, own.prefill_s, own.decode_s, copy_s, 0.0, 0.0)
    assert times_in(DISK).pieces == -(-layer.read_bytes // CHUNK_BYTES)
    assert times_in(HOST)[:4] == times_in(DISK)[:4]
    assert (times_in(HOST).store_s, times_in(HOST).stage_s) == (layer.held_bytes / 1e6, 0.0)
    assert times_in(HOST, pinned=False).stage_s == layer.held_bytes / rates.staged_bytes_per_s
    assert times_in(CPU)[:5] == (own.read_s, 7.0 + 0.5 + 2.5, 5.0 + 0.5 + 0.25, 0.0, layer.held_bytes / 1e6)


def test_what_the_cpu_was_not_measured_with_is_refused() -> None:
    spec = model([700, 700])
    scenario = accelerator_scenario(spec).at(accelerator_rates(spec, disk_s=3.0, link_s=1.0))
    with pytest.raises(MachineError, match="layer 0"):
        block_times(scenario, (CPU, DEVICE, DEVICE))
    known = dataclasses.replace(scenario.known_rates, cpu_layer=LayerTimes(prefill_s=1.0, decode_s=1.0))
    with pytest.raises(MachineError, match="head"):
        block_times(scenario.at(known), (DEVICE, DEVICE, CPU))


def test_keys_and_values_on_the_host_visit_the_device_for_their_layers_turn() -> None:
    spec = model([700] * 4)
    rates = accelerator_rates(
        spec, disk_s=3.0, link_s=1.0, cpu_layer=LayerTimes(prefill_s=1.0, decode_s=1.0), copy_latency_s=0.5
    )
    scenario = accelerator_scenario(spec, work=Workload(prompt_tokens=100, generate_tokens=200)).at(rates)
    places = (DEVICE, HOST, DISK, CPU, DEVICE)
    plain, visited = (block_times(scenario, places, cache_on_host=on_host) for on_host in (False, True))
    visit_s = spec.kv_cache_bytes(sequences=1, context_tokens=200, element_bytes=2) / 4 / rates.link_bytes_per_s + 0.5
    assert visited[0].decode_s - plain[0].decode_s == pytest.approx(visit_s)
    for index in (1, 2):
        assert visited[index].copy_s - plain[index].copy_s == pytest.approx(visit_s)
    assert visited[3:] == plain[3:], "the CPU has its own in its memory, the head has none"
