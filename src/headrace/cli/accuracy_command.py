"""`headrace accuracy`: how far predictions were off, in the runs here or against published measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrace.accuracy.history import accuracy as accuracy_of
from headrace.accuracy.history import as_json as stages_json
from headrace.accuracy.history_file import VARIABLE, history_path, read_history
from headrace.cli.command import Command
from headrace.cli.options import JsonOption, existing_file
from headrace.cli.output import Output, table

EXAMPLES = ("headrace accuracy", "headrace accuracy --json", "headrace accuracy --published measurements.csv")


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
        from headrace.cli.published_report import report

        report(file, output)
        return
    records = read_history()
    found = accuracy_of(records)
    path = history_path()
    if as_json:
        output.json(
            {"runs": len(records), "history": None if path is None else str(path), "stages": stages_json(found)}
        )
        return
    if path is None:
        output.text(f"The history is off ({VARIABLE} is set to nothing).\n")
        return
    output.text(f"{len(records)} runs in {path}\n")
    if not found:
        output.text("`headrace run` adds one each time; then this shows predicted against measured.\n")
        return
    rows = [
        [
            item.stage,
            item.configuration,
            str(item.n),
            f"{item.median_abs_error:.1%}",
            f"{item.p90_abs_error:.1%}",
            f"{item.worst:.1%}",
        ]
        for item in found
    ]
    output.show(table(("stage", "configuration", "runs", "median error", "90th percentile", "worst"), rows))


ACCURACY = Command("accuracy", accuracy, EXAMPLES)
