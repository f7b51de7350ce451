"""Why a scenario has no plan, and the smallest budget that would change that."""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from headrace.errors import BudgetError, HeadraceError
from headrace.machine.catalogue import find_machine
from headrace.machine.machine import Machine, Tier
from headrace.model.formats import NARROWER_FORMATS, requantised
from headrace.planning.memory import MemoryAccount, described_memory
from headrace.planning.placements import smallest_arrangements
from headrace.planning.plan import Arrangement
from headrace.planning.scenario import Scenario
from headrace.planning.splits import candidates
from headrace.planning.strategies import RUNNABLE, Strategy
from headrace.units import format_bytes, size_option


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
    """Raise BudgetError, with the smallest budget of the device or the host that suffices, when nothing fits."""
    account = MemoryAccount(scenario)
    smallest = _smallest(account, strategy)
    if smallest is None or smallest.device_bytes > scenario.budget_bytes:
        raise refusal(account, strategy)


def refusal(account: MemoryAccount, strategy: Strategy | None) -> BudgetError:
    """Name the smallest budget that suffices, of the device or, where the host has no room for a ring, of the host."""
    scenario, smallest = account.scenario, _smallest(account, strategy)
    if smallest is None:
        return BudgetError(
            f"{format_bytes(scenario.host_budget_bytes)} of host memory cannot hold the ring through which "
            f"{scenario.model.name} is read to {scenario.device}: {scenario.ring_chunks} chunks of "
            f"{format_bytes(scenario.chunk_bytes)}. Raise --host-memory to {size_option(account.ring_bytes)} "
            f"({account.ring_bytes} bytes).",
            required_bytes=account.ring_bytes,
            short=f"its ring needs --host-memory {size_option(account.ring_bytes)}",
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
    where, on_the_host = "" if scenario.on_cpu else f" on {scenario.device}", _more_on_the_host(account, strategy)
    return BudgetError(
        f"a budget of {format_bytes(scenario.budget_bytes)}{where} is too small for {scenario.model.name} "
        f"({smallest.strategy.value}, {scenario.compute_dtype}, {work.sequences} x ({work.prompt_tokens} + "
        f"{work.generate_tokens}) tokens): it needs at least {format_bytes(use.total_bytes)} "
        f"({use.total_bytes} bytes: {parts}). Raise --memory to {size_option(use.total_bytes)}{on_the_host}, or reduce "
        "--batch or the number of tokens.",
        required_bytes=use.total_bytes,
        short=f"needs {format_bytes(use.total_bytes)}{where}: --memory {size_option(use.total_bytes)}{on_the_host}",
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
        for one in ((strategy,) if strategy is not None else RUNNABLE)
        for arrangement in smallest_arrangements(account, one)
    ]
    return min(found, key=lambda smallest: smallest.device_bytes, default=None)


def _more_on_the_host(account: MemoryAccount, strategy: Strategy | None) -> str:
    """With which host memory the device's budget would be enough, if with any."""
    needed = [
        account.host(arrangement).total_bytes
        for one in ((strategy,) if strategy is not None else RUNNABLE)
        for arrangement in smallest_arrangements(account, one, ignore_host_budget=True)
        if account.device(arrangement).total_bytes <= account.scenario.budget_bytes
    ]
    return f" or --host-memory {size_option(min(needed))}" if needed else ""


def budget_for_everything(scenario: Scenario) -> int | None:
    """The smallest budget with which the device holds all weights, keys and values; None where none would suffice."""
    try:
        return minimum_bytes(replace(scenario, allow_cpu=False, allow_host_cache=False), Strategy.RESIDENT)
    except BudgetError:
        return None


# -- a described machine ------------------------------------------------------------------------------------------


def lack_of(scenario: Scenario, arrangement: Arrangement) -> BudgetError | None:
    """The memory that this arrangement needs and does not have, with bytes per device; None where it fits."""
    need = described_memory(scenario, arrangement)
    device_bytes = need.device.total_bytes
    for where, needed, offered in (
        ("each device", device_bytes, scenario.budget_bytes),
        ("the host", need.host.total_bytes, scenario.host_budget_bytes),
        ("the disk", need.disk_bytes, scenario.described_machine.usable_bytes(Tier.DISK)),
    ):
        if needed > offered:
            text = f"needs {format_bytes(needed)} of {where}'s {format_bytes(offered)}"
            return BudgetError(text, required_bytes=needed if where == "each device" else None)
    return None


def described_refusal(scenario: Scenario, strategy: Strategy, lacking: Sequence[HeadraceError]) -> BudgetError:
    """Say what lacks least, and the smallest change of batch, devices or precision that would fit."""
    if not lacking:
        return BudgetError(_not_applicable(scenario, strategy))
    least, required = lacking[0], math.inf
    for lack in lacking:
        if isinstance(lack, BudgetError) and lack.required_bytes is not None and lack.required_bytes < required:
            least, required = lack, lack.required_bytes
    return BudgetError(
        f"{least}; {_smallest_change(scenario, strategy)}",
        required_bytes=None if required == math.inf else math.ceil(required),
    )


def _not_applicable(scenario: Scenario, strategy: Strategy) -> str:
    machine = scenario.described_machine
    if strategy is Strategy.EXPERTS:
        return f"{scenario.model.name} has no routed experts"
    if strategy in (Strategy.CPU, Strategy.HYBRID) and machine.host is None:
        return f"{machine.name} computes where its weights lie already"
    streams = strategy in (Strategy.SEQUENTIAL, Strategy.OVERLAP, Strategy.TENSOR_OVERLAP)
    if streams and not machine.links and machine.disk is None:
        return f"{machine.name} describes no disk and no host memory to stream from"
    if strategy is Strategy.SHARDED and scenario.workload.sequences < 2:
        return "each device works on sequences of its own; raise --batch to 2"
    if strategy is Strategy.TENSOR_2D:
        return f"needs 16 devices or more that divide the heads; {machine.name} has {machine.num_devices}"
    if strategy in _OVER_DEVICES or strategy in (Strategy.TENSOR_OVERLAP, Strategy.SHARDED):
        if machine.num_devices == 1:
            return f"needs several devices: {_more_devices(machine, replace(machine, devices=2))}"
        return f"needs another number of devices than the {machine.num_devices} of {machine.name}"
    return f"does not apply to {scenario.model.name} on {machine.name}"


_OVER_DEVICES = (Strategy.TENSOR, Strategy.PIPELINE, Strategy.TENSOR_PIPELINE, Strategy.TENSOR_2D)


def _smallest_change(scenario: Scenario, strategy: Strategy) -> str:
    """Find the smallest of a few changes that would make a strategy fit: batch, devices, precision."""
    batch = _largest_batch(scenario, strategy)
    if batch:
        return f"--batch {batch} would fit"
    larger, precision = _fewest_devices(scenario, strategy), _widest_format(scenario, strategy)
    found = [
        *([_more_devices(scenario.described_machine, larger)] if larger is not None else []),
        *([f"--weights {precision}"] if precision else []),
    ]
    if found:
        return " or ".join(found) + " would fit"
    return "too much even in 4 bits" if scenario.workload.sequences == 1 else "too much even for --batch 1"


def _more_devices(machine: Machine, larger: Machine) -> str:
    """The option that asks for the larger machine, where the catalogue knows it; else how many devices it has."""
    (now, then) = (machine.nodes, larger.nodes) if larger.nodes > machine.nodes else (machine.devices, larger.devices)
    name = f"{then}x{machine.name.removeprefix(f'{now}x') if now > 1 else machine.name}"
    try:
        known = find_machine(name).num_devices == larger.num_devices
    except HeadraceError:
        known = False
    return f"--machine {name}" if known else f"{larger.num_devices} devices"


def _fits(scenario: Scenario, strategy: Strategy) -> bool:
    return any(lack_of(scenario, option) is None for option in candidates(scenario, strategy))


def _largest_batch(scenario: Scenario, strategy: Strategy) -> int:
    """The largest batch below the one asked for that fits; 0 where none does."""
    if scenario.workload.sequences == 1 or not _fits(scenario.batch(1), strategy):
        return 0
    larger = range(2, scenario.workload.sequences)
    return 1 + bisect.bisect_left(larger, x=True, key=lambda number: not _fits(scenario.batch(number), strategy))


def _fewest_devices(scenario: Scenario, strategy: Strategy) -> Machine | None:
    if strategy not in _OVER_DEVICES:
        return None
    machine = scenario.described_machine
    for doublings in range(1, 8):
        more = {"nodes": machine.nodes} if "network" in machine.links else {"devices": machine.devices}
        larger = replace(machine, **{name: count * 2**doublings for name, count in more.items()})
        try:
            if _fits(scenario.on(larger), strategy):
                return larger
        except HeadraceError:
            return None
    return None


def _widest_format(scenario: Scenario, strategy: Strategy) -> str:
    """The widest of a few narrower weight formats with which the strategy fits."""
    return next((name for name, asked in narrower(scenario) if _fits(asked, strategy)), "")


def narrower(scenario: Scenario) -> Iterator[tuple[str, Scenario]]:
    """The same question with weights in a few formats that take less, the widest first."""
    for name in NARROWER_FORMATS:
        with contextlib.suppress(HeadraceError):
            model = requantised(scenario.model, name)
            if model.weights_bytes < 0.95 * scenario.model.weights_bytes:
                yield name, replace(scenario, model=model)
