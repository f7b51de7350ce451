"""The chart in the terminal."""

from __future__ import annotations

from headrace.cli.pass_chart import HEIGHT, WIDTH, pass_chart
from headrace.planning.answer import PlanAnswer
from headrace.planning.planner import compare
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from headrace.planning.workload import Workload
from planning_examples import dense_model, server

LARGE = dense_model(name="large", layers=80, hidden=8192, heads=64, inner=28672)


def answer_on(*, devices: int, only: Strategy | None = None) -> PlanAnswer:
    scenario = Scenario.described(LARGE, server(devices=devices), Workload(generate_tokens=100, prompt_tokens=16))
    return PlanAnswer(scenario=scenario, compared=compare(scenario, only))


def test_it_is_small_and_marks_break_even() -> None:
    answer = answer_on(devices=1, only=Strategy.OVERLAP)
    assert answer.break_even is not None
    text = pass_chart(answer)
    lines = text.splitlines()
    assert len(lines) == HEIGHT + 2
    assert max(len(line) for line in lines[1:]) <= WIDTH + 20
    assert f"| break-even, {answer.break_even.tokens_per_pass.expected:,.0f} tokens" in lines[0]
    assert text.endswith("\n")


def test_a_resident_model_is_drawn_beside_its_streamed_self() -> None:
    text = pass_chart(answer_on(devices=8))
    assert "# tensor" in text
    assert "o streamed from host" in text
    first = next(line for line in text.splitlines() if "o" * 20 in line)
    assert first.index("o" * 20) == 11, "flat from the first token on: more are free"
