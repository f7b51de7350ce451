"""`headrace accuracy`: how far predictions were off, in the runs here or against published measurements."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.accuracy.history import accuracy as accuracy_of
from headrace.accuracy.history_file import VARIABLE, history_path, read_history
from headrace.cli.command import Command
from headrace.cli.options import JsonOption, existing_file
from headrace.cli.output import Output
from headrace.cli.table import Table
from headrace.units import format_number

if TYPE_CHECKING:
    from headrace.accuracy.cross_validated import CrossValidated
    from headrace.accuracy.published_metrics import FamilyAccuracy, PredictedRow

EXAMPLES = ("headrace accuracy", "headrace accuracy --json", "headrace accuracy --published measurements.csv")
_ERRORS = ("median_abs_error", "p90_abs_error", "inside_interval")
_WORST = 12
"""rows that are shown"""


def accuracy(
    *,
    published: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A table of published measurements (CSV): errors by family instead."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how far predictions were off: by stage and configuration over the runs here, or against a table."""
    output = Output(as_json=as_json)
    file = existing_file(published, option="--published")
    if file is not None:
        _show_published(file, output)
        return
    records = read_history()
    found = accuracy_of(records)
    path = history_path()
    if as_json:
        history = None if path is None else str(path)
        output.json({"runs": len(records), "history": history, "stages": list(map(asdict, found))})
        return
    if path is None:
        output.show(f"The history is off ({VARIABLE} is set to nothing).")
        return
    output.show(f"{len(records)} runs in {path}")
    if not found:
        output.show("`headrace run` adds one each time; then this shows predicted against measured.")
        return
    rows = [
        [
            item.stage,
            item.configuration,
            str(item.n),
            *map(_percent, (item.median_abs_error, item.p90_abs_error, item.worst)),
        ]
        for item in found
    ]
    columns = ("stage", "configuration", "runs", "median error", "90th percentile", "worst")
    output.show(Table(columns=columns, rows=rows, words=("configuration",), least=("worst",)))


def _show_published(path: Path, output: Output) -> None:
    """Predict every row of the file and print the errors, as a table or as the one JSON object."""
    # These take a while to import, which other commands need not wait for.
    from headrace.accuracy.cross_validated import cross_validated
    from headrace.accuracy.published import read_rows
    from headrace.accuracy.published_metrics import accuracy_by_family, predict_row

    rows = [predict_row(row) for row in read_rows(path)]
    families = accuracy_by_family(rows)
    judged = cross_validated(path)
    if output.as_json:
        output.json(report_json(rows, families, judged))
    else:
        _show(output, rows, families, judged)


def report_json(
    rows: list[PredictedRow], families: list[FamilyAccuracy], judged: CrossValidated | None
) -> dict[str, Any]:
    """Build the object that the contract names; `cross_validated` is null for rows other than the shipped ones."""
    return {
        "families": [
            _figures(item, "family", "n", "excluded", *_ERRORS)
            | {
                "cross_validated": None
                if judged is None
                else _figures(judged.families[item.family], *_ERRORS, "interval_width")
            }
            for item in families
        ],
        "inside_interval": _inside(rows),
        "rows": [
            {
                "id": item.row.id,
                "family": item.family,
                "predicted": getattr(item.predicted, "expected", None),
                "low": getattr(item.predicted, "low", None),
                "high": getattr(item.predicted, "high", None),
                "measured": item.row.value,
                "unit": item.row.unit,
                "excluded": item.excluded,
            }
            for item in rows
        ],
    }


def _figures(item: FamilyAccuracy, *names: str) -> dict[str, Any]:
    return {name: getattr(item, name) for name in names}


def _percents(item: FamilyAccuracy) -> list[str]:
    return [_percent(share) for share in _figures(item, *_ERRORS).values()]


def _inside(rows: list[PredictedRow]) -> float | None:
    known = [item.inside for item in rows if item.inside is not None]
    return sum(known) / len(known) if known else None


def _show(
    output: Output, rows: list[PredictedRow], families: list[FamilyAccuracy], judged: CrossValidated | None
) -> None:
    output.show(f"{len(rows)} published measurements; errors are |predicted / measured - 1|\n")
    output.show(
        Table(
            columns=("family", "rows", "excluded", "median error", "90th percentile", "inside the interval"),
            rows=[
                [item.family, str(item.n), str(item.excluded), *_percents(item)]
                for item in families
                if item.n or item.excluded
            ],
        )
    )
    if judged is not None:
        output.show("\nThe same rows, each predicted by engines that were fitted without its whole source:\n")
        output.show(
            Table(
                columns=("family", "median error", "90th percentile", "inside the interval"),
                rows=[[item.family, *_percents(item)] for item in judged.families.values()],
            )
        )
    inside = _inside(rows)
    if inside is not None:
        output.show(f"\n{_percent(inside)} of all rows that are predicted lie inside their interval.")
    reasons = Counter(item.excluded for item in rows if item.excluded is not None)
    if reasons:
        output.show("\nNot counted among the errors:")
        for reason, count in reasons.most_common():
            output.show(f"  {count:4d}  {reason}", hanging=6)
    worst = sorted((item for item in rows if item.error is not None), key=lambda item: -(item.error or 0.0))[:_WORST]
    if worst:
        columns = ("row", "what", "predicted", "low - high", "measured", "")
        rows_of_worst = [_row(item) for item in worst]
        output.show(
            "\nFarthest off:", Table(columns=columns, rows=rows_of_worst, words=("what", ""), least=("low - high",))
        )


def _row(item: PredictedRow) -> list[str]:
    row, predicted = item.row, item.predicted
    if predicted is None:
        raise ValueError(f"{row.id} has no prediction")
    what = f"{row.model}, {row.hardware.split(',')[0][:28]}, {row.strategy}, batch {row.batch_text}"
    span = f"{format_number(predicted.low)} - {format_number(predicted.high)}"
    return [row.id, what, format_number(predicted.expected), span, format_number(row.value), row.unit]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


ACCURACY = Command("accuracy", accuracy, EXAMPLES)
