"""Predictions against published measurements: a table by family, written to bench/results.

    python bench/published.py [MEASUREMENTS.csv]

Without a file the 658 rows in tests/data are taken. Nothing is timed: the result depends on the code alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from headrace.accuracy.cross_validated import CrossValidated, cross_validated
from headrace.accuracy.published import read_rows
from headrace.accuracy.published_metrics import FamilyAccuracy, PredictedRow, accuracy_by_family, predict_row
from headrace.cli.accuracy_command import report_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def main() -> int:
    """Predict, write published.json and published.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", type=Path, nargs="?", default=ROOT / "tests/data/published_measurements.csv")
    arguments = parser.parse_args()
    rows = [predict_row(row) for row in read_rows(arguments.measurements)]
    judged = cross_validated(arguments.measurements)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    RESULTS.mkdir(exist_ok=True)
    whole = {"commit": commit.strip(), **report_json(rows, accuracy_by_family(rows), judged)}
    (RESULTS / "published.json").write_text(json.dumps(whole, indent=1) + "\n")
    (RESULTS / "published.md").write_text(markdown(rows, judged, commit.strip()))
    sys.stdout.write((RESULTS / "published.md").read_text())
    return 0


def markdown(rows: list[PredictedRow], judged: CrossValidated | None, commit: str) -> str:
    """Lay the errors out by family, fitted and with sources left out, and list what is not counted."""
    lines = [
        "# Predicted against published measurements",
        "",
        f"{len(rows)} rows, commit {commit}. Error: |predicted / measured - 1|. `python bench/published.py` makes it.",
        "Width: high over low of the interval, at the median.",
        "",
        *table("family", accuracy_by_family(rows)),
    ]
    if judged is not None:
        lines += [
            "",
            "## The same rows with their whole source left out of the fit",
            "",
            "Each document in turn: engines are fitted on the others and predict its rows (`bench/fit_engines.py`). An",
            "engine that no other document knows is predicted as `present`. Nothing is fitted for streaming: left out",
            "is how ZeRO-Inference is written, which is then read off the other sources.",
            "",
            *table("family", judged.families.values()),
            "",
            *table("resident, split and pipelined rows", judged.groups.values()),
        ]
    inside = [item.inside for item in rows if item.inside is not None]
    lines += ["", f"Inside their interval: {percent(sum(inside) / len(inside))} of {len(inside)} rows with one.", ""]
    reasons = Counter(item.excluded for item in rows if item.excluded is not None)
    lines += ["", "## Not counted among the errors", ""]
    lines += [f"- {count}: {reason}" for reason, count in reasons.most_common()]
    lines += ["", "## Farthest off", "", "| row | what | predicted (low - high) | measured |", "|---|---|--:|--:|"]
    worst = sorted((item for item in rows if item.error is not None), key=lambda item: -(item.error or 0))[:20]
    for item in worst:
        row, found = item.row, item.predicted
        if found is not None:
            lines.append(
                f"| {row.id} | {row.model}, {row.hardware.split(',')[0]}, {row.strategy}, {row.engine}, batch "
                f"{row.batch_text}, {row.metric} | {found.expected:.3g} ({found.low:.3g} - {found.high:.3g}) | "
                f"{row.value:g} {row.unit} |"
            )
    return "\n".join(lines) + "\n"


def table(name: str, items: Iterable[FamilyAccuracy]) -> list[str]:
    """Lay out as Markdown."""
    lines = [
        f"| {name} | rows | excluded | median error | 90th percentile | inside the interval | width |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for item in items:
        width = "" if item.interval_width is None else f"{item.interval_width:.2f}"
        lines.append(
            f"| {item.family} | {item.n} | {item.excluded} | {percent(item.median_abs_error)} | "
            f"{percent(item.p90_abs_error)} | {percent(item.inside_interval)} | {width} |"
        )
    return lines


def percent(share: float | None) -> str:
    """Share as text."""
    return "" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    sys.exit(main())
