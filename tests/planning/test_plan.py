"""A plan's books: blocks by place, bytes by purpose and by tier."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.dtypes import DTYPES
from headrace.errors import InvalidRequestError
from headrace.planning.plan import EmbeddingPlacement, Placement, Plan, TierMemory
from headrace.planning.strategies import RUNNABLE
from headrace.planning.workload import Workload

sizes = st.integers(0, 2**62)
memories = st.builds(TierMemory, **dict.fromkeys(TierMemory._fields, sizes))
workloads = st.builds(
    Workload,
    sequences=st.integers(1, 10**6),
    prompt_tokens=st.integers(1, 10**6),
    generate_tokens=st.integers(1, 10**6),
)
plans = st.builds(
    Plan,
    strategy=st.sampled_from(RUNNABLE),
    device=st.sampled_from(["cpu", "cuda:0"]),
    placements=st.lists(st.sampled_from(Placement), max_size=30).map(tuple),
    slots=st.integers(0, 9),
    slot_bytes=sizes,
    embedding=st.sampled_from(EmbeddingPlacement),
    compute_dtype=st.sampled_from(sorted(DTYPES)),
    memory=memories,
    budget_bytes=sizes,
    host_memory=memories,
    workload=workloads,
    streamed_bytes_per_pass=sizes,
)


@given(plans)
def test_counts_add_up(plan: Plan) -> None:
    counted = plan.resident_blocks + plan.streamed_blocks + plan.cpu_blocks
    assert counted == plan.num_blocks == len(plan.placements)
    assert plan.memory.total_bytes == sum(plan.memory._asdict().values())
    assert plan.workload.context_tokens == plan.workload.prompt_tokens + plan.workload.generate_tokens
    held = plan.bytes_by_tier
    if plan.uses_host_memory:
        assert held == {"device": 0, "host": plan.memory.total_bytes, "disk": plan.disk_bytes}
    else:
        assert held == {
            "device": plan.memory.total_bytes,
            "host": plan.host_memory.total_bytes,
            "disk": plan.disk_bytes,
        }


def test_every_purpose_of_memory_counts_once() -> None:
    memory = TierMemory(
        weights_bytes=1,
        slots_bytes=20,
        fixed_bytes=300,
        embedding_bytes=4000,
        conversion_bytes=50_000,
        kv_cache_bytes=600_000,
        work_space_bytes=7_000_000,
        ring_bytes=80_000_000,
    )
    assert memory.total_bytes == 87_654_321


@pytest.mark.parametrize("field", ["sequences", "prompt_tokens", "generate_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_workload_of_nothing_is_refused(field: str, value: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"{field} must be at least 1, not {value}"):
        dataclasses.replace(Workload(prompt_tokens=16, generate_tokens=32), **{field: value})
