"""`headrace plan` for a model known by its shape, on a machine known by its description: every strategy, priced."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from headrace import __version__
from headrace.cli.models_command import model_json
from headrace.cli.output import Output, table, three_digits
from headrace.machine.machine import Machine
from headrace.machine.quantity import Interval, Quantity
from headrace.model.model import Model
from headrace.planning.advice import remedies
from headrace.planning.break_even import BreakEvenReport, break_even_report
from headrace.planning.comparison import Answer, Compared, Question, Refusal, compare, fastest
from headrace.planning.price import Price, price
from headrace.planning.strategies import STRATEGIES
from headrace.planning.workload import Speculation, Workload
from headrace.units import format_bytes, format_rate, format_seconds


class MachineAsked(NamedTuple):
    """The options of `headrace plan` for a machine, read."""

    model: Model
    machine: Machine
    work: Workload
    memory_bytes: int | None
    host_memory_bytes: int | None
    strategy: str | None
    speculation: Speculation | None
    expert_hit_rate: float | None
    sampling: str | None
    plot: Path | None


def plan_for_machine(output: Output, asked: MachineAsked) -> None:
    """Compare the strategies and print the result, as text or as the one JSON object."""
    work, notes = asked.work, [*asked.model.notes, *asked.machine.notes]
    multiplier = 1.0
    if asked.sampling is not None:
        from headrace.economics.sampling_cost import sampled_work

        work, multiplier, why = sampled_work(asked.work, asked.sampling)
        notes.append(why)
    question = Question(
        model=asked.model,
        machine=asked.machine,
        work=work,
        device_memory_bytes=asked.memory_bytes,
        host_memory_bytes=asked.host_memory_bytes,
        speculation=asked.speculation,
        expert_hit_rate=asked.expert_hit_rate,
    )
    compared = compare(question, only=asked.strategy)
    best = fastest(compared)
    report = break_even_report(question)
    prices = {
        name: price(question.machine, item, work, token_multiplier=multiplier)
        for name, item in compared.items()
        if isinstance(item, Answer)
    }
    if asked.plot is not None:
        from headrace.cli.plot import draw_plan

        draw_plan(asked.plot, question)
    if output.as_json:
        output.json(machine_plan_json(question, compared, best, report, prices, notes))
    else:
        _show(output, question, compared, best, report, prices, notes)


# -- JSON ---------------------------------------------------------------------------------------------------------


def machine_plan_json(
    question: Question,
    compared: Compared,
    best: Answer | None,
    report: BreakEvenReport | None,
    prices: dict[str, Price],
    notes: list[str],
) -> dict[str, Any]:
    """Build the object that `headrace plan --json` prints."""
    return {
        "model": model_json(question.model),
        "machine": _machine(question),
        "workload": dict(question.work.__dict__),
        "strategies": [_strategy(name, item, prices.get(name)) for name, item in compared.items()],
        "recommended": None if best is None else best.strategy,
        "break_even": _break_even(report),
        "advice": remedies(question, best) if best is not None else [],
        "notes": notes,
        "headrace_version": __version__,
    }


def _machine(question: Question) -> dict[str, Any]:
    machine = question.machine
    return {
        "name": machine.name,
        "processor": machine.processor.name,
        "devices": machine.num_devices,
        "devices_per_node": machine.devices,
        "nodes": machine.nodes,
        "budget_bytes": round(question.device_bytes),
        "host_memory_bytes": round(question.host_bytes),
        "disk": None if machine.disk is None else _rate(machine.disk.bytes_per_s),
        "links": {link.name: {**_rate(link.bytes_per_s), "uplink": link.uplink} for link in machine.links.values()},
        "engine": {"name": question.engine.name},
    }


def _rate(bytes_per_s: Quantity) -> dict[str, Any]:
    return {
        "bytes_per_s": bytes_per_s.expected,
        "low_bytes_per_s": bytes_per_s.low,
        "high_bytes_per_s": bytes_per_s.high,
        "source": bytes_per_s.source,
    }


def _strategy(name: str, item: Answer | Refusal, cost: Price | None) -> dict[str, Any]:
    if isinstance(item, Refusal):
        times = dict.fromkeys(("prefill_s", "decode_s_per_pass", "tokens_per_s", "memory_bytes", "binds"))
        return {
            "name": name,
            "fits": False,
            **times,
            "usd_per_750_words": None,
            "usd_per_million_tokens": None,
            "low": {"prefill_s": None, "decode_s_per_pass": None},
            "high": {"prefill_s": None, "decode_s_per_pass": None},
            "why_not": item.why_not,
            "required_bytes": None if item.required_bytes is None else round(item.required_bytes),
        }
    arrangement = item.arrangement
    return {
        "name": name,
        "fits": True,
        "prefill_s": item.prefill_s.expected,
        "decode_s_per_pass": item.decode_s_per_pass.expected,
        "tokens_per_s": item.tokens_per_s.expected,
        "total_s": item.total_s.expected,
        "memory_bytes": item.memory.by_tier(),
        "binds": item.binds,
        "usd_per_750_words": None
        if cost is None or cost.usd_per_750_words is None
        else cost.usd_per_750_words.expected,
        "usd_per_million_tokens": (
            None if cost is None or cost.usd_per_million_tokens is None else cost.usd_per_million_tokens.expected
        ),
        "joules_per_token": None if cost is None or cost.joules_per_token is None else cost.joules_per_token.expected,
        "low": _ends(item, cost, "low"),
        "high": _ends(item, cost, "high"),
        "why_not": None,
        "decode_parts_s": item.decode.parts(),
        "prefill_parts_s": item.prefill.parts(),
        "kv_cache_bytes": round(item.memory.kv_cache_bytes),
        "devices": arrangement.devices,
        "tensor": arrangement.tensor,
        "pipeline": arrangement.pipeline,
        "micro_batches": arrangement.micro_batches,
        "replicas": arrangement.replicas,
        "resident_share": arrangement.resident_share,
        "host_share": arrangement.cpu_share,
        "slots": arrangement.slots,
        "weights_from": arrangement.source.value,
        "kv_cache_in": arrangement.kv_tier.value,
        "expert_hit_rate": arrangement.expert_hit_rate,
    }


def _expected(interval: Interval | None) -> float | None:
    return None if interval is None else interval.expected


def _ends(item: Answer, cost: Price | None, end: str) -> dict[str, float | None]:
    values: dict[str, float | None] = {
        name: getattr(getattr(item, name), end)
        for name in ("prefill_s", "decode_s_per_pass", "tokens_per_s", "total_s")
    }
    if cost is not None and cost.usd_per_million_tokens is not None:
        values["usd_per_million_tokens"] = getattr(cost.usd_per_million_tokens, end)
    return values


def _break_even(report: BreakEvenReport | None) -> dict[str, Any]:
    if report is None:
        return {"tokens_per_pass": None, "kv_cache_bytes": None, "reachable_by": [], "how": [], "why_not": []}
    return {
        "tokens_per_pass": report.tokens_per_pass.expected,
        "low": report.tokens_per_pass.low,
        "high": report.tokens_per_pass.high,
        "source": report.source.value,
        "kv_cache_bytes": round(report.kv_cache_bytes),
        "critical_batch": report.critical_batch,
        "reachable_by": [way.name for way in report.ways if way.reached],
        "how": [way.how for way in report.ways if way.reached],
        "why_not": [f"{way.name}: {way.how}" for way in report.ways if not way.reached],
    }


# -- for people ---------------------------------------------------------------------------------------------------


def _show(
    output: Output,
    question: Question,
    compared: Compared,
    best: Answer | None,
    report: BreakEvenReport | None,
    prices: dict[str, Price],
    notes: list[str],
) -> None:
    model, machine, work = question.model, question.machine, question.work
    active = f", {_count(model.active_parameters)} active" if model.active_parameters < 0.8 * model.parameters else ""
    output.text(
        f"{model.name}: {_count(model.parameters)} parameters{active}, {format_bytes(model.weights_bytes)} "
        f"of weights ({model.weight_format}) in {model.num_layers} layers, "
        f"{format_bytes(model.kv_bytes_per_token())} of KV cache per token\n"
        f"{machine.name}: {machine.num_devices} x {machine.processor.name}, "
        f"{format_bytes(machine.processor.memory_bytes)} each at "
        f"{format_rate(machine.processor.memory_bytes_per_s.expected)}; {work.sequences} x ({work.prompt_tokens} + "
        f"{work.generate_tokens}) tokens\n\n"
    )
    columns = ("strategy", "how", "first token", "per pass (low - high)", "tokens/s", "$/Mtok", "J/token", "waits for")
    rows = [_row(name, item, best, prices.get(name)) for name, item in compared.items() if isinstance(item, Answer)]
    if rows:
        output.show(table(columns, rows))
    for name, item in compared.items():
        if isinstance(item, Refusal):
            output.text(f"{name}: {item.why_not}.\n".replace("..", "."))
    if best is not None:
        output.text(f"\n{best.strategy} is the fastest: {STRATEGIES[best.strategy]}.\n")
        output.text(_memory_line(best))
        for sentence in remedies(question, best):
            output.text(f"{sentence}\n")
    if report is not None:
        output.text("\n" + _break_even_text(report))
    if best is not None:
        from headrace.cli.pass_chart import pass_chart

        output.text("\n" + pass_chart(question, best, report))
    for note in notes:
        output.text(f"note: {note}\n")


def _count(parameters: float) -> str:
    return f"{parameters / 1e12:.4g} trillion" if parameters >= 1e12 else f"{parameters / 1e9:.4g} billion"


def _row(name: str, item: Answer, best: Answer | None, cost: Price | None) -> list[str]:
    usd = (
        ""
        if cost is None or cost.usd_per_million_tokens is None
        else three_digits(cost.usd_per_million_tokens.expected)
    )
    joules = "" if cost is None or cost.joules_per_token is None else three_digits(cost.joules_per_token.expected)
    return [
        f"{name} *" if item is best else name,
        how(item),
        format_seconds(item.prefill_s.expected),
        _span(item.decode_s_per_pass),
        three_digits(item.tokens_per_s.expected),
        usd,
        joules,
        item.binds,
    ]


def how(item: Answer) -> str:
    """Say in few words how an arrangement divides the work."""
    arrangement = item.arrangement
    parts = []
    if arrangement.tensor > 1:
        parts.append(f"width {arrangement.tensor}")
    if arrangement.pipeline > 1:
        parts.append(f"{arrangement.pipeline} stages")
    if arrangement.micro_batches > 1:
        parts.append(f"{arrangement.micro_batches} micro-batches")
    if arrangement.replicas > 1:
        parts.append(f"{arrangement.replicas} {'devices' if arrangement.sharded else 'copies'}")
    if arrangement.cpu_share:
        parts.append(f"{arrangement.cpu_share:.0%} by the host")
    if arrangement.streamed_share > 1e-9:
        parts.append(f"{arrangement.streamed_share:.0%} from {arrangement.source.value}")
    if arrangement.expert_hit_rate is not None:
        parts.append(f"{arrangement.expert_hit_rate:.0%} of experts held")
    if arrangement.kv_tier.value != "device":
        parts.append("KV on the host")
    return ", ".join(parts) or "1 device"


def _span(interval: Interval) -> str:
    if interval.low == interval.high:
        return format_seconds(interval.expected)
    return f"{format_seconds(interval.expected)} ({format_seconds(interval.low)} - {format_seconds(interval.high)})"


def _memory_line(best: Answer) -> str:
    held = ", ".join(
        f"{format_bytes(size)} {'on each device' if tier == 'device' else 'on the ' + tier}"
        for tier, size in best.memory.by_tier().items()
        if size
    )
    return f"It holds {held} ({format_bytes(best.memory.kv_cache_bytes)} of it KV cache on each device).\n"


def _break_even_text(report: BreakEvenReport) -> str:
    tokens = report.tokens_per_pass
    lines = [
        f"Break-even when weights come from the {report.source.value}: {tokens.expected:,.0f} tokens per pass "
        f"({tokens.low:,.0f} - {tokens.high:,.0f}); from the device's own memory: {report.critical_batch:,.0f}."
    ]
    lines += [f"  {'+' if way.reached else '-'} {way.name}: {way.how}" for way in report.ways]
    if not report.reachable:
        lines.append("  It cannot be reached, for the reasons above.")
    return "\n".join(lines) + "\n"
