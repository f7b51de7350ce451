"""What arrangements hold, by purpose, on the computing device and on its host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from headrace.model.layout import PAGE_BYTES, align_up
from headrace.model.model import LayerGroup
from headrace.model.stored_model import StoredBlock
from headrace.planning.memory import LIBRARY_WORK_SPACE_BYTES, MemoryAccount
from headrace.planning.plan import Arrangement, EmbeddingPlacement
from headrace.planning.planner import compare, plan_fastest
from headrace.planning.scenario import Scenario
from headrace.planning.workload import Workload
from planning_scenarios import (
    CPU,
    DEVICE,
    DISK,
    HIDDEN,
    HOST,
    accelerator_scenario,
    budgets,
    cpu_scenario,
    model,
    rates_of,
    with_budget,
    without_blocks,
)


def test_what_a_cpu_holds_apart_from_blocks() -> None:
    spec = model([700, 700])
    scenario = cpu_scenario(spec, dtype="float32", sequences=3, prompt_tokens=50, generate_tokens=20)
    held = without_blocks(scenario)
    assert (held.weights_bytes, held.slots_bytes, held.embedding_bytes) == (0, 0, 0)
    assert held.kv_cache_bytes == spec.kv_cache_bytes(sequences=3, context_tokens=70, element_bytes=4)
    for new_tokens, context_tokens in ((50, 50), (1, 70)):
        assert held.work_space_bytes >= spec.work_space_bytes(
            sequences=3, new_tokens=new_tokens, context_tokens=context_tokens, element_bytes=4
        )
    long = without_blocks(cpu_scenario(spec, dtype="float32", prompt_tokens=1, generate_tokens=5000))
    assert long.work_space_bytes == spec.work_space_bytes(
        sequences=1, new_tokens=1, context_tokens=5001, element_bytes=4
    ), "the last token has the longest context"
    assert HIDDEN * (2 + 4) <= held.fixed_bytes <= 3 * PAGE_BYTES, "the last norm, as it is stored and as it is used"
    assert held.conversion_bytes == MemoryAccount(scenario).conversion_bytes


def test_what_an_accelerator_holds_apart_from_blocks() -> None:
    spec = model([700, 700])
    work = Workload(sequences=3, prompt_tokens=50, generate_tokens=20)
    scenario = accelerator_scenario(spec, dtype="float32", work=work)
    held = MemoryAccount(scenario).device(Arrangement((DISK,) * 3, 0))
    assert (held.weights_bytes, held.slots_bytes, held.embedding_bytes) == (0, 0, 0)
    assert held.kv_cache_bytes == spec.kv_cache_bytes(sequences=3, context_tokens=70, element_bytes=4)
    assert held.fixed_bytes == align_up(HIDDEN * 4), "the last norm, as it is used"
    activations = spec.work_space_bytes(sequences=3, new_tokens=50, context_tokens=50, element_bytes=4)
    assert held.work_space_bytes >= activations + LIBRARY_WORK_SPACE_BYTES
    drafted = MemoryAccount(dataclasses.replace(scenario, draft_tokens=60)).device(Arrangement((DISK,) * 3, 0))
    assert drafted.work_space_bytes > held.work_space_bytes


def conversion_bytes(scenario: Scenario) -> int:
    return MemoryAccount(scenario).conversion_bytes


def test_weights_that_are_used_as_they_lie_need_no_conversion() -> None:
    spec = model([700, 700])
    assert conversion_bytes(cpu_scenario(spec, dtype="bfloat16")) == 0
    largest_bytes = 700 * HIDDEN * 4
    for_float32 = conversion_bytes(cpu_scenario(spec, dtype="float32"))
    assert 3000 * HIDDEN * 4 <= for_float32 < 3000 * HIDDEN * 4 + 4 * PAGE_BYTES, "the head is the largest module"
    small_head = cpu_scenario(model([700, 700], vocab=300), dtype="float32")
    assert largest_bytes <= conversion_bytes(small_head) < largest_bytes + 4 * PAGE_BYTES
    copied = dataclasses.replace(cpu_scenario(spec, dtype="bfloat16"), copies_weights=True)
    assert 3000 * HIDDEN * 2 <= conversion_bytes(copied) < 3000 * HIDDEN * 2 + 4 * PAGE_BYTES


def test_experts_are_put_together_even_where_no_dtype_changes() -> None:
    spec = model([64, 64], vocab=300, experts=8)
    together_bytes = 8 * 2 * 64 * HIDDEN * 2
    converted = conversion_bytes(cpu_scenario(spec, dtype="bfloat16"))
    assert together_bytes <= converted < together_bytes + 8 * 2 * 64 + 4 * PAGE_BYTES


def test_the_head_is_converted_whole() -> None:
    """As one block: 8,000 rows of float32 are more than the largest matrix of a layer."""
    spec = model([700, 700], vocab=8000)
    assert MemoryAccount(accelerator_scenario(spec)).conversion_bytes == 0, "used as they lie"
    head_bytes = 8000 * HIDDEN * 4
    as_float32 = MemoryAccount(accelerator_scenario(spec, dtype="float32"))
    assert head_bytes <= as_float32.conversion_bytes < head_bytes + 4 * PAGE_BYTES
    largest_bytes = 700 * HIDDEN * 4
    assert largest_bytes <= as_float32.cpu_conversion_bytes < largest_bytes + 4 * PAGE_BYTES
    experts = MemoryAccount(accelerator_scenario(model([64, 64], vocab=300, experts=8)))
    together_bytes = 8 * 2 * 64 * HIDDEN * 2
    for converted in (experts.conversion_bytes, experts.cpu_conversion_bytes):
        assert together_bytes <= converted < together_bytes + 8 * 2 * 64 + 4 * PAGE_BYTES


def test_what_the_cpu_computes_lies_on_the_host_with_all_it_needs() -> None:
    spec = model([700] * 4)
    scenario = accelerator_scenario(spec, dtype="float32", host_budget_bytes=1 << 40)
    places = (CPU, DISK, CPU, HOST, DEVICE)
    held = MemoryAccount(scenario).of(Arrangement(places, 2))
    host, layer = held.host, align_up(spec.blocks[0].held_bytes)
    assert host.weights_bytes == (2 + 1) * layer
    assert host.conversion_bytes == MemoryAccount(scenario).cpu_conversion_bytes > 0
    one_cache = spec.kv_cache_bytes(sequences=1, context_tokens=48, element_bytes=4) // 4
    assert (host.kv_cache_bytes, held.device.kv_cache_bytes) == (2 * one_cache, 2 * one_cache)
    assert host.work_space_bytes == held.device.work_space_bytes - LIBRARY_WORK_SPACE_BYTES
    on_host = MemoryAccount(scenario).of(Arrangement(places, 2, cache_on_host=True))
    assert (on_host.host.kv_cache_bytes, on_host.device.kv_cache_bytes) == (4 * one_cache, 3 * one_cache)
    without = MemoryAccount(scenario).of(Arrangement((DISK,) * 4 + (DEVICE,), 2)).host
    assert (without.weights_bytes, without.conversion_bytes) == (0, 0)
    assert (without.kv_cache_bytes, without.work_space_bytes) == (0, 0)


def test_a_sliding_window_keeps_no_more_than_itself() -> None:
    spec = model([100, 100])
    layer = next(spec.layers())
    shorter = dataclasses.replace(layer, window_tokens=10)
    windowed = dataclasses.replace(spec, groups=tuple(LayerGroup(layer=each, count=1) for each in (layer, shorter)))
    whole, short, head = cache_bytes = MemoryAccount(accelerator_scenario(windowed)).cache_bytes
    assert (whole, head) == (spec.kv_cache_bytes(sequences=1, context_tokens=48, element_bytes=2) // 2, 0)
    assert short == whole * 10 // 48
    assert sum(cache_bytes) == windowed.kv_cache_bytes(sequences=1, context_tokens=48, element_bytes=2)


def test_where_the_rows_of_the_embedding_come_from() -> None:
    spec = model([700] * 3)
    plenty = budgets(accelerator_scenario(spec), 1.3, 1.3)
    everything, all_but_one = (DEVICE,) * 4, (DISK, DEVICE, DEVICE, DEVICE)
    table_bytes = spec.embedding.size_bytes
    stays = MemoryAccount(plenty).of(Arrangement(everything, 0))
    assert stays.embedding is EmbeddingPlacement.RESIDENT
    assert 0 <= stays.device.embedding_bytes - table_bytes < 256
    tight = dataclasses.replace(plenty, budget_bytes=stays.device.total_bytes - 1)
    assert MemoryAccount(tight).of(Arrangement(everything, 0)).embedding is EmbeddingPlacement.HOST
    streamed = MemoryAccount(plenty).of(Arrangement(all_but_one, 1))
    assert streamed.embedding is EmbeddingPlacement.HOST
    assert (streamed.host.embedding_bytes, streamed.device.embedding_bytes) == (align_up(table_bytes), 0)
    little = dataclasses.replace(plenty, host_budget_bytes=streamed.host.total_bytes - 1)
    assert MemoryAccount(little).of(Arrangement(all_but_one, 1)).embedding is EmbeddingPlacement.ROWS
    tied = budgets(accelerator_scenario(model([700] * 3, tied=True)), 1.3, 1.3)
    assert MemoryAccount(tied).of(Arrangement(all_but_one, 1)).embedding is EmbeddingPlacement.HEAD
    assert MemoryAccount(tied).of(Arrangement((DEVICE, DEVICE, DEVICE, HOST), 1)).embedding is EmbeddingPlacement.HOST
    wide = (
        MemoryAccount(budgets(accelerator_scenario(spec, dtype="float32"), 3.0, 0.0))
        .of(Arrangement(everything, 0))
        .device
    )
    assert 0 <= wide.embedding_bytes - 2 * table_bytes < 256, "as it is computed with"


@pytest.mark.parametrize("plan", [plan_fastest, compare])
def test_modules_are_counted_once_for_a_scenario(
    monkeypatch: pytest.MonkeyPatch, plan: Callable[[Scenario], object]
) -> None:
    """A mixture of experts has tens of thousands of tensors: looking at all of them for each candidate took seconds."""
    counted: list[int] = []

    module_bytes = StoredBlock.module_bytes

    def count(block: StoredBlock, compute_dtype: str, *, prevailing: str, copies: bool) -> int:
        counted.append(block.index)
        return module_bytes(block, compute_dtype, prevailing=prevailing, copies=copies)

    monkeypatch.setattr(StoredBlock, "module_bytes", count)
    spec = model([64] * 6, vocab=300, experts=4)
    plan(with_budget(cpu_scenario(spec), 1 << 40).at(rates_of(spec, load_per_compute=1.2)))
    assert counted == list(range(6))
