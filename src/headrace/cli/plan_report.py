"""The answer of `headrace plan` for people: every strategy, break-even, advice, a pass in pictures."""

from __future__ import annotations

from headrace.cli.output import Output
from headrace.cli.pass_chart import pass_chart
from headrace.cli.table import Table
from headrace.errors import BudgetError
from headrace.machine.quantity import Interval
from headrace.planning.answer import PlanAnswer
from headrace.planning.break_even import BreakEven
from headrace.planning.plan import Placement, Plan
from headrace.planning.prediction import Candidate, is_simulated, timeline_of
from headrace.planning.strategies import Strategy
from headrace.planning.timeline import CHART_WIDTH, text_chart
from headrace.units import format_bytes, format_count, format_number, format_range, format_rate, format_seconds

COLUMNS = ("strategy", "how", "per pass", "low - high", "first token", "tokens/s", "$ per 750 words", "waits for")
_BINDS = {
    "both": "loading and computing, in turn",
    "compute": "the arithmetic",
    "cpu": "the CPU",
    "disk": "the disk",
    "link": "the link",
}
LEAST = ("low - high", "how", "tokens/s", "first token")


def show_plan(output: Output, answer: PlanAnswer) -> None:
    """Print the comparison for people."""
    best = answer.best
    output.show(finding(answer), "", _model_line(answer), _machine_line(answer), "", hanging=2)
    rows = [_row(answer, name, item) for name, item in answer.candidates.items()]
    if rows:
        told = [number for number, _ in enumerate(COLUMNS) if any(row[number] for row in rows)]
        columns = [COLUMNS[number] for number in told]
        output.show(
            Table(
                columns=columns,
                rows=[[row[number] for number in told] for row in rows],
                words=("how", "waits for"),
                least=[name for name in LEAST if name in columns],
            ),
            "",
        )
    refused = [f"{', '.join(name.value for name in names)}: {short}" for names, short in _refusals(answer)]
    output.show(*refused, hanging=2)
    if best is not None:
        name = best.plan.strategy
        output.show("", f"{name.value} is recommended ({how(best.plan)}): {name.description}.", hanging=2)
        output.show(_memory_line(best.plan), *answer.advice, hanging=2)
    output.show("", *_break_even_lines(answer.break_even), hanging=2)
    if best is not None:
        if not is_simulated(best.plan, answer.scenario):
            output.text("\n" + pass_chart(answer, width=output.width))
        chart = text_chart(timeline_of(best, answer.scenario), pass_index=3, width=min(CHART_WIDTH, output.width - 10))
        if chart:
            output.text(f"\none pass of {best.plan.strategy.value}, as predicted:\n{chart}\n")
    output.show(*(f"note: {note}" for note in answer.notes), hanging=2)


def finding(answer: PlanAnswer) -> str:
    """The answer in one sentence: what is fastest, how fast, what it costs, what it waits for."""
    best, work = answer.best, answer.scenario.workload
    if best is None:
        return f"Nothing fits: {answer.scenario.model.name} on {answer.machine_name}."
    name, devices = best.plan.strategy, best.plan.parallelism.devices
    where = f" over {devices} devices" if devices > 1 else " on the CPU" if answer.scenario.on_cpu else ""
    interval, cost = answer.intervals[name].decode_s_per_pass, answer.prices.get(name)
    usd = None if cost is None else cost.usd_per_750_words
    carried = "token" if work.sequences == 1 else f"pass of {format_count(work.sequences)} tokens"
    span = "" if interval.low == interval.high else f" ({_ends(interval)})"
    price = "" if usd is None else f", {format_number(usd.expected)} $ per 750 words"
    return (
        f"{name.value}{where}: {format_seconds(interval.expected)} per {carried}{span}{price}; "
        f"waits for {_BINDS.get(best.prediction.binds, best.prediction.binds)}"
    )


def _model_line(answer: PlanAnswer) -> str:
    model, work = answer.scenario.model, answer.scenario.workload
    few = model.active_parameters < 0.8 * model.parameters
    active = f", {format_number(model.active_parameters)} active" if few else ""
    dtype = f", computed in {answer.scenario.compute_dtype}" if answer.scenario.is_calibrated else ""
    return (
        f"{model.name}: {format_number(model.parameters)} parameters{active}, {format_bytes(model.weights_bytes)} of "
        f"weights ({model.weight_format}) in {model.num_layers} layers, {format_bytes(model.kv_bytes_per_token())} of "
        f"KV cache per token; {format_count(work.sequences)} x ({format_count(work.prompt_tokens)} + "
        f"{format_count(work.generate_tokens)}) tokens{dtype}"
    )


