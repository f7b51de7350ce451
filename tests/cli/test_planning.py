"""The planning commands' own arithmetic: break-even, its ways, and what would help; by a described machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cli_checkpoints import STREAMED_DTYPE, streaming_budget, write_model
from headrace.cli.output import Output
from headrace.cli.plan_report import show_plan
from headrace.errors import InvalidRequestError, MachineError
from headrace.inference.plan_api import plan_answer
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.machine.machine import Machine
from headrace.planning.answer import PlanAnswer
from headrace.planning.answer_json import answer_json
from headrace.planning.break_even import BreakEven
from headrace.planning.infeasible import minimum_bytes
from headrace.planning.planner import plan_fastest
from headrace.planning.prediction import Candidate
from headrace.planning.scenario import Scenario
from headrace.planning.scenarios import PlanRequest
from headrace.units import parse_size
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


def answer_of(
    model: Path,
    *,
    read_bytes_per_s: float,
    flat_until: int = FLAT_UNTIL,
    memory: str | None = None,
    dtype: str = STREAMED_DTYPE,
    prompt_tokens: int = 8,
) -> PlanAnswer:
    request = PlanRequest(
        memory=memory or f"{streaming_budget(model, prompt_tokens=8, new_tokens=8)}B",
        prompt_tokens=prompt_tokens,
        generate_tokens=8,
        dtype=dtype,
    )
    made_up = machine(read_bytes_per_s=read_bytes_per_s, flat_until=flat_until)
    return plan_answer(model, machine=made_up, request=request)


def fits(scenario: Scenario, *, sequences: int) -> bool:
    workload = replace(scenario.workload, sequences=sequences)
    return minimum_bytes(replace(scenario, workload=workload)) <= scenario.budget_bytes


def best_of(answer: PlanAnswer) -> Candidate:
    assert answer.best is not None
    return answer.best


def break_even_of(answer: PlanAnswer) -> BreakEven:
    assert answer.break_even is not None
    return answer.break_even


def reached(even: BreakEven) -> list[str]:
    return [way.name for way in even.ways if way.reached]


def said(answer: PlanAnswer, capsys: pytest.CaptureFixture[str]) -> str:
    """The whole report for people, its lines joined."""
    show_plan(Output(as_json=False), answer)
    return " ".join(capsys.readouterr().out.split())


def test_break_even_is_where_arithmetic_takes_as_long_as_loading(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = answer_of(model, read_bytes_per_s=1e8)
    scenario, best, even = answer.scenario, best_of(answer), break_even_of(answer)
    load_s = best.plan.streamed_bytes_per_pass / 1e8
    parameters = sum(block.active_parameters for block in scenario.model.blocks)
    tokens = even.tokens_per_pass.expected
    assert tokens == pytest.approx(FLAT_UNTIL * load_s / (parameters * 1e-9), rel=0.02)
    assert even.kv_cache_bytes == pytest.approx(tokens * 16 * 2 * 3 * 32 * 2, rel=0.02)
    assert "prefill" in reached(even)
    assert "decode" not in reached(even)
    assert ("batch" in reached(even)) == fits(scenario, sequences=int(tokens) + 1)
    assert f"Break-even when weights come from the disk: {tokens:,.0f} tokens per pass" in said(answer, capsys)


def test_speculation_reaches_a_low_break_even_and_a_slow_cpu_is_past_it(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = answer_of(model, read_bytes_per_s=1e10)
    even = break_even_of(slow)
    assert even.tokens_per_pass.expected < 1
    assert even.ways[0].name == "decode"
    assert even.ways[0].reached
    assert "This work is past it" in said(slow, capsys)
    steep = answer_of(model, read_bytes_per_s=2e8, flat_until=1)
    even = break_even_of(steep)
    assert 2 < even.tokens_per_pass.expected < 16
    assert "speculation" in reached(even)
    assert "speculation" not in reached(break_even_of(answer_of(model, read_bytes_per_s=1e8)))


def test_nothing_streamed_has_no_break_even(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = answer_of(model, read_bytes_per_s=1e8, memory="1GB")
    assert best_of(answer).plan.streamed_blocks == 0
    assert answer.break_even is None
    made = answer_json(answer, version="1")
    assert made["break_even"]["tokens_per_pass"] == 0.0
    assert made["break_even"]["kv_cache_bytes"] == 0
    assert made["break_even"]["reachable_by"] == []
    assert "every weight is in memory" in " ".join(answer.advice)
    assert "Nothing is streamed, so there is no break-even" in said(answer, capsys)


def test_advice_is_what_planning_again_gives(model: Path) -> None:
    answer = answer_of(model, read_bytes_per_s=1e8)
    text = " ".join(answer.advice)
    assert "The disk binds" in text
    needed = parse_size(text.split("--memory ")[1].split(")")[0])
    assert plan_fastest(replace(answer.scenario, budget_bytes=needed)).plan.streamed_blocks == 0
    assert plan_fastest(replace(answer.scenario, budget_bytes=needed - 10**6)).plan.strategy.value != "resident"
    assert "The CPU binds" in " ".join(answer_of(model, read_bytes_per_s=1e10).advice)


def test_the_dtype_that_fits_is_taken_before_the_faster_one(model: Path) -> None:
    equally_fast = answer_of(model, read_bytes_per_s=1e8, memory="100MB", dtype="auto")
    assert equally_fast.scenario.compute_dtype == "bfloat16"  # the stored one
    asked = answer_of(model, read_bytes_per_s=1e8, dtype="float32", memory="100MB")
    assert asked.scenario.compute_dtype == "float32"


def test_what_a_machine_file_cannot_answer_is_refused(model: Path) -> None:
    with pytest.raises(MachineError, match="float16"):
        answer_of(model, read_bytes_per_s=1e8, dtype="float16")
    with pytest.raises(InvalidRequestError, match="8192"):
        answer_of(model, read_bytes_per_s=1e8, prompt_tokens=9000)


def test_weights_left_on_the_disk_are_counted(model: Path) -> None:
    answer = answer_of(model, read_bytes_per_s=1e8)
    report = answer_json(answer, version="1")
    overlap = next(item for item in report["strategies"] if item["name"] == "overlap")
    table = answer.scenario.model.embedding_bytes
    assert overlap["memory_bytes"]["disk"] >= table
    assert overlap["memory_bytes"]["disk"] <= answer.scenario.model.weights_bytes
    assert 0 < overlap["memory_bytes"]["host"] <= answer.scenario.budget_bytes
    assert overlap["memory_bytes"]["device"] == 0, "a CPU's own memory is the host's"
