"""What a plan says of itself, counted once more."""

from __future__ import annotations

from headrace.model.layout import align_up
from headrace.planning.memory import CACHE_LAYERS_ON_DEVICE, MemoryAccount
from headrace.planning.placements import CPU_SLOT_COUNTS, SLOT_COUNTS
from headrace.planning.plan import EmbeddingPlacement, Placement, Plan
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from planning_scenarios import CPU, DEVICE, DISK, HOST


def check_books(scenario: Scenario, plan: Plan) -> None:
    """Recount from the blocks what the plan says of itself."""
    spec, places, host, on_cpu = scenario.model, plan.placements, plan.host_memory, scenario.on_cpu
    of = {place: [b for b, own in zip(spec.blocks, places, strict=True) if own is place] for place in Placement}

    def sizes(*which: Placement) -> list[int]:
        return [block.read_bytes if on_cpu else block.held_bytes for place in which for block in of[place]]

    travelling = sizes(HOST, DISK)
    assert plan.memory.weights_bytes == sum(sizes(DEVICE))
    assert plan.streamed_bytes_per_pass == sum(travelling)
    assert plan.slot_bytes == max(travelling, default=0)
    assert plan.memory.slots_bytes == plan.slots * plan.slot_bytes
    assert host.weights_bytes == sum(align_up(block.held_bytes) for block in (*of[HOST], *of[CPU]))
    assert host.conversion_bytes == (MemoryAccount(scenario).cpu_conversion_bytes if of[CPU] else 0)
    assert host.ring_bytes == (0 if on_cpu else scenario.ring_chunks * scenario.chunk_bytes)
    assert (plan.workload, plan.compute_dtype) == (scenario.workload, scenario.compute_dtype)
    assert plan.device == ("cpu" if on_cpu else "cuda:0")
    if plan.strategy is Strategy.RESIDENT:
        assert (plan.slots, travelling) == (0, [])
    elif plan.strategy is Strategy.SEQUENTIAL:
        assert plan.slots == 1 <= len(travelling)
    else:
        assert plan.slots in (CPU_SLOT_COUNTS if on_cpu else SLOT_COUNTS)
        assert plan.slots <= len(travelling), "more slots than travelling blocks would be memory for nothing"
    assert all(block.layer_index is not None for block in of[CPU]), "the head is never the CPU's"
    assert scenario.allow_cpu or not of[CPU]
    assert not (on_cpu and of[HOST])
    check_cache(scenario, plan, len(of[CPU]))
    assert (host.work_space_bytes > 0) == bool(of[CPU])
    heads = [place for place, block in zip(places, spec.blocks, strict=True) if block.head_rows is not None]
    table = plan.embedding
    assert (table is EmbeddingPlacement.HEAD) == (spec.tied and set(heads) == {DEVICE})
    assert table is not EmbeddingPlacement.RESIDENT or set(places) == {DEVICE}
    if table is EmbeddingPlacement.RESIDENT:
        assert plan.memory.embedding_bytes >= spec.table_bytes
    else:
        assert plan.memory.embedding_bytes == 0
    assert (host.embedding_bytes > 0) == (table is EmbeddingPlacement.HOST)
    if table is EmbeddingPlacement.ROWS:
        free_bytes = plan.host_budget_bytes - host.total_bytes
        assert free_bytes < align_up(spec.table_bytes), "rows are read only where there is no room for them"


def check_cache(scenario: Scenario, plan: Plan, cpu_layers: int) -> None:
    """Recount where keys and values lie."""
    host, layers = plan.host_memory, len(scenario.model.blocks) - 1
    cache_bytes = scenario.model.kv_cache_bytes(
        sequences=scenario.workload.sequences,
        context_tokens=scenario.workload.context_tokens,
        element_bytes={"float32": 4, "bfloat16": 2}[scenario.compute_dtype],
    )
    if plan.cache_on_host:
        assert scenario.allow_host_cache
        assert host.kv_cache_bytes == cache_bytes
        visiting_bytes = CACHE_LAYERS_ON_DEVICE * cache_bytes // layers if cpu_layers < layers else 0
        assert plan.memory.kv_cache_bytes == visiting_bytes
    else:
        assert plan.memory.kv_cache_bytes + host.kv_cache_bytes == cache_bytes
        assert (host.kv_cache_bytes > 0) == bool(cpu_layers)
