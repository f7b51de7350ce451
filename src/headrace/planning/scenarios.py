"""From a machine's description and what is asked to a scenario: budgets, dtype and rates chosen in one place."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from headrace.errors import InvalidRequestError, MachineError
from headrace.machine.machine import Machine
from headrace.model.model import Model
from headrace.planning.infeasible import minimum_bytes
from headrace.planning.load_options import (
    beyond_memory,
    compute_dtypes,
    device_reserve_bytes,
    host_reserve_bytes,
    reserve_bytes,
    work_seconds,
)
from headrace.planning.measured_rates import accelerator_rates, cpu_layer_times, cpu_rates
from headrace.planning.plan import CPU_DEVICE
from headrace.planning.rates import LayerTimes
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from headrace.planning.workload import Speculation, Workload
from headrace.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What `headrace plan` is asked of a model and a machine; None where the default is wanted."""

    workload: Workload = field(default_factory=Workload)
    strategy: Strategy | None = None
    memory_bytes: int | None = None
    """what each device may hold"""
    host_memory_bytes: int | None = None
    """what each node's host memory may hold beside its devices"""
    device: str = "auto"
    dtype: str | None = None
    read_limit_bytes_per_s: float | None = None
    cpu_blocks: bool = False
    cache_on_host: bool = False
    speculation: Speculation | None = None
    expert_hit_rate: float | None = None


class Asked(NamedTuple):
    """A scenario, and what was assumed in it, in sentences."""

    scenario: Scenario
    notes: tuple[str, ...]


def scenario_on(machine: Machine, model: Model, request: PlanRequest, *, origin: str) -> Asked:
    """The scenario of a model on a described machine, simulated where its arithmetic was measured.

    Where a CPU computes, a large head is cut into pieces. `origin` names the machine in errors. Raises
    InvalidRequestError for options that do not apply, MachineError for what the machine does not say.
    """
    if not machine.is_calibrated:
        _refuse_measured_options(machine, request)
        scenario = Scenario.described(
            model,
            machine,
            request.workload,
            memory_bytes=request.memory_bytes,
            host_memory_bytes=request.host_memory_bytes,
            speculation=request.speculation,
            expert_hit_rate=request.expert_hit_rate,
        )
        return Asked(scenario, (*scenario.model.notes, *machine.notes, *_notes_on_budgets(scenario, machine, request)))
    if request.expert_hit_rate is not None and request.strategy is not Strategy.EXPERTS:
        raise InvalidRequestError(
            f"--expert-hit-rate does not apply to {origin}, which was measured: experts travel with their layer. Add "
            "--strategy experts"
        )
    machine = machine.on(request.device, origin=origin)
    on_cpu = not machine.accelerators
    model = replace(model, cut_head=on_cpu)
    refuse_long_context(model, request.workload)
    scenario = (_on_cpu if on_cpu else _on_accelerator)(machine, model, request)
    return Asked(scenario, (*model.notes, *machine.notes, *_notes_on_budgets(scenario, machine, request)))


def refuse_long_context(model: Model, work: Workload) -> None:
    """Raise InvalidRequestError where the workload is longer than the model's context."""
    if work.context_tokens > model.context_tokens:
        raise InvalidRequestError(
            f"{work.prompt_tokens} + {work.generate_tokens} tokens of context were asked for; {model.name} can do "
            f"{model.context_tokens}"
        )


def _on_cpu(machine: Machine, model: Model, request: PlanRequest) -> Scenario:
    """The CPU computes, in the dtype that is faster there among those that fit."""
    for option, given in (
        ("--host-memory", request.host_memory_bytes is not None),
        ("--cpu-blocks", request.cpu_blocks),
        ("--cache-on-host", request.cache_on_host),
    ):
        if given:
            raise InvalidRequestError(
                f"{option} is for an accelerator (--device cuda); the CPU has one memory, which --memory bounds"
            )
    free_bytes = machine.host_bytes
    default_bytes = max(0, free_bytes - reserve_bytes(free_bytes))
    scenarios = [
        Scenario(
            model=model,
            workload=request.workload,
            compute_dtype=dtype,
            budget_bytes=default_bytes if request.memory_bytes is None else request.memory_bytes,
            rates=cpu_rates(machine, model, compute_dtype=dtype, read_limit_bytes_per_s=request.read_limit_bytes_per_s),
            read_is_limited=request.read_limit_bytes_per_s is not None,
            draft_tokens=0 if request.speculation is None else request.speculation.draft_tokens,
            machine=machine,
            busy=machine.busy,
            speculation=request.speculation,
            expert_hit_rate=request.expert_hit_rate,
        )
        for dtype in compute_dtypes(model, request.dtype)
    ]
    fitting = [each for each in scenarios if minimum_bytes(each) <= each.budget_bytes]
    return min(fitting or scenarios, key=lambda each: work_seconds(each.known_rates.curve, request.workload))


