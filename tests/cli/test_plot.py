"""Pictures: real files with the right labels and the break-even where the report has it; sweeps that make sense."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from headrace.cli.main import main
from headrace.cli.plot import draw_plan
from headrace.errors import DependencyError, InvalidRequestError
from headrace.planning.answer import PlanAnswer
from headrace.planning.curves import against_devices, against_size, against_tokens
from headrace.planning.planner import compare
from headrace.planning.scenario import Scenario
from headrace.planning.splits import with_devices
from headrace.planning.workload import Workload
from planning_examples import dense_model, server

LARGE = dense_model(name="large", layers=80, hidden=8192, heads=64, inner=28672)
SCENARIO = Scenario.described(LARGE, server(nodes=1), Workload(sequences=8, generate_tokens=100, prompt_tokens=16))
ANSWER = PlanAnswer(scenario=SCENARIO, compared=compare(SCENARIO), machine_name="eight")


def test_a_vector_picture_names_its_axes_and_break_even(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    draw_plan(path, ANSWER)
    text = path.read_text()
    axes = ("tokens per pass", "time per pass", "dollars per 750 words", "parameters", "devices")
    for label in (*axes, "large on eight"):
        assert label in text
    report = ANSWER.break_even
    assert report is not None
    assert f"break-even {report.tokens_per_pass.expected:,.0f}" in text
    draw_plan(tmp_path / "again.svg", ANSWER)
    assert (tmp_path / "again.svg").read_bytes() == path.read_bytes(), "the same answer gives the same file"


def test_a_raster_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.png"
    assert main(["plan", "llama-3-8b", "--machine", "rtx-3090", "--plot", str(path)]) == 0
    capsys.readouterr()
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("name", "message"),
    [("plan.jpg", r"\.png or \.svg"), ("plan", r"\.png or \.svg"), ("none/plan.svg", "no directory")],
)
def test_a_picture_that_cannot_be_made_is_refused_before_any_work(
    tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        draw_plan(tmp_path / name, ANSWER)
    assert main(["plan", "llama-3-8b", "--machine", "rtx-3090", "--plot", str(tmp_path / name)]) == 2
    assert capsys.readouterr().out == ""


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.svg").mkdir()
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        draw_plan(tmp_path / "plan.svg", ANSWER)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"headrace\[plot\]"):
        draw_plan(tmp_path / "plan.svg", ANSWER)


def test_more_tokens_never_shorten_a_pass_and_are_free_below_break_even() -> None:
    report = ANSWER.break_even
    assert report is not None
    curves = against_tokens(SCENARIO)
    assert len(curves) == 3
    for curve in curves.values():
        seconds = [value.expected for _, value in curve]
        assert seconds == sorted(seconds)
    overlapped = curves["streamed from host, overlapped"]
    below = [value.expected for tokens, value in overlapped if tokens < report.tokens_per_pass.expected * 0.8]
    assert below[-1] == pytest.approx(below[0], rel=0.01)
    assert overlapped[-1][1].expected > 5 * below[0]


def test_larger_models_cost_more_and_need_more_devices() -> None:
    points = against_size(SCENARIO)
    assert len(points) >= 4
    dollars = [value.expected for _, value in points]
    assert dollars == sorted(dollars)


def test_devices_are_added_node_by_node() -> None:
    machine = server(devices=8)
    assert (with_devices(machine, 4) or machine).num_devices == 4
    assert (with_devices(machine, 64) or machine).nodes == 8
    assert with_devices(machine, 12) is None
    curves = {name: dict(points) for name, points in against_devices(SCENARIO).items()}
    assert {"pipeline", "tensor"} <= set(curves)
    assert curves["tensor"][8].expected < curves["tensor"][2].expected
    assert curves["pipeline"][8].expected > 0.9 * curves["pipeline"][2].expected
