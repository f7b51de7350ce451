"""`headrace claims`: what a widely read post of 2021 claimed about inference, recomputed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from headrace import __version__
from headrace.cli.command import Command
from headrace.cli.options import JsonOption, parse_count
from headrace.cli.output import Output
from headrace.cli.table import Table
from headrace.economics.claims.claims import Checked, check_claims
from headrace.errors import InvalidRequestError
from headrace.units import format_number

EXAMPLES = (
    "headrace claims",
    "headrace claims page-price --set api_usd_per_1k=0.02",
    "headrace claims copies-llama70b --set 'readers=1 billion' --json",
)


def claims(
    claim: Annotated[
        str | None, typer.Argument(metavar="[CLAIM]", help="One claim, with the sources of what it rests on.")
    ] = None,
    *,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Replace an assumption (any number of times); verdicts follow."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Recompute the argument: claims of a widely read post of 2021 on what large models cost to run.

    Each comes with its verdict, the arithmetic with its numbers filled in, and the assumptions that it rests on, every
    one of which can be replaced.
    """
    output = Output(as_json=as_json)
    checked = check_claims(claim, overrides=dict(_assignment(text) for text in assume or ()))
    if output.as_json:
        output.json({"claims": [_row(item) for item in checked], "headrace_version": __version__})
        return
    for number, item in enumerate(checked):
        _show(output, item, alone=claim is not None, first=number == 0)


def _assignment(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InvalidRequestError(f"--set {text!r}: write NAME=VALUE, such as api_usd_per_1k=0.02")
    return name.strip(), parse_count(value, option=f"--set {name.strip()}")


def _row(checked: Checked) -> dict[str, Any]:
    return {
        "name": checked.claim.name,
        "claim": checked.claim.says,
        "verdict": checked.outcome.verdict,
        "arithmetic": checked.outcome.arithmetic,
        "values": dict(checked.outcome.values),
        "assumptions": {
            name: {"value": item.value, "source": item.source} for name, item in checked.assumptions.items()
        },
    }


def _show(output: Output, checked: Checked, *, alone: bool, first: bool) -> None:
    if not first:
        output.show("")
    output.show(f"{checked.claim.name}: {checked.claim.says}", hanging=2)
    output.show(f"  {checked.outcome.verdict}", f"  {checked.outcome.arithmetic}")
    values = {name: format_number(item.value) for name, item in checked.assumptions.items()}
    if alone:
        rows = [(name, values[name], item.source) for name, item in checked.assumptions.items()]
        output.show("", Table(columns=("assumption", "value", "source"), rows=rows, words=("source",)))
    else:
        output.show("  rests on " + ", ".join(f"{name}={value}" for name, value in values.items()))


CLAIMS = Command("claims", claims, EXAMPLES)
