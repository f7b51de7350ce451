"""`headrace fleet`: what it takes to give N readers a copy of a model at r tokens per second."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from headrace.cli.command import Command
from headrace.cli.fleet_report import fleet_json, show_fleet
from headrace.cli.options import GenerateTokensOption, JsonOption, PromptTokensOption, parse_count
from headrace.cli.output import Output
from headrace.economics.fleet import FleetAsked, plan_fleet
from headrace.economics.installed_stock import installed_stock
from headrace.economics.owning import DEFAULT_TERMS, Terms
from headrace.economics.service import Promise
from headrace.errors import InvalidRequestError, near_names
from headrace.machine.catalogue import find_machine
from headrace.machine.quantity import Quantity
from headrace.model.catalogue import find_model
from headrace.model.formats import requantised
from headrace.planning.scenario import Scenario
from headrace.planning.workload import asked_workload

EXAMPLES = (
    "headrace fleet gpt-3 --machine 8xb200 --copies 8e9 --tokens-per-second 10",
    "headrace fleet gpt-3 --machine 8xh100 --copies 1e6 --tokens-per-second 10",
)
NO_PROMISE = "none"


def fleet(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A name from `headrace models` (gpt-3, gpt-3*1000), a config.json, a checkpoint."
        ),
    ],
    *,
    machine: Annotated[
        str,
        typer.Option(metavar="NAME|FILE", help="One machine of the fleet: a name from `headrace machines`, or a file."),
    ],
    copies: Annotated[
        str, typer.Option(metavar="N", help="Readers, each with a conversation of its own: 8e9, '8 billion', 250000.")
    ],
    tokens_per_second: Annotated[
        str,
        typer.Option("--tokens-per-second", metavar="R", help="Tokens that each copy writes per second, on average."),
    ],
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="RATE|none",
            help="Speed promised to each reader while text comes; without it as fast as R; none: offline work.",
        ),
    ] = None,
    max_first_token: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="The first token is promised within so long.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Sequences at once over the whole machine. Without it: the best."),
    ] = None,
    prompt_tokens: PromptTokensOption = None,
    generate_tokens: GenerateTokensOption = None,
    weights: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Weights in another format: fp16, fp8, int8, int4, ...")
    ] = None,
    training_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens it was trained on; without it 20 per parameter.")
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help=f"Replace a term of owning (any number of times): {', '.join(Terms.__dataclass_fields__)}.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Size a fleet: devices, share of the world's, power, dollars a year and per 750 words, against a human writer.

    The batch is the largest that keeps what is promised to each reader, fits and still pays.
    """
    output = Output(as_json=as_json)
    rate = parse_count(tokens_per_second, option="--tokens-per-second")
    found, place = find_model(model), find_machine(machine)
    if weights is not None:
        found = requantised(found, weights)
    asked = FleetAsked(
        scenario=Scenario.described(
            found,
            place,
            asked_workload(
                found.context_tokens,
                sequences=batch or 1,
                prompt_tokens=prompt_tokens,
                generate_tokens=generate_tokens,
            ),
        ),
        copies=parse_count(copies, option="--copies"),
        tokens_per_s=rate,
        promise=Promise(
            tokens_per_s=_promised(slo, rate),
            first_token_s=None if max_first_token is None else parse_count(max_first_token, option="--max-first-token"),
        ),
        sequences=batch,
        training_tokens=None if training_tokens is None else parse_count(training_tokens, option="--training-tokens"),
        terms=_terms(assume or []),
        stock=installed_stock(),
    )
    made = plan_fleet(asked)
    if output.as_json:
        output.json(fleet_json(asked, made))
    else:
        show_fleet(output, asked, made)


def _promised(slo: str | None, rate: float) -> float | None:
    if slo is None:
        return rate
    return None if slo.strip().lower() == NO_PROMISE else parse_count(slo, option="--slo")


def _terms(assignments: list[str]) -> Terms:
    changed: dict[str, Quantity] = {}
    known = Terms.__dataclass_fields__
    for text in assignments:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise InvalidRequestError(f"--set {text!r}: write NAME=VALUE, such as usd_per_kwh=0.12")
        if name not in known:
            raise InvalidRequestError(
                f"--set {name}: there is no such term; {near_names(name, known)}known: {', '.join(known)}"
            )
        changed[name] = Quantity.of(parse_count(value, option=f"--set {name}"), "set by you")
    return replace(DEFAULT_TERMS, **changed)


FLEET = Command("fleet", fleet, EXAMPLES)
