"""What would make a plan faster, found by planning again with one thing changed: parts, memory, the CPU's help."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from headrace.errors import HeadraceError
from headrace.model.formats import requantised
from headrace.planning.infeasible import budget_for_everything
from headrace.planning.memory import MemoryAccount
from headrace.planning.plan import Arrangement, Placement
from headrace.planning.planner import plan_fastest, plan_strategy
from headrace.planning.prediction import Candidate, constants, is_simulated, predict
from headrace.planning.rates import Rates
from headrace.planning.scenario import Scenario
from headrace.units import format_bytes, format_count, format_number, format_seconds, size_option

WORTH_A_SENTENCE = 0.99
"""a change that leaves more than this share of the time is not worth a sentence"""

STEP_BYTES = 1 << 30


def advice(scenario: Scenario, best: Candidate) -> list[str]:
    """Sentences: what binds and what twice its speed would bring, more tokens per pass, more memory, the CPU."""
    if is_simulated(best.plan, scenario):
        return list(filter(None, _sentences(scenario, best)))
    return _described_sentences(scenario, best)


def _sentences(scenario: Scenario, best: Candidate) -> Iterator[str]:
    plan, predicted = best
    if predicted.load_s_per_pass == 0 and not plan.cpu_blocks:
        yield (
            f"{_device(scenario)} binds, and every weight is in memory: neither more memory nor a faster "
            f"{'disk' if scenario.on_cpu else 'link'} would help; more tokens per pass (a batch) would, as far as the "
            "arithmetic curve is flat."
        )
        return
    yield _what_binds(scenario, best)
    even = predicted.break_even_tokens_per_pass
    if predicted.binds in {"disk", "link"} and even >= plan.workload.sequences + 1:
        yield f"More tokens in a pass are free up to {format_count(even)} (a batch, drafts)."
    yield _more_device_memory(scenario, best)
    if not scenario.on_cpu and Placement.DISK in plan.placements:
        yield _more_host_memory(scenario, best)
    if predicted.binds == "link" and not scenario.allow_cpu and scenario.known_rates.cpu_layer is not None:
        yield _help_of_cpu(scenario, best)


def _device(scenario: Scenario) -> str:
    return "The CPU" if scenario.on_cpu else "The accelerator"


def _what_binds(scenario: Scenario, best: Candidate) -> str:
    plan, now, binds = best.plan, format_seconds(best.prediction.decode_s_per_pass), best.prediction.binds
    rates = scenario.known_rates
    if binds == "compute":
        return (
            f"{_device(scenario)} binds: what is loaded hides behind its arithmetic, so a faster disk or link would "
            "hardly help; faster arithmetic would."
        )
    if binds == "disk" or (binds == "both" and scenario.on_cpu):
        faster = _pass_at(scenario, best, _faster_disk(rates))
        return f"The disk binds: one of twice the speed would make a pass {faster} instead of {now}."
    if binds == "cpu":
        assert rates.cpu_layer is not None
        faster = _pass_at(scenario, best, replace(rates, cpu_layer=rates.cpu_layer.scaled(0.5)))
        return (
            f"The CPU binds, with the {plan.cpu_blocks} layers that it computes: one of twice the speed would make a "
            f"pass {faster} instead of {now}."
        )
    faster = _pass_at(scenario, best, _faster_link(rates))
    if binds == "link":
        return f"The link to {plan.device} binds: one of twice the speed would make a pass {faster} instead of {now}."
    from_disk = ""
    if Placement.DISK in plan.placements:
        from_disk = f", a disk of twice the speed {_pass_at(scenario, best, _faster_disk(rates))}"
    return (
        f"Loading and computing take turns: a link of twice the speed would make a pass {faster} instead of "
        f"{now}{from_disk}."
    )


def _pass_at(scenario: Scenario, best: Candidate, rates: Rates) -> str:
    """A pass at other rates, on an accelerator planned again: what another part did may now be too slow."""
    changed = scenario.at(rates)
    seconds = predict(best.plan, changed).decode_s_per_pass
    if not scenario.on_cpu:
        seconds = min(seconds, plan_strategy(changed, best.plan.strategy).prediction.decode_s_per_pass)
    return format_seconds(seconds)


def _faster_link(rates: Rates) -> Rates:
    return replace(
        rates,
        link_bytes_per_s=2 * rates.link_bytes_per_s,
        staged_bytes_per_s=min(2 * rates.staged_bytes_per_s, rates.memory_copy_bytes_per_s),
    )


def _faster_disk(rates: Rates) -> Rates:
    return replace(rates, read_bytes_per_s=2 * rates.read_bytes_per_s)


def more_memory(
    best: Candidate,
    planned: Callable[[int], Candidate],
    *,
    name: str,
    option: str,
    budget_bytes: int,
    block_bytes: int,
    enough_bytes: int | None,
    holds: str,
) -> str:
    """Say what a step more of a memory would save of a pass; nothing where there is enough.

    `planned` is the fastest plan under another budget. A step smaller than the largest block, `block_bytes`, may hold
    no more than before. `enough_bytes`, which would hold what `holds` says, is the budget beyond which more would
    change nothing; None where no budget would be enough.
    """
    step = max(STEP_BYTES, 2 * block_bytes)
    if enough_bytes is not None:
        step = min(step, enough_bytes - budget_bytes)
    if step <= 0:
        return ""
    now_s = best.prediction.decode_s_per_pass
    saved_s = now_s - planned(budget_bytes + step).prediction.decode_s_per_pass
    if saved_s < (1 - WORTH_A_SENTENCE) * now_s:
        return f"More {name} would save nothing worth having."
    if enough_bytes is not None and step == enough_bytes - budget_bytes:
        return (
            f"{format_bytes(step)} more {name} would hold {holds}: {format_seconds(now_s - saved_s)} per pass "
            f"({option} {size_option(enough_bytes)})."
        )
    saved_s *= STEP_BYTES / step
    return f"Each further GiB of {name} saves about {format_seconds(saved_s)} per pass."


def _more_device_memory(scenario: Scenario, best: Candidate) -> str:
    return more_memory(
        best,
        lambda size: plan_fastest(replace(scenario, budget_bytes=size)),
        name="memory" if scenario.on_cpu else "device memory",
        option="--memory",
        budget_bytes=scenario.budget_bytes,
        block_bytes=max(MemoryAccount(scenario).block_bytes),
        enough_bytes=budget_for_everything(scenario),
        holds="everything",
    )


def _more_host_memory(scenario: Scenario, best: Candidate) -> str:
    stored = zip(MemoryAccount(scenario).stored_bytes, best.plan.placements, strict=True)
    on_disk = [size for size, placement in stored if placement is Placement.DISK]
    return more_memory(
        best,
        lambda size: plan_fastest(replace(scenario, host_budget_bytes=size)),
        name="host memory",
        option="--host-memory",
        budget_bytes=scenario.host_budget_bytes,
        block_bytes=max(on_disk),
        enough_bytes=best.plan.host_memory.total_bytes + sum(on_disk),
        holds="what comes from the disk",
    )


def _help_of_cpu(scenario: Scenario, best: Candidate) -> str:
    now_s = best.prediction.decode_s_per_pass
    one_layer = Arrangement((Placement.CPU, *[Placement.DISK] * (len(scenario.model.blocks) - 1)), 0)
    needed_bytes = MemoryAccount(scenario).host(one_layer).total_bytes
    if needed_bytes > scenario.host_budget_bytes:
        return (
            f"For --cpu-blocks the host's budget is too small: raise --host-memory to {size_option(needed_bytes)} for "
            "one layer."
        )
    plan, predicted = plan_fastest(replace(scenario, allow_cpu=True))
    if not plan.cpu_blocks or predicted.decode_s_per_pass > WORTH_A_SENTENCE * now_s:
        return "The CPU would be no help: it is too slow for layers of this model (--cpu-blocks)."
    return (
        f"With --cpu-blocks the CPU would compute {plan.cpu_blocks} layers where they lie: "
        f"{format_seconds(predicted.decode_s_per_pass)} per pass, as predicted; results may then differ in rounding."
    )


# -- a described machine ------------------------------------------------------------------------------------------

_WORTH_ON_PAPER = 0.97
_PARTS = {
    "device memory": ("processor.memory_bytes_per_s",),
    "arithmetic": ("processor.flops",),
    "a host link": ("link.host",),
    "a link between devices": ("link.scale_up",),
    "a network": ("link.network",),
    "a disk": ("link.storage",),
    "a host memory and CPU": ("host.memory_bytes_per_s", "host.flops"),
}
"""what could be faster, and the constants of a plan that would be twice as large"""


def _described_sentences(scenario: Scenario, best: Candidate) -> list[str]:
    """The most helpful first: faster parts, fewer bits, more tokens per pass."""
    now_s, plan = best.prediction.decode_s_per_pass, best.plan
    found: list[tuple[float, str]] = []
    expected = {name: constant.expected for name, constant in constants(plan, scenario).items()}
    for what, names in _PARTS.items():
        faster = expected | {name: 2 * expected[name] for name in names if name in expected}
        found.append((predict(plan, scenario, faster).decode_s_per_pass / now_s, f"{what} of twice the speed"))
    with contextlib.suppress(HeadraceError):
        narrow = requantised(scenario.model, "int4")
        if narrow.weights_bytes < 0.9 * scenario.model.weights_bytes:
            changed = plan_strategy(replace(scenario, model=narrow), plan.strategy)
            found.append((changed.prediction.decode_s_per_pass / now_s, "weights in 4 bits"))
    sentences = [
        f"{what.capitalize()} would make a pass {format_seconds(share * now_s)} instead of {format_seconds(now_s)}."
        for share, what in sorted(found)
        if share < _WORTH_ON_PAPER
    ]
    free = _twice_the_batch(scenario, best)
    if free:
        sentences.append(free)
    binds = best.prediction.binds
    return sentences or [f"It waits for {binds}; no single part of twice the speed would help by 3 % or more."]


def _twice_the_batch(scenario: Scenario, best: Candidate) -> str:
    """Whether twice the batch costs nearly nothing."""
    doubled = scenario.batch(2 * scenario.workload.sequences)
    try:
        gain = plan_strategy(doubled, best.plan.strategy).prediction.tokens_per_s / best.prediction.tokens_per_s
    except HeadraceError:
        return ""
    if gain < 1.1:
        return ""
    batch = format_count(doubled.workload.sequences)
    return f"A batch of {batch} would bring {format_number(gain)} times the tokens per second."
