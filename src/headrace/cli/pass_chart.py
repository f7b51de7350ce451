"""A text chart for the terminal: seconds per pass against tokens per pass, both on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Callable

from headrace.cli.table import wrapped
from headrace.planning.answer import PlanAnswer
from headrace.planning.closed_form import ClosedForm
from headrace.planning.plan import Arrangement, Placement, arranged
from headrace.planning.scenario import Scenario
from headrace.units import format_count, format_seconds

WIDTH, HEIGHT = 64, 10
_LABEL_COLUMNS = 11
_LEAST_TOKENS, _MOST_TOKENS = 1.0, 2.0**17


def pass_chart(answer: PlanAnswer, *, width: int = 80) -> str:
    """Draw what a pass takes when it carries more tokens: as recommended, and streamed where there is a source.

    A flat line means that further tokens are free. `|` marks break-even. Lines end with a newline.
    """
    columns = min(WIDTH, width - _LABEL_COLUMNS)
    scenario, best, report = answer.scenario, answer.best, answer.break_even
    assert best is not None
    curves: dict[str, Callable[[float], float]] = {"#": _seconds(scenario, best.plan.arrangement)}
    labels = [f"# {best.plan.strategy.value}"]
    if report is not None and not best.plan.streamed_blocks:
        source = Placement(report.source.value)
        curves["o"] = _seconds(scenario, arranged(scenario.model.num_layers, resident=0, source=source))
        labels.append(f"o streamed from {source.value}")
    tokens = [_LEAST_TOKENS * (_MOST_TOKENS / _LEAST_TOKENS) ** (column / (columns - 1)) for column in range(columns)]
    values = {mark: [curve(count) for count in tokens] for mark, curve in curves.items()}
    least = min(min(series) for series in values.values())
    most = max(max(series) for series in values.values()) * 1.0001
    grid = [[" "] * columns for _ in range(HEIGHT)]
    if report is not None and _LEAST_TOKENS < report.tokens_per_pass.expected < _MOST_TOKENS:
        column = round(math.log(report.tokens_per_pass.expected) / math.log(_MOST_TOKENS) * (columns - 1))
        for line in grid:
            line[column] = "|"
        labels.append(f"| break-even, {format_count(report.tokens_per_pass.expected)} tokens")
    span = math.log(most / least) or 1.0
    for mark, series in reversed(values.items()):
        for column, seconds in enumerate(series):
            row = round((1 - math.log(seconds / least) / span) * (HEIGHT - 1))
            grid[row][column] = mark
    lines = [wrapped("seconds per pass against tokens per pass: " + ", ".join(labels), width, hanging=2)]
    for number, line in enumerate(grid):
        at = least * math.exp(span * (1 - number / (HEIGHT - 1)))
        label = format_seconds(at) if number % 3 == 0 else ""
        lines.append(f"{label:>10s} {''.join(line).rstrip()}")
    ticks = [" "] * (columns + 8)
    for power in range(0, 18, 3):
        column = round(power / math.log2(_MOST_TOKENS) * (columns - 1))
        for offset, letter in enumerate(format_count(2**power)):
            ticks[column + offset] = letter
    lines.append(" " * _LABEL_COLUMNS + "".join(ticks).rstrip())
    return "\n".join(lines) + "\n"


def _seconds(scenario: Scenario, arrangement: Arrangement) -> Callable[[float], float]:
    """Return the time of a pass over so many tokens, each with this work's context before it."""
    form = ClosedForm.of(scenario, arrangement)
    return lambda tokens: form.tokens_s(tokens, scenario.workload)
