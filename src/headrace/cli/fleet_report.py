"""A fleet as text and as the one JSON object."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from headrace import __version__
from headrace.cli.output import Output, table, three_digits
from headrace.cli.plan_report import how
from headrace.economics.fleet import HUMAN_USD_PER_PAGE, Bill, Fleet, FleetAsked
from headrace.machine.quantity import Interval
from headrace.units import format_seconds


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
            "reader_tokens_per_s": _ends(service.reader_tokens_per_s),
            "first_token_s": _ends(service.interval.prefill_s),
            "tokens_per_s_per_device": _ends(service.tokens_per_s_per_device),
            "prompt_tokens_per_s_per_device": _ends(service.prompt_tokens_per_s_per_device),
        },
        "devices": _ends(made.devices),
        "copies_per_device": _ends(made.copies_per_device),
        "devices_per_copy_of_weights": made.devices_per_copy_of_weights,
        "private_devices": made.private_devices,
        "h100_equivalents": _ends(made.h100_equivalents),
        "stock": None
        if asked.stock is None
        else {
            "h100_equivalents": asked.stock.h100_equivalents.expected,
            "date": asked.stock.date,
            "source": asked.stock.h100_equivalents.source,
            "share": _ends(made.stock_share),
        },
        "power_w": {"devices": _ends(made.device_power_w), "site": _ends(made.site_power_w)},
        "joules_per_token": _ends(made.joules_per_token),
        "rented": _bill(made.rented),
        "owned": _bill(made.owned),
        "human_usd_per_750_words": {**_quantity(HUMAN_USD_PER_PAGE), "source": HUMAN_USD_PER_PAGE.source},
        "crossover": {
            "training_tokens": made.training_tokens,
            "tokens": made.crossover_tokens,
            "days": made.crossover_days,
            "tokens_per_day": made.tokens_per_day,
            "inference_share_of_peak": made.inference_share,
            "tokens_in_money": made.crossover_tokens_in_money,
        },
        "terms": {
            field.name: {
                **_quantity(getattr(asked.terms, field.name)),
                "source": getattr(asked.terms, field.name).source,
            }
            for field in dataclasses.fields(asked.terms)
        },
        "headrace_version": __version__,
    }


def _ends(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else _quantity(interval)


def _quantity(value: Any) -> dict[str, float]:
    return {"expected": value.expected, "low": value.low, "high": value.high}


def _bill(bill: Bill | str) -> dict[str, Any]:
    if isinstance(bill, str):
        return {"why_not": bill}
    return {field.name: _ends(getattr(bill, field.name)) for field in dataclasses.fields(bill)}


# -- for people ---------------------------------------------------------------------------------------------------


def show_fleet(output: Output, asked: FleetAsked, made: Fleet) -> None:
    """Print the sizes, the bills, and what they compare with."""
    service, machine = made.service, asked.scenario.described_machine
    plan, predicted = service.candidate
    output.text(
        f"{large(asked.copies)} {'copy' if asked.copies == 1 else 'copies'} of {asked.scenario.model.name} at "
        f"{asked.tokens_per_s:g} tokens/s each, on {machine.name}\n"
        f"{plan.strategy.value} ({how(plan)}), a batch of {service.sequences:,} on {counted(service.devices)}: "
        f"{three_digits(service.tokens_per_s_per_device.expected)} tokens/s per device, "
        f"{three_digits(service.reader_tokens_per_s.expected)} for each reader, first token after "
        f"{format_seconds(predicted.prefill_s)}; waits for {predicted.binds}\n"
    )
    rows = [
        ("devices", *_span(made.devices)),
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
    output.show(table(("", "expected", "low", "high"), rows))
    for name, bill in (("rented", made.rented), ("owned", made.owned)):
        if isinstance(bill, str):
            output.text(f"{name}: {bill}\n")
    output.text(f"One copy of the weights takes {counted(made.devices_per_copy_of_weights)}; ")
    output.text(f"if no two readers shared one, it would take {counted(made.private_devices)}.\n")
    if asked.stock is not None:
        output.text(
            f"Installed stock: {large(asked.stock.h100_equivalents.expected)} H100 equivalents, {asked.stock.date} "
            f"({asked.stock.h100_equivalents.source}).\n"
        )
    output.text(_human(made))
    output.text(
        f"Inference has taken as much arithmetic as training on {large(made.training_tokens)} tokens after "
        f"{large(made.crossover_tokens)} tokens: {_days(made.crossover_days)} at {large(made.tokens_per_day)} a day, "
        f"read and written. In device hours after {large(made.crossover_tokens_in_money)}, as it reaches "
        f"{made.inference_share:.2%} of the peak.\n"
    )


def _human(made: Fleet) -> str:
    bill = next((item for item in (made.rented, made.owned) if isinstance(item, Bill)), None)
    human = HUMAN_USD_PER_PAGE
    text = f"A human writer's 750 words: {human.expected:g} $ ({human.low:g} to {human.high:g})"
    if bill is None:
        return text + ".\n"
    times = bill.human_times_dearer
    return f"{text}, {large(times.expected)} times as much ({large(times.low)} to {large(times.high)}).\n"


def large(number: float) -> str:
    """Write a number for people, large ones with a word."""
    for word, factor in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if number >= factor:
            return f"{three_digits(number / factor)} {word}"
    if 0 < number < 1e-3:
        return f"{number:.{2 - math.floor(math.log10(number))}f}"
    return three_digits(number)


def counted(devices: float) -> str:
    """Write a number of devices."""
    return "1 device" if devices == 1 else f"{large(devices)} devices"


def _days(days: float) -> str:
    return f"{three_digits(days)} days" if days >= 1 else format_seconds(days * 86_400)


def _span(interval: Interval, *, factor: float = 1.0) -> tuple[str, str, str]:
    return large(interval.expected * factor), large(interval.low * factor), large(interval.high * factor)
