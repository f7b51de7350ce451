"""The chart in the terminal."""

from __future__ import annotations

from headrace.cli.pass_chart import HEIGHT, WIDTH, pass_chart
from headrace.planning.break_even import break_even_report
from headrace.planning.comparison import Question, compare, fastest
from headrace.planning.workload import Workload
from planning_examples import dense_model, server

LARGE = dense_model(name="large", layers=80, hidden=8192, heads=64, inner=28672)


def chart_of(question: Question) -> str:
    best = fastest(compare(question))
    assert best is not None
    return pass_chart(question, best, break_even_report(question))


def test_it_is_small_and_marks_break_even() -> None:
    text = chart_of(Question(model=LARGE, machine=server(devices=1), work=Workload(generate_tokens=100)))
    lines = text.splitlines()
    assert len(lines) == HEIGHT + 2
    assert max(len(line) for line in lines[1:]) <= WIDTH + 20
    assert "| break-even, 1" in lines[0]
    assert text.endswith("\n")


def test_a_resident_model_is_drawn_beside_its_streamed_self() -> None:
    text = chart_of(Question(model=LARGE, machine=server(devices=8), work=Workload(generate_tokens=100)))
    assert "# tensor" in text
    assert "o streamed from host" in text
    first = next(line for line in text.splitlines() if "o" * 20 in line)
    assert first.index("o" * 20) == 11, "flat from the first token on: more are free"
