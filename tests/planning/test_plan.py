"""A plan survives JSON unchanged, and JSON that is no plan is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.dtypes import DTYPES
from headrace.errors import InvalidRequestError
from headrace.planning.plan import EmbeddingPlacement, MemoryUse, Plan, Strategy, Workload

sizes = st.integers(0, 2**62)
memory_uses = st.builds(MemoryUse, **{field.name: sizes for field in dataclasses.fields(MemoryUse)})
workloads = st.builds(
    Workload,
    sequences=st.integers(1, 10**6),
    prompt_tokens=st.integers(1, 10**6),
    generate_tokens=st.integers(1, 10**6),
)
plans = st.builds(
    Plan,
    strategy=st.sampled_from(Strategy),
    resident=st.lists(st.booleans(), max_size=30).map(tuple),
    slots=st.integers(0, 9),
    slot_bytes=sizes,
    embedding=st.sampled_from(EmbeddingPlacement),
    compute_dtype=st.sampled_from(list(DTYPES)),
    memory=memory_uses,
    budget_bytes=sizes,
    workload=workloads,
    streamed_bytes_per_pass=sizes,
)

PLAN = Plan(
    strategy=Strategy.OVERLAP,
    resident=(True, False, False),
    slots=2,
    slot_bytes=8192,
    embedding=EmbeddingPlacement.ROWS,
    compute_dtype="float32",
    memory=MemoryUse(
        resident_bytes=1,
        slots_bytes=20,
        fixed_bytes=300,
        embedding_bytes=4000,
        conversion_bytes=50_000,
        kv_cache_bytes=600_000,
        work_space_bytes=7_000_000,
    ),
    budget_bytes=10_000_000,
    workload=Workload(sequences=2, prompt_tokens=3, generate_tokens=4),
    streamed_bytes_per_pass=16384,
)


@given(plans)
def test_json_and_back(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert isinstance(again.strategy, Strategy)
    assert isinstance(again.embedding, EmbeddingPlacement)
    assert hash(again) == hash(plan), "as frozen as before"


@given(plans)
def test_counts_add_up(plan: Plan) -> None:
    assert plan.resident_blocks + plan.streamed_blocks == plan.num_blocks == len(plan.resident)
    parts = dataclasses.asdict(plan.memory)
    assert plan.memory.total_bytes == sum(parts.values())
    assert plan.memory.arena_bytes == parts["resident_bytes"] + parts["slots_bytes"]
    assert plan.workload.context_tokens == plan.workload.prompt_tokens + plan.workload.generate_tokens


def test_every_purpose_of_memory_counts_once() -> None:
    assert PLAN.memory.total_bytes == 7_654_321


@pytest.mark.parametrize("field", ["sequences", "prompt_tokens", "generate_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_workload_of_nothing_is_refused(field: str, value: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"{field} must be at least 1, not {value}"):
        dataclasses.replace(Workload(), **{field: value})


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(PLAN.to_json()), **changes})


def test_the_unchanged_plan_is_accepted() -> None:
    assert Plan.from_json(changed()) == PLAN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "7",
        '"plan"',
        "[]",
        "[1]",
        "{}",
        "[" * 100_000,
        changed(strategy="sideways"),
        changed(strategy=None),
        changed(embedding="elsewhere"),
        changed(resident=None),
        changed(resident=5),
        changed(resident=["no", "yes"]),
        changed(resident=[1, 0]),
        changed(slots="2"),
        changed(slots=2.5),
        changed(slots=True),
        changed(slots=None),
        changed(slots=-1),
        changed(slots=float("nan")),
        changed(slot_bytes="1GiB"),
        changed(budget_bytes=-1),
        changed(streamed_bytes_per_pass=[]),
        changed(compute_dtype="int3"),
        changed(compute_dtype=[]),
        changed(memory=None),
        changed(memory={}),
        changed(memory={**dataclasses.asdict(PLAN.memory), "resident_bytes": "1"}),
        changed(memory={**dataclasses.asdict(PLAN.memory), "further_bytes": 1}),
        changed(workload={"sequences": 0, "prompt_tokens": 1, "generate_tokens": 1}),
        changed(workload={"sequences": "1", "prompt_tokens": 1, "generate_tokens": 1}),
        changed(workload=[]),
        changed(further=1),
    ],
    ids=lambda text: text if len(text) < 20 else None,
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"this is not a plan|must be at least 1"):
        Plan.from_json(text)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Plan)])
def test_a_missing_field_is_refused(field: str) -> None:
    raw = json.loads(PLAN.to_json())
    del raw[field]
    with pytest.raises(InvalidRequestError, match=field):
        Plan.from_json(json.dumps(raw))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(MemoryUse)])
def test_a_missing_purpose_is_refused(field: str) -> None:
    raw = json.loads(PLAN.to_json())
    del raw["memory"][field]
    with pytest.raises(InvalidRequestError, match=field):
        Plan.from_json(json.dumps(raw))
