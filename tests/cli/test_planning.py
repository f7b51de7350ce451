"""The planning commands' own arithmetic: break-even, its ways, and what would help; by a described machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli_checkpoints import STREAMED_DTYPE, streaming_budget, write_model
from headrace.cli.break_even import break_even_of
from headrace.cli.plan_report import plan_json, recommended
from headrace.cli.planning_case import Asked, PlanningCase, from_description
from headrace.errors import InvalidRequestError, MachineError
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.machine.machine import Machine
from headrace.planning.infeasible import minimum_bytes
from headrace.planning.planner import compare, plan_fastest
from headrace.planning.prediction import Candidate
from headrace.planning.remedies import advice
from headrace.planning.scenario import Scenario
from headrace.planning.workload import Workload
from measured_machines import computer

FLAT_UNTIL = 64
"""Tokens up to which a pass takes no longer on the machine below."""


def machine(*, read_bytes_per_s: float, flat_until: int = FLAT_UNTIL) -> Machine:
    points = tuple(CurvePoint(tokens, 1e-9) for tokens in sorted({1, flat_until}))
    return computer(
        [ComputeCurve(compute_dtype=name, stored_dtype="BF16", points=points) for name in ("bfloat16", "float32")],
        name="made up",
        memory_bytes=10**9,
        read_bytes_per_s=read_bytes_per_s,
        block_overhead_s=0.0,
        pass_overhead_s=0.0,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def case_of(
    model: Path,
    *,
    read_bytes_per_s: float,
    flat_until: int = FLAT_UNTIL,
    memory: str | None = None,
    dtype: str | None = STREAMED_DTYPE,
) -> PlanningCase:
    work = Workload(sequences=1, prompt_tokens=8, generate_tokens=8)
    memory = memory or f"{streaming_budget(model, prompt_tokens=8, new_tokens=8)}B"
    asked = Asked(memory=memory, workload=work, strategy=None, dtype=dtype, read_limit=None)
    made_up = machine(read_bytes_per_s=read_bytes_per_s, flat_until=flat_until)
    return from_description(model, asked, made_up, origin="a test")


def scenario_of(model: Path, **options: Any) -> Scenario:
    return case_of(model, **options).scenario


def fits(scenario: Scenario, *, sequences: int) -> bool:
    workload = replace(scenario.workload, sequences=sequences)
    return minimum_bytes(replace(scenario, workload=workload)) <= scenario.budget_bytes


def best_of(scenario: Scenario) -> Candidate:
    best = recommended(compare(scenario))
    assert best is not None
    return best


def test_break_even_is_where_arithmetic_takes_as_long_as_loading(model: Path) -> None:
    scenario = scenario_of(model, read_bytes_per_s=1e8)
    best = best_of(scenario)
    even = break_even_of(scenario, best)
    load_s = best.plan.streamed_bytes_per_pass / 1e8
    parameters = sum(block.active_parameters for block in scenario.model.blocks)
    assert even.tokens_per_pass == pytest.approx(FLAT_UNTIL * load_s / (parameters * 1e-9), rel=0.02)
    assert even.kv_cache_bytes == pytest.approx(even.tokens_per_pass * 16 * 2 * 3 * 32 * 2, rel=0.02)
    names = [way.name for way in even.ways]
    assert "prefill" in names
    assert "decode" not in names
    assert ("batch" in names) == fits(scenario, sequences=int(even.tokens_per_pass) + 1)
    assert "Break-even" in even.describe()


def test_speculation_reaches_a_low_break_even_and_a_slow_cpu_is_past_it(model: Path) -> None:
    slow = scenario_of(model, read_bytes_per_s=1e10)
    even = break_even_of(slow, best_of(slow))
    assert even.tokens_per_pass < 1
    assert even.ways[0].name == "decode"
    assert "past already" in even.describe()
    steep = scenario_of(model, read_bytes_per_s=2e8, flat_until=1)
    even = break_even_of(steep, best_of(steep))
    assert 2 < even.tokens_per_pass < 16
    assert "speculation" in [way.name for way in even.ways]
    high = scenario_of(model, read_bytes_per_s=1e8)
    assert "speculation" not in [way.name for way in break_even_of(high, best_of(high)).ways]


def test_nothing_streamed_has_no_break_even(model: Path) -> None:
    scenario = scenario_of(model, read_bytes_per_s=1e8, memory="1GB")
    best = best_of(scenario)
    assert best.plan.streamed_blocks == 0
    assert break_even_of(scenario, best)[:3] == (0.0, 1, 0)
    assert "every weight is in memory" in " ".join(advice(scenario, best))


def test_remedies_are_what_planning_again_gives(model: Path) -> None:
    scenario = scenario_of(model, read_bytes_per_s=1e8)
    best = best_of(scenario)
    said = " ".join(advice(scenario, best))
    assert "The disk binds" in said
    needed = int(said.split("--memory ")[1].split(")")[0])
    assert plan_fastest(replace(scenario, budget_bytes=needed)).plan.streamed_blocks == 0
    assert plan_fastest(replace(scenario, budget_bytes=needed - 1)).plan.strategy.value != "resident"
    slow = scenario_of(model, read_bytes_per_s=1e10)
    assert "The CPU binds" in " ".join(advice(slow, best_of(slow)))


def test_the_dtype_that_fits_is_taken_before_the_faster_one(model: Path) -> None:
    scenario = scenario_of(model, read_bytes_per_s=1e8, memory="100MB", dtype=None)
    assert scenario.compute_dtype == "bfloat16"  # equally fast: the stored one
    assert scenario_of(model, read_bytes_per_s=1e8, dtype="float32", memory="100MB").compute_dtype == "float32"


def test_what_a_machine_file_cannot_answer_is_refused(model: Path) -> None:
    with pytest.raises(MachineError, match="float16"):
        scenario_of(model, read_bytes_per_s=1e8, dtype="float16")
    work = Workload(sequences=1, prompt_tokens=9000, generate_tokens=1)
    asked = Asked(memory=None, workload=work, strategy=None, dtype=None, read_limit=None)
    with pytest.raises(InvalidRequestError, match="8192"):
        from_description(model, asked, machine(read_bytes_per_s=1e8), origin="a test")


def test_weights_left_on_the_disk_are_counted(model: Path) -> None:
    case = case_of(model, read_bytes_per_s=1e8)
    scenario = case.scenario
    report = plan_json(case, compare(scenario), best_of(scenario))
    overlap = next(item for item in report["strategies"] if item["name"] == "overlap")
    table = scenario.model.embedding.size_bytes
    assert overlap["memory_bytes"]["disk"] >= table
    assert overlap["memory_bytes"]["disk"] <= scenario.model.weights_bytes
    assert overlap["memory_bytes"]["host"] <= scenario.budget_bytes
