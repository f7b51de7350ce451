"""A fleet as text and as the one JSON object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from headrace import __version__
from headrace.cli.output import Output
from headrace.cli.plan_report import how
from headrace.cli.table import Table
from headrace.economics.fleet import HUMAN_USD_PER_PAGE, Bill, Fleet, FleetAsked
from headrace.machine.quantity import Interval
from headrace.units import format_count, format_number, format_seconds


def fleet_json(asked: FleetAsked, made: Fleet) -> dict[str, Any]:
    """Build the object that `headrace fleet --json` prints."""
    model, machine, service = asked.scenario.model, asked.scenario.described_machine, made.service
    return {
        "model": {"name": model.name, "parameters": model.parameters, "weights_bytes": round(model.weights_bytes)},
        "machine": {"name": machine.name, "processor": machine.processor.name, "devices": machine.num_devices},
        "asked": {
            "copies": asked.copies,
            "tokens_per_s": asked.tokens_per_s,
            "slo_tokens_per_s": asked.promise.tokens_per_s,
            "slo_first_token_s": asked.promise.first_token_s,
            "prompt_tokens": asked.scenario.workload.prompt_tokens,
            "generate_tokens": asked.scenario.workload.generate_tokens,
        },
        "service": {
            "strategy": service.candidate.plan.strategy.value,
            "how": how(service.candidate.plan),
            "binds": service.candidate.prediction.binds,
            "batch": service.sequences,
            "batch_devices": service.devices,
            **_intervals(service, "reader_tokens_per_s", "tokens_per_s_per_device", "prompt_tokens_per_s_per_device"),
            "first_token_s": _ends(service.interval.prefill_s),
        },
        **_intervals(made, "devices", "copies_per_device", "h100_equivalents", "joules_per_token"),
        "devices_per_copy_of_weights": made.devices_per_copy_of_weights,
        "private_devices": made.private_devices,
        "stock": None
        if asked.stock is None
        else {
            "h100_equivalents": asked.stock.h100_equivalents.expected,
            "date": asked.stock.date,
            "source": asked.stock.h100_equivalents.source,
            "share": _ends(made.stock_share),
        },
        "power_w": {"devices": _ends(made.device_power_w), "site": _ends(made.site_power_w)},
        "rented": _bill(made.rented),
        "owned": _bill(made.owned),
        "human_usd_per_750_words": asdict(HUMAN_USD_PER_PAGE),
        "crossover": {
            "training_tokens": made.training_tokens,
            "tokens": made.crossover_tokens,
            "days": made.crossover_days,
            "tokens_per_day": made.tokens_per_day,
            "inference_share_of_peak": made.inference_share,
            "tokens_in_money": made.crossover_tokens_in_money,
        },
        "terms": asdict(asked.terms),
        "headrace_version": __version__,
    }


def _ends(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else {"expected": interval.expected, "low": interval.low, "high": interval.high}


def _intervals(made: object, *names: str) -> dict[str, dict[str, float] | None]:
    return {name: _ends(getattr(made, name)) for name in names}


def _bill(bill: Bill | str) -> dict[str, Any]:
    return {"why_not": bill} if isinstance(bill, str) else _intervals(bill, *(field.name for field in fields(bill)))


# -- for people ---------------------------------------------------------------------------------------------------


def show_fleet(output: Output, asked: FleetAsked, made: Fleet) -> None:
    """Print the sizes, the bills, and what they compare with."""
    service, machine = made.service, asked.scenario.described_machine
    plan, predicted = service.candidate
    output.show(
        f"{format_count(asked.copies)} {'copy' if asked.copies == 1 else 'copies'} of {asked.scenario.model.name} at "
        f"{format_number(asked.tokens_per_s)} tokens/s each, on {machine.name}",
        f"{plan.strategy.value} ({how(plan)}), a batch of {format_count(service.sequences)} on "
        f"{counted(service.devices)}: {format_number(service.tokens_per_s_per_device.expected)} tokens/s per device, "
        f"{format_number(service.reader_tokens_per_s.expected)} for each reader, first token after "
        f"{format_seconds(predicted.prefill_s)}; waits for {predicted.binds}\n",
    )
    rows = [
        ("devices", *_span(made.devices, written=format_count)),
        ("H100 equivalents", *_span(made.h100_equivalents)),
        ("copies per device", *_span(made.copies_per_device)),
    ]
    if made.stock_share is not None:
        rows.append(("times the installed stock", *_span(made.stock_share)))
    for name, power in (("power of the devices", made.device_power_w), ("with hosts and cooling", made.site_power_w)):
        if power is not None:
            rows.append((f"{name}, MW", *_span(power, factor=1e-6)))
    if made.joules_per_token is not None:
        rows.append(("joules per token", *_span(made.joules_per_token)))
    for name, bill in (("rented", made.rented), ("owned", made.owned)):
        if isinstance(bill, Bill):
            rows.append((f"{name}, $ per year", *_span(bill.usd_per_year)))
            rows.append((f"{name}, $ per million tokens written", *_span(bill.usd_per_million_tokens)))
            rows.append((f"{name}, $ per million tokens read", *_span(bill.usd_per_million_prompt_tokens)))
            rows.append((f"{name}, $ per 750 words", *_span(bill.usd_per_750_words)))
    output.show(Table(columns=("", "expected", "low", "high"), rows=rows), "")
    for name, bill in (("rented", made.rented), ("owned", made.owned)):
        if isinstance(bill, str):
            output.show(f"{name}: {bill}")
    output.show(
        f"One copy of the weights takes {counted(made.devices_per_copy_of_weights)}; if no two readers shared one, it "
        f"would take {counted(made.private_devices)}."
    )
    if asked.stock is not None:
        output.show(
            f"Installed stock: {format_number(asked.stock.h100_equivalents.expected)} H100 equivalents, "
            f"{asked.stock.date} ({asked.stock.h100_equivalents.source})."
        )
    output.show(
        _human(made),
        f"Inference has taken as much arithmetic as training on {format_number(made.training_tokens)} tokens after "
        f"{format_number(made.crossover_tokens)} tokens: {_days(made.crossover_days)} at "
        f"{format_number(made.tokens_per_day)} a day, read and written. In device hours after "
        f"{format_number(made.crossover_tokens_in_money)}, as it reaches {format_number(100 * made.inference_share)} % "
        "of the peak.",
    )


def _human(made: Fleet) -> str:
    bill = next((item for item in (made.rented, made.owned) if isinstance(item, Bill)), None)
    human = HUMAN_USD_PER_PAGE
    text = (
        f"A human writer's 750 words: {format_number(human.expected)} $ ({format_number(human.low)} to "
        f"{format_number(human.high)})"
    )
    if bill is None:
        return f"{text}."
    times = bill.human_times_dearer
    low, high = format_number(times.low), format_number(times.high)
    return f"{text}, {format_number(times.expected)} times as much ({low} to {high})."


def counted(devices: float) -> str:
    """Write a number of devices."""
    return "1 device" if devices == 1 else f"{format_count(devices)} devices"


def _days(days: float) -> str:
    return f"{format_number(days)} days" if days >= 1 else format_seconds(days * 86_400)


def _span(
    interval: Interval, *, factor: float = 1.0, written: Callable[[float], str] = format_number
) -> tuple[str, str, str]:
    return written(interval.expected * factor), written(interval.low * factor), written(interval.high * factor)
