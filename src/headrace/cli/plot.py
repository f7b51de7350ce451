"""Pictures of a plan: time against tokens per pass, cost against model size, latency against devices.

matplotlib draws them; it is an extra (`pip install 'headrace[plot]'`) and is imported when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.errors import DependencyError, InvalidRequestError
from headrace.planning.curves import Curve, against_devices, against_size, against_tokens
from headrace.units import format_bytes

if TYPE_CHECKING:
    from headrace.planning.answer import PlanAnswer
    from headrace.planning.scenario import Scenario

_FORMATS = (".png", ".svg")
_COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5fb5", "#c98a1b", "#4d4d4d", "#17a2a2")


def check_plot_path(path: Path) -> None:
    """Raise before any work is done: another ending, a directory that is not there, matplotlib missing."""
    if path.suffix.lower() not in _FORMATS:
        raise InvalidRequestError(f"--plot {path}: a picture ends in {' or '.join(_FORMATS)}")
    if not path.expanduser().absolute().parent.is_dir():
        raise InvalidRequestError(f"--plot {path}: there is no directory {path.parent}")
    _matplotlib()


def draw_plan(path: Path, answer: PlanAnswer) -> None:
    """Draw a measured machine's two panels (tokens per pass, memory), or a described one's three."""
    check_plot_path(path)
    scenario = answer.scenario
    if scenario.is_calibrated:
        _draw_measured(path, answer)
        return
    figure, axes = _figure(3)
    _tokens_panel(axes[0], answer)
    _size_panel(axes[1], scenario)
    _devices_panel(axes[2], scenario)
    work = scenario.workload
    figure.suptitle(
        f"{scenario.model.name} on {answer.machine_name}: {work.sequences} x ({work.prompt_tokens} + "
        f"{work.generate_tokens}) tokens"
    )
    _save(figure, path)


def _draw_measured(path: Path, answer: PlanAnswer) -> None:
    from headrace.errors import BudgetError
    from headrace.planning.planner import plan_fastest
    from headrace.planning.prediction import predict
    from headrace.planning.workload import Workload

    scenario, best = answer.scenario, answer.best
    assert best is not None
    figure, axes = _figure(2)
    model = scenario.model
    counts = [2**power for power in range(15)]
    load_s = best.prediction.load_s_per_pass
    passes = [replace(best.plan, workload=Workload(sequences=count)) for count in counts]
    compute_s = [predict(plan, scenario.without_layer).compute_s_per_pass for plan in passes]
    left = axes[0]
    left.loglog(counts, compute_s, color=_COLOURS[2], label="computing", linestyle="--")
    if load_s:
        left.axhline(load_s, color=_COLOURS[4], linestyle="--", label="loading")
        left.loglog(counts, [max(load_s, s) for s in compute_s], color=_COLOURS[0], label="overlapped", linewidth=2)
        left.loglog(counts, [load_s + s for s in compute_s], color=_COLOURS[1], label="in turn")
        _mark_break_even(left, best.prediction.break_even_tokens_per_pass)
    left.set_xlabel("tokens per pass")
    left.set_ylabel("seconds per pass")
    left.legend(fontsize=8)
    budgets, seconds = [], []
    for step in range(1, 13):
        budget = round(scenario.budget_bytes * step / 8)
        try:
            seconds.append(plan_fastest(replace(scenario, budget_bytes=budget)).prediction.decode_s_per_pass)
        except BudgetError:
            continue
        budgets.append(budget / 1e9)
    axes[1].plot(budgets, seconds, color=_COLOURS[0], marker="o", markersize=3)
    axes[1].axvline(scenario.budget_bytes / 1e9, color=_COLOURS[5], linestyle=":", label="this budget")
    device = best.plan.device
    axes[1].set_xlabel("memory, GB" if device == "cpu" else f"memory of {device}, GB")
    axes[1].set_ylabel("seconds per pass")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(fontsize=8)
    where = answer.machine_name if device == "cpu" else f"{device} of {answer.machine_name}"
    figure.suptitle(f"{model.name} in {format_bytes(scenario.budget_bytes)} on {where}")
    _save(figure, path)


def _tokens_panel(axis: Any, answer: PlanAnswer) -> None:
    for colour, curve in zip(_COLOURS, against_tokens(answer.scenario), strict=False):
        _line(axis, curve, colour)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("tokens per pass")
    axis.set_ylabel("seconds per pass")
    axis.set_title("more tokens are free up to break-even", fontsize=10)
    report = answer.break_even
    if report is not None:
        _mark_break_even(axis, report.tokens_per_pass.expected)
    axis.legend(fontsize=7)


def _size_panel(axis: Any, scenario: Scenario) -> None:
    curve = against_size(scenario)
    _line(axis, Curve(name="this model, scaled", points=curve.points), _COLOURS[0], marker="o")
    own = [point for point in curve.points if point[0] == scenario.model.parameters]
    if own:
        axis.plot([own[0][0]], [own[0][1].expected], marker="*", color=_COLOURS[1], markersize=12, linestyle="none")
        axis.annotate(scenario.model.name, (own[0][0], own[0][1].expected), fontsize=8, xytext=(6, -12),
                      textcoords="offset points")  # fmt: skip
    if not curve.points:
        axis.text(0.5, 0.5, "no rent is known of these devices", ha="center", transform=axis.transAxes, fontsize=9)
    else:
        axis.set_xscale("log")
        axis.set_yscale("log")
    axis.set_xlabel("parameters")
    axis.set_ylabel("dollars per 750 words")
    axis.set_title(f"on as many {scenario.described_machine.processor.name} as it takes", fontsize=10)


def _devices_panel(axis: Any, scenario: Scenario) -> None:
    curves = against_devices(scenario)
    for colour, curve in zip(_COLOURS, curves, strict=False):
        _line(axis, curve, colour, marker="o")
    if curves:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.legend(fontsize=7)
        counts = sorted({count for curve in curves for count, _ in curve.points})
        axis.set_xticks(counts, [f"{count:.0f}" for count in counts])
    axis.set_xlabel("devices")
    axis.set_ylabel("seconds per pass")
    axis.set_title("width cuts latency, stages do not", fontsize=10)


def _line(axis: Any, curve: Curve, colour: str, *, marker: str = "") -> None:
    """Draw a curve with its interval as a band."""
    xs = [x for x, _ in curve.points]
    axis.plot(xs, [y.expected for _, y in curve.points], color=colour, marker=marker, markersize=4, label=curve.name)
    axis.fill_between(
        xs, [y.low for _, y in curve.points], [y.high for _, y in curve.points], color=colour, alpha=0.15, linewidth=0
    )


def _mark_break_even(axis: Any, tokens: float) -> None:
    axis.axvline(tokens, color=_COLOURS[5], linestyle=":")
    axis.text(
        tokens, 0.02, f" break-even {tokens:,.0f}", rotation=90, va="bottom", ha="right", fontsize=8,
        transform=axis.get_xaxis_transform(),
    )  # fmt: skip


def _figure(panels: int) -> tuple[Any, Sequence[Any]]:
    matplotlib = _matplotlib()
    figure = matplotlib.figure.Figure(figsize=(5.2 * panels, 4.6), layout="constrained", dpi=140)
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for axis in axes:
        axis.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    matplotlib = _matplotlib()
    kind = path.suffix.lower().removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {}
    settings = {"svg.hashsalt": "headrace", "svg.fonttype": "none"}
    try:
        with matplotlib.rc_context(settings):
            figure.savefig(path.expanduser(), format=kind, metadata=metadata)
    except OSError as error:
        raise InvalidRequestError(f"--plot {path} cannot be written: {error}") from error


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise DependencyError(
            f"--plot needs matplotlib, which is not installed ({error}); pip install 'headrace[plot]'"
        ) from error
    return matplotlib
