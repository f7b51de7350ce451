"""Pictures of a plan: time against tokens per pass, cost against model size, latency against devices.

matplotlib draws them; it is an extra (`pip install 'headrace[plot]'`) and is imported when a picture is asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.errors import DependencyError, InvalidRequestError
from headrace.paths import user_path
from headrace.planning.curves import Points, against_devices, against_size, against_tokens
from headrace.planning.plan import CPU_DEVICE
from headrace.units import format_bytes, format_count, format_number, format_seconds

if TYPE_CHECKING:
    from headrace.planning.answer import PlanAnswer
    from headrace.planning.prediction import Prediction
    from headrace.planning.scenario import Scenario

_FORMATS = (".png", ".svg")
_COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5fb5", "#c98a1b", "#4d4d4d", "#17a2a2")


def check_plot_path(path: Path) -> None:
    """Raise before any work is done: another ending, a directory that is not there, matplotlib missing."""
    if path.suffix.lower() not in _FORMATS:
        raise InvalidRequestError(f"--plot {path}: a picture ends in {' or '.join(_FORMATS)}")
    if not user_path(path).absolute().parent.is_dir():
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
        f"{scenario.model.name} on {answer.machine_name}: {format_count(work.sequences)} x "
        f"({format_count(work.prompt_tokens)} + {format_count(work.generate_tokens)}) tokens"
    )
    _save(figure, path)


def _draw_measured(path: Path, answer: PlanAnswer) -> None:
    from headrace.errors import BudgetError
    from headrace.planning.planner import plan_fastest
    from headrace.planning.prediction import predict

    scenario, best = answer.scenario, answer.best
    assert best is not None
    figure, axes = _figure(2)
    counts = [2**power for power in range(15)]
    load_s = best.prediction.load_s_per_pass
    passes = [replace(best.plan, workload=replace(scenario.workload, sequences=count)) for count in counts]
    compute_s = [predict(plan, scenario.without_layer).compute_s_per_pass for plan in passes]
    left, right = axes
    left.plot(counts, compute_s, color=_COLOURS[2], label="computing alone", linestyle="--")
    if load_s:
        left.axhline(load_s, color=_COLOURS[4], linestyle="--", label="loading alone")
        left.plot(counts, [max(load_s, s) for s in compute_s], color=_COLOURS[0], label="overlapped", linewidth=2)
        left.plot(counts, [load_s + s for s in compute_s], color=_COLOURS[1], label="in turn")
        _mark_break_even(left, best.prediction.break_even_tokens_per_pass)
    _finish(left, x="tokens per pass", y="time per pass", title=_tokens_finding(answer))
    _logarithmic(left.xaxis, format_count)
    _logarithmic(left.yaxis, _time)
    budgets, seconds = [], []
    for step in range(1, 17):
        budget = round(scenario.budget_bytes * step / 8)
        try:
            seconds.append(plan_fastest(replace(scenario, budget_bytes=budget)).prediction.decode_s_per_pass)
        except BudgetError:
            continue
        budgets.append(budget)
    right.plot(budgets, seconds, color=_COLOURS[0], marker="o", markersize=3, label="fastest plan")
    right.axvline(scenario.budget_bytes, color=_COLOURS[5], linestyle=":", label="this budget")
    right.set_ylim(bottom=0)
    device = best.plan.device
    memory = "memory" if device == CPU_DEVICE else f"memory of {device}"
    _finish(right, x=memory, y="time per pass", title=_memory_finding(budgets, seconds, best.prediction))
    right.xaxis.set_major_formatter(lambda size_bytes, _: f"{format_number(size_bytes / 1e9)} GB")
    right.xaxis.set_major_locator(_matplotlib().ticker.MaxNLocator(7))
    right.yaxis.set_major_formatter(lambda value, _: _time(value) if value > 0 else "0")
    where = answer.machine_name if device == CPU_DEVICE else f"{device} of {answer.machine_name}"
    figure.suptitle(f"{scenario.model.name} in {format_bytes(scenario.budget_bytes)} on {where}")
    _save(figure, path)


def _memory_finding(budgets: Sequence[int], seconds: Sequence[float], now: Prediction) -> str:
    """What twice the memory would bring; the last budget drawn is twice that of the plan."""
    if not budgets or seconds[-1] > 0.97 * now.decode_s_per_pass:
        return "more memory would save nothing worth having"
    then, before = format_seconds(seconds[-1]), format_seconds(now.decode_s_per_pass)
    return f"{format_bytes(budgets[-1])} would make a pass {then}, not {before}"


def _tokens_panel(axis: Any, answer: PlanAnswer) -> None:
    for colour, (name, points) in zip(_COLOURS, against_tokens(answer.scenario).items(), strict=False):
        _line(axis, name, points, colour)
    report = answer.break_even
    if report is not None:
        _mark_break_even(axis, report.tokens_per_pass.expected)
    _finish(axis, x="tokens per pass", y="time per pass", title=_tokens_finding(answer))
    _logarithmic(axis.xaxis, format_count)
    _logarithmic(axis.yaxis, _time)


def _tokens_finding(answer: PlanAnswer) -> str:
    report, best = answer.break_even, answer.best
    if report is None:
        return "nothing is streamed: a pass takes as long as its arithmetic"
    tokens = report.tokens_per_pass.expected
    if not tokens < math.inf:
        return "no number of tokens outweighs loading"
    what = "more tokens are free" if best and best.plan.streamed_blocks else "streamed, more tokens are free"
    return f"{what} up to {format_count(tokens)} per pass"


def _size_panel(axis: Any, scenario: Scenario) -> None:
    points = against_size(scenario)
    _line(axis, "this model, scaled", points, _COLOURS[0], marker="o")
    own = [point for point in points if point[0] == scenario.model.parameters]
    if own:
        at = (own[0][0], own[0][1].expected)
        axis.plot(*at, marker="*", color=_COLOURS[1], markersize=12, linestyle="none", label=scenario.model.name)
    if not points:
        axis.text(0.5, 0.5, "no rent is known of these devices", ha="center", transform=axis.transAxes, fontsize=9)
    processor = scenario.described_machine.processor.name
    _finish(
        axis,
        x=f"parameters, on as many {processor} as hold them",
        y="dollars per 750 words",
        title=_size_finding(points, scenario.model.parameters),
    )
    if points:
        _logarithmic(axis.xaxis, format_number)
        axis.tick_params(axis="x", labelsize=8)
        _logarithmic(axis.yaxis, lambda usd: f"{format_number(usd)} $")


def _size_finding(points: Points, parameters: float) -> str:
    """How dollars grow from this size to ten times as much, or over the nearest such step that was found."""
    steps = [(x, y / x, second.expected / first.expected) for (x, first), (y, second) in itertools.pairwise(points)]
    tenfold = [(x, times) for x, larger, times in steps if 9 < larger < 11]
    if not tenfold:
        return "what it costs by size"
    _, times = min(tenfold, key=lambda step: abs(math.log(step[0] / parameters)))
    return f"a model 10 times as large costs {format_number(times)} times as much"


def _devices_panel(axis: Any, scenario: Scenario) -> None:
    curves = against_devices(scenario)
    for colour, (name, points) in zip(_COLOURS, curves.items(), strict=False):
        _line(axis, name, points, colour, marker="o")
    _finish(axis, x="devices", y="time per pass", title=_devices_finding(curves))
    if curves:
        counts = sorted({count for points in curves.values() for count, _ in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [format_count(count) for count in counts], minor=False)
        _logarithmic(axis.yaxis, _time)


def _devices_finding(curves: Mapping[str, Points]) -> str:
    """The most that devices gain over the fewest that do the work."""
    fastest: dict[float, float] = {}
    for count, seconds in itertools.chain.from_iterable(curves.values()):
        fastest[count] = min(seconds.expected, fastest.get(count, math.inf))
    if not fastest:
        return "no number of devices does it"
    fewest, best = min(fastest), min(fastest, key=lambda count: fastest[count])
    share = fastest[fewest] / fastest[best]
    if best == fewest or share < 1.1:
        return "more devices cut no latency"
    than = "" if fewest == 1 else f" of that of {format_count(fewest)}"
    return f"{format_count(best)} devices cut latency to 1/{format_number(float(f'{share:.2g}'))}{than}"


def _line(axis: Any, name: str, points: Points, colour: str, *, marker: str = "") -> None:
    """Draw a curve with its interval as a band."""
    xs = [x for x, _ in points]
    axis.plot(xs, [y.expected for _, y in points], color=colour, marker=marker, markersize=4, label=name)
    low, high = [y.low for _, y in points], [y.high for _, y in points]
    axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def _mark_break_even(axis: Any, tokens: float) -> None:
    """A line; its label stands at the top, where curves that are still flat do not come."""
    if tokens < math.inf:
        axis.axvline(tokens, color=_COLOURS[5], linestyle=":")
        axis.text(
            tokens, 0.98, f"break-even {format_count(tokens)} ", va="top", ha="right", fontsize=8,
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip


def _finish(axis: Any, *, x: str, y: str, title: str) -> None:
    """Name the axes, say the finding, and put the legend below, where it covers nothing."""
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=10)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def _logarithmic(axis: Any, written: Callable[[float], str]) -> None:
    """A logarithmic axis with plain numbers: powers of ten, or 1, 2 and 5 of each where those are few."""
    matplotlib = _matplotlib()
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    steps = (1.0, 2.0, 5.0) if decades < 2 else (1.0,)
    apart = max(1, round(decades / 6))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers if power % apart == 0 for step in steps]
    shown = [tick for tick in ticks if low <= tick <= high]
    axis.set_major_locator(matplotlib.ticker.FixedLocator(shown))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_major_formatter(lambda value, _: written(value))


def _time(seconds: float) -> str:
    return f"{format_number(seconds)} s" if seconds >= 1 else format_seconds(seconds)


def _figure(panels: int) -> tuple[Any, Sequence[Any]]:
    matplotlib = _matplotlib()
    figure = matplotlib.figure.Figure(figsize=(5.4 * panels, 5.0), layout="constrained", dpi=140)
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
            figure.savefig(user_path(path), format=kind, metadata=metadata)
    except OSError as error:
        raise InvalidRequestError(f"--plot {path} cannot be written: {error}") from error


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise DependencyError(
            f"--plot needs matplotlib, which is not installed ({error}); pip install 'headrace[plot]'"
        ) from error
    return matplotlib
