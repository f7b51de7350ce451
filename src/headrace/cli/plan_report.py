"""The answer of `headrace plan` for people: every strategy, break-even, advice, a pass in pictures."""

from __future__ import annotations

from headrace.cli.output import Output, table, three_digits
from headrace.cli.pass_chart import pass_chart
from headrace.machine.quantity import Interval
from headrace.planning.answer import PlanAnswer
from headrace.planning.break_even import BreakEven
from headrace.planning.infeasible import Infeasible
from headrace.planning.plan import Placement, Plan
from headrace.planning.prediction import Candidate, is_simulated, timeline_of
from headrace.planning.strategies import Strategy
from headrace.planning.timeline import text_chart
from headrace.units import format_bytes, format_rate, format_seconds

COLUMNS = ("strategy", "how", "first token", "per pass (low - high)", "tokens/s", "$/750 words", "waits for")


def show_plan(output: Output, answer: PlanAnswer) -> None:
    """Print the comparison for people."""
    output.text(f"{_model_line(answer)}\n{_machine_line(answer)}\n\n")
    rows = [_row(answer, name, item) for name, item in answer.candidates.items()]
    if rows:
        shown = [number for number, _ in enumerate(COLUMNS) if any(row[number] for row in rows)]
        output.show(table([COLUMNS[number] for number in shown], [[row[number] for number in shown] for row in rows]))
    for names, why_not in _refusals(answer):
        output.text(f"{', '.join(name.value for name in names)}: {why_not.removesuffix('.')}.\n")
    best = answer.best
    if best is not None:
        output.text(f"\n{best.plan.strategy.value} is recommended: {best.plan.strategy.description}.\n")
        output.text(_memory_line(best.plan))
        for sentence in answer.advice:
            output.text(f"{sentence}\n")
    output.text(f"\n{_break_even_text(answer.break_even)}")
    if best is not None:
        if not is_simulated(best.plan, answer.scenario):
            output.text("\n" + pass_chart(answer))
        chart = text_chart(timeline_of(best, answer.scenario), pass_index=3)
        if chart:
            output.text(f"\none pass of {best.plan.strategy.value}, as predicted:\n{chart}\n")
    for note in answer.notes:
        output.text(f"note: {note}\n")


def _model_line(answer: PlanAnswer) -> str:
    model, work = answer.scenario.model, answer.scenario.workload
    active = f", {_count(model.active_parameters)} active" if model.active_parameters < 0.8 * model.parameters else ""
    dtype = f", computed in {answer.scenario.compute_dtype}" if answer.scenario.is_calibrated else ""
    return (
        f"{model.name}: {_count(model.parameters)} parameters{active}, {format_bytes(model.weights_bytes)} of weights "
        f"({model.weight_format}) in {model.num_layers} layers, {format_bytes(model.kv_bytes_per_token())} of KV cache "
        f"per token; {work.sequences} x ({work.prompt_tokens} + {work.generate_tokens}) tokens{dtype}"
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


def _count(parameters: float) -> str:
    return f"{parameters / 1e12:.3g} trillion" if parameters >= 1e12 else f"{parameters / 1e9:.3g} billion"


def _row(answer: PlanAnswer, name: Strategy, item: Candidate) -> list[str]:
    interval, cost = answer.intervals[name], answer.prices.get(name)
    usd = None if cost is None else cost.usd_per_750_words
    return [
        f"{name.value} *" if item is answer.best else name.value,
        how(item.plan),
        format_seconds(item.prediction.prefill_s),
        _span(interval.decode_s_per_pass),
        three_digits(item.prediction.tokens_per_s),
        "" if usd is None else three_digits(usd.expected),
        "both in turn" if item.prediction.binds == "both" else item.prediction.binds,
    ]


def _span(interval: Interval) -> str:
    if interval.low == interval.high:
        return format_seconds(interval.expected)
    return f"{format_seconds(interval.expected)} ({format_seconds(interval.low)} - {format_seconds(interval.high)})"


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
        if isinstance(item, Infeasible):
            found.setdefault(item.why_not, []).append(name)
    return [(names, why_not) for why_not, names in found.items()]


def _memory_line(plan: Plan) -> str:
    where = {"device": "on each device", "host": "on the host", "disk": "on the disk"}
    held = ", ".join(f"{format_bytes(size)} {where[tier]}" for tier, size in plan.bytes_by_tier.items() if size)
    return f"It holds {held}; {format_bytes(plan.memory.kv_cache_bytes)} of that is KV cache.\n"


def _break_even_text(even: BreakEven | None) -> str:
    if even is None:
        return "Nothing is streamed, so there is no break-even: a pass takes as long as its arithmetic.\n"
    tokens = even.tokens_per_pass
    spread = "" if tokens.low == tokens.high else f" ({tokens.low:,.0f} - {tokens.high:,.0f})"
    resident = "" if even.critical_batch is None else f"; from the device's own memory: {even.critical_batch:,.0f}"
    lines = [
        f"Break-even when weights come from the {even.source.value}: {tokens.expected:,.0f} tokens per pass{spread}"
        f"{resident}."
    ]
    if tokens.expected <= even.tokens_now:
        lines.append("  This work is past it: computing a pass takes longer than loading it.")
    lines += [f"  {'+' if way.reached else '-'} {way.name}: {way.how}" for way in even.ways]
    if not even.reachable:
        lines.append("  It cannot be reached, for the reasons above.")
    return "\n".join(lines) + "\n"