def _machine_line(answer: PlanAnswer) -> str:
    scenario, machine = answer.scenario, answer.scenario.machine
    budget = format_bytes(scenario.budget_bytes)
    if not scenario.is_calibrated:
        assert machine is not None
        return (
            f"{machine.name}: {machine.num_devices} x {machine.processor.name}, "
            f"{format_bytes(machine.processor.memory_bytes)} each at "
            f"{format_rate(machine.processor.memory_bytes_per_s.expected)}"
        )
    rates = scenario.known_rates
    reads = f"{answer.machine_name}: reads {format_rate(rates.read_bytes_per_s)}"
    if scenario.on_cpu:
        return f"{reads}; headrace may hold {budget}"
    device, name = scenario.device, answer.accelerator
    return (
        f"{reads}, copies {format_rate(rates.link_bytes_per_s)} to "
        f"{device if name in ('', device) else f'{device} ({name})'}; headrace may hold {budget} of it and "
        f"{format_bytes(scenario.host_budget_bytes)} of the host"
    )


def _row(answer: PlanAnswer, name: Strategy, item: Candidate) -> list[str]:
    interval, cost = answer.intervals[name].decode_s_per_pass, answer.prices.get(name)
    usd = None if cost is None else cost.usd_per_750_words
    return [
        f"{name.value} *" if item is answer.best else name.value,
        how(item.plan),
        format_seconds(interval.expected),
        "" if interval.low == interval.high else _ends(interval),
        format_seconds(item.prediction.prefill_s),
        format_number(item.prediction.tokens_per_s),
        "" if usd is None else format_number(usd.expected),
        "both in turn" if item.prediction.binds == "both" else item.prediction.binds,
    ]


def _ends(interval: Interval) -> str:
    return format_range(format_seconds(interval.low), format_seconds(interval.high))


def how(plan: Plan) -> str:
    """Say in few words where blocks live and how the work is divided."""
    divided, parts = plan.parallelism, []
    if divided.tensor > 1:
        parts.append(f"width {divided.tensor}")
    if divided.pipeline > 1:
        parts.append(f"{divided.pipeline} stages")
    if divided.micro_batches > 1:
        parts.append(f"{divided.micro_batches} micro-batches")
    if divided.replicas > 1:
        parts.append(f"{divided.replicas} {'devices' if divided.sharded else 'copies'}")
    words = {
        Placement.DEVICE: "resident" if plan.uses_host_memory else "on device",
        Placement.HOST: "from host",
        Placement.DISK: "from disk",
        Placement.CPU: "on CPU",
    }
    counts = {placement: plan.placements.count(placement) for placement in words}
    if counts[Placement.DEVICE] < plan.num_blocks:
        parts += [f"{number} {words[placement]}" for placement, number in counts.items() if number]
    if plan.expert_hit_rate is not None:
        parts.append(f"{plan.expert_hit_rate:.0%} of experts held")
    if plan.cache_on_host:
        parts.append("KV on host")
    return ", ".join(parts) or "all resident"


def _refusals(answer: PlanAnswer) -> list[tuple[list[Strategy], str]]:
    """Strategies without a plan, those with one reason together."""
    found: dict[str, list[Strategy]] = {}
    for name, item in answer.compared.items():
        if isinstance(item, BudgetError):
            found.setdefault(item.short.removesuffix("."), []).append(name)
    return [(names, short) for short, names in found.items()]


def _memory_line(plan: Plan) -> str:
    where = {"device": "on each device", "host": "on the host", "disk": "on the disk"}
    held = ", ".join(f"{format_bytes(size)} {where[tier]}" for tier, size in plan.bytes_by_tier.items() if size)
    cache_bytes = plan.memory.kv_cache_bytes + plan.host_memory.kv_cache_bytes
    return f"It holds {held}; {format_bytes(cache_bytes)} of that is KV cache."


def _break_even_lines(even: BreakEven | None) -> list[str]:
    if even is None:
        return ["Nothing is streamed, so there is no break-even: a pass takes as long as its arithmetic."]
    tokens = even.tokens_per_pass
    spread = "" if tokens.low == tokens.high else f" ({format_count(tokens.low)} - {format_count(tokens.high)})"
    resident = (
        "" if even.critical_batch is None else f"; from the device's own memory: {format_count(even.critical_batch)}"
    )
    lines = [
        f"Break-even when weights come from the {even.source.value}: {format_count(tokens.expected)} tokens per pass"
        f"{spread}{resident}."
    ]
    if tokens.expected <= even.tokens_now:
        lines.append("  This work is past it: computing a pass takes longer than loading it.")
    lines += [f"  {'+' if way.reached else '-'} {way.name}: {way.how}" for way in even.ways]
    if not even.reachable:
        lines.append("  It cannot be reached, for the reasons above.")
    return lines
