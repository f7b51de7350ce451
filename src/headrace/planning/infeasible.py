"""Why a scenario has no plan, and the smallest budget that would change that."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from headrace.errors import BudgetError
from headrace.planning.memory import Arrangement, MemoryAccount
from headrace.planning.placements import smallest_arrangements
from headrace.planning.plan import Strategy
from headrace.planning.scenario import Scenario
from headrace.units import format_bytes


def minimum_bytes(scenario: Scenario, strategy: Strategy | None = None) -> int:
    """The smallest budget of the device in which this model can do this work, by one strategy or at all.

    With the host memory that there is, and layers computed by the CPU where the scenario allows them; raises
    BudgetError where the host has too little for any plan.
    """
    account = MemoryAccount(scenario)
    smallest = _smallest(account, strategy)
    if smallest is None:
        raise refusal(account, strategy)
    return smallest.device_bytes


def refuse_below_minimum(scenario: Scenario, strategy: Strategy | None) -> None:
    """Raise BudgetError, with the smallest budget of the device or of the host that would do, when nothing fits."""
    account = MemoryAccount(scenario)
    smallest = _smallest(account, strategy)
    if smallest is None or smallest.device_bytes > scenario.budget_bytes:
        raise refusal(account, strategy)


def refusal(account: MemoryAccount, strategy: Strategy | None) -> BudgetError:
    """Name the smallest budget that would do, of the device or, where the host has no room for a ring, of the host."""
    scenario, smallest = account.scenario, _smallest(account, strategy)
    if smallest is None:
        return BudgetError(
            f"{format_bytes(scenario.host_budget_bytes)} of host memory cannot hold the ring through which "
            f"{scenario.model.name} is read to {scenario.device}: {scenario.ring_chunks} chunks of "
            f"{format_bytes(scenario.chunk_bytes)}. Raise --host-memory to {format_bytes(account.ring_bytes)} "
            f"({account.ring_bytes} bytes).",
            required_bytes=account.ring_bytes,
        )
    use, work = account.device(smallest.arrangement), scenario.workload
    parts = ", ".join(
        f"{label} {format_bytes(size)}"
        for label, size in (
            ("resident weights", use.weights_bytes),
            ("slots", use.slots_bytes),
            ("conversion", use.conversion_bytes),
            ("KV cache", use.kv_cache_bytes),
            ("work space", use.work_space_bytes),
            ("small tensors", use.fixed_bytes),
        )
        if size
    )
    where = "" if scenario.on_cpu else f" on {scenario.device}"
    return BudgetError(
        f"a budget of {format_bytes(scenario.budget_bytes)}{where} is too small for {scenario.model.name} "
        f"({smallest.strategy.value}, {scenario.compute_dtype}, {work.sequences} x ({work.prompt_tokens} + "
        f"{work.generate_tokens}) tokens): it needs at least {format_bytes(use.total_bytes)} "
        f"({use.total_bytes} bytes: {parts}). Raise --memory to {format_bytes(use.total_bytes)}"
        f"{_more_on_the_host(account, strategy)}, or reduce --batch or the number of tokens.",
        required_bytes=use.total_bytes,
    )


class _Smallest(NamedTuple):
    strategy: Strategy
    arrangement: Arrangement
    device_bytes: int


def _smallest(account: MemoryAccount, strategy: Strategy | None) -> _Smallest | None:
    """What takes least of the device's memory, of what the host has room for; by default in sequence on a CPU."""
    if strategy is None and account.scenario.on_cpu:
        strategy = Strategy.SEQUENTIAL
    found = [
        _Smallest(one, arrangement, account.device(arrangement).total_bytes)
        for one in ((strategy,) if strategy is not None else Strategy)
        for arrangement in smallest_arrangements(account, one)
    ]
    return min(found, key=lambda smallest: smallest.device_bytes, default=None)


def _more_on_the_host(account: MemoryAccount, strategy: Strategy | None) -> str:
    """With which host memory the device's budget would be enough, if with any."""
    needed = [
        account.host(arrangement).total_bytes
        for one in ((strategy,) if strategy is not None else Strategy)
        for arrangement in smallest_arrangements(account, one, ignore_host_budget=True)
        if account.device(arrangement).total_bytes <= account.scenario.budget_bytes
    ]
    return f", or --host-memory to {format_bytes(min(needed))}" if needed else ""


def budget_for_everything(scenario: Scenario) -> int | None:
    """The smallest budget with which the device holds all weights, keys and values; None where none would do."""
    try:
        return minimum_bytes(replace(scenario, allow_cpu=False, allow_host_cache=False), Strategy.RESIDENT)
    except BudgetError:
        return None