def _on_accelerator(machine: Machine, model: Model, request: PlanRequest) -> Scenario:
    """An accelerator computes, in the stored dtype unless another one was asked for, as a run on it does."""
    accelerator, host_bytes = machine.processor, machine.host_bytes
    free_bytes = accelerator.available_bytes
    budget_bytes = max(0, free_bytes - device_reserve_bytes(free_bytes))
    host_budget_bytes = max(0, host_bytes - host_reserve_bytes(host_bytes))
    dtype = compute_dtypes(model, request.dtype)[0]
    return Scenario(
        model=model,
        workload=request.workload,
        compute_dtype=dtype,
        budget_bytes=budget_bytes if request.memory_bytes is None else request.memory_bytes,
        host_budget_bytes=host_budget_bytes if request.host_memory_bytes is None else request.host_memory_bytes,
        device=accelerator.device,
        pinned=accelerator.copies is not None and accelerator.copies.page_locked,
        allow_cpu=request.cpu_blocks,
        allow_host_cache=request.cache_on_host,
        rates=accelerator_rates(
            machine,
            model,
            compute_dtype=dtype,
            read_limit_bytes_per_s=request.read_limit_bytes_per_s,
            cpu_layer=_cpu_layer(machine, model, request, dtype),
        ),
        read_is_limited=request.read_limit_bytes_per_s is not None,
        draft_tokens=0 if request.speculation is None else request.speculation.draft_tokens,
        machine=machine,
        busy=machine.busy,
        speculation=request.speculation,
        expert_hit_rate=request.expert_hit_rate,
    )


def _cpu_layer(machine: Machine, model: Model, request: PlanRequest, dtype: str) -> LayerTimes | None:
    """None where the file does not say and layers of the CPU were not asked for."""
    try:
        return cpu_layer_times(machine, model, request.workload, compute_dtype=dtype)
    except MachineError:
        if request.cpu_blocks:
            raise
        return None


def _refuse_measured_options(machine: Machine, request: PlanRequest) -> None:
    """Refuse what only a measured machine heeds."""
    compared = "there the CPU's layers, and keys and values that wait on the host, are compared anyhow"
    for option, given, instead in (
        ("--dtype", request.dtype is not None, "use --weights"),
        ("--read-limit", request.read_limit_bytes_per_s is not None, "use a machine file with that disk"),
        ("--cpu-blocks", request.cpu_blocks, compared),
        ("--cache-on-host", request.cache_on_host, compared),
        (f"--device {request.device}", request.device != "auto", f"{machine.name} computes on its own devices"),
    ):
        if given:
            raise InvalidRequestError(
                f"{option} applies to the machine at hand or to one that `headrace probe` measured, not to "
                f"{machine.name}: {instead}"
            )


def _notes_on_budgets(scenario: Scenario, machine: Machine, request: PlanRequest) -> tuple[str, ...]:
    """What was assumed of memory, and what was allowed beyond what there is."""
    accelerator, host_bytes = machine.processor, machine.host_bytes
    done = "planned as if it had so much" if scenario.is_calibrated else "planned with what it has"
    notes = [*beyond_memory("--memory", request.memory_bytes, accelerator.memory_bytes, accelerator.name, done)]
    if machine.host is not None:
        notes += beyond_memory("--host-memory", request.host_memory_bytes, host_bytes, "the host", done)
    if not scenario.is_calibrated:
        return tuple(notes)
    if scenario.device == CPU_DEVICE:
        if request.memory_bytes is None:
            reserve = format_bytes(reserve_bytes(host_bytes))
            notes.append(f"budget: the machine's {format_bytes(host_bytes)} less {reserve} in reserve")
        return tuple(notes)
    if request.memory_bytes is None:
        free_bytes = accelerator.available_bytes
        notes.append(
            f"budget on {accelerator.device}: {format_bytes(free_bytes)} that were free when it was measured, less "
            f"{format_bytes(device_reserve_bytes(free_bytes))} in reserve"
        )
    if request.host_memory_bytes is None:
        reserve = format_bytes(host_reserve_bytes(host_bytes))
        notes.append(f"budget on the host: its {format_bytes(host_bytes)} less {reserve} in reserve")
    if not scenario.pinned:
        notes.append("no host memory was page-locked when it was measured: blocks travel more slowly, through a ring")
    if scenario.allow_cpu:
        notes.append("the CPU may compute layers: results may differ from the device's own in rounding")
    return tuple(notes)
