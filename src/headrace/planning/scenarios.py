"""From a machine's description and what is asked to a scenario: budgets, dtype and rates chosen in one place."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from headrace.dtypes import DTYPES, STORED_DTYPES
from headrace.errors import InvalidRequestError, MachineError, near_names
from headrace.machine.compute_curve import ComputeCurve
from headrace.machine.machine import Machine
from headrace.model.model import Model
from headrace.planning.budgets import beyond_memory, device_reserve_bytes, host_reserve_bytes, reserve_bytes
from headrace.planning.infeasible import minimum_bytes
from headrace.planning.measured_rates import accelerator_rates, cpu_layer_times, cpu_rates
from headrace.planning.plan import CPU_DEVICE
from headrace.planning.rates import LayerTimes
from headrace.planning.scenario import Scenario, refuse_long_context
from headrace.planning.strategies import Strategy
from headrace.planning.workload import Speculation, Workload, asked_workload
from headrace.units import format_bytes, parse_rate, parse_size

DEFAULT_ACCEPTANCE = 0.7


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What `headrace plan` is asked of a model and a machine, as users write it.

    Raises InvalidRequestError for what no model could use.
    """

    memory: str | int | None = None
    """what each device may hold, in bytes or as text; None: what there is, less a reserve"""
    host_memory: str | int | None = None
    """what each node's host memory may hold beside its devices, likewise"""
    device: str = "auto"
    batch: int = 1
    prompt_tokens: int | None = None
    """of each sequence; None: `DEFAULT_WORKLOAD`'s, or as many as the model's context has room for"""
    generate_tokens: int | None = None
    """likewise"""
    strategy: str = "auto"
    dtype: str = "auto"
    read_limit: str | float | None = None
    """bytes per second, or text"""
    cpu_blocks: bool = False
    cache_on_host: bool = False
    draft_tokens: int | None = None
    acceptance: float | None = None
    """of a draft; None: DEFAULT_ACCEPTANCE"""
    expert_hit_rate: float | None = None
    fresh: bool = False
    """measure this machine again, and not take what an earlier start measured"""

    def __post_init__(self) -> None:
        known = [each.value for each in Strategy]
        if self.strategy != "auto" and self.strategy not in known:
            raise InvalidRequestError(
                f"--strategy {self.strategy}: there is no such strategy; {near_names(self.strategy, known)}"
                f"known: auto, {', '.join(known)}"
            )
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise InvalidRequestError(f"unsupported dtype {self.dtype!r}; choose auto, {', '.join(DTYPES)}")
        if self.acceptance is not None and self.draft_tokens is None:
            raise InvalidRequestError("--acceptance is the share of drafts that are right: give --draft-tokens as well")
        # Each of these refuses what it cannot read.
        _ = self.workload, self.speculation, self.memory_bytes, self.host_memory_bytes, self.read_limit_bytes_per_s

    @property
    def workload(self) -> Workload:
        """The work that is planned for in a context that has room for it."""
        return self._work(sys.maxsize)

    def within(self, context_tokens: int) -> PlanRequest:
        """The same question with its lengths, where they were not said, cut to a model's context."""
        return self.doing(self._work(context_tokens))

    def _work(self, context_tokens: int) -> Workload:
        return asked_workload(
            context_tokens,
            sequences=self.batch,
            prompt_tokens=self.prompt_tokens,
            generate_tokens=self.generate_tokens,
        )

    def doing(self, work: Workload) -> PlanRequest:
        """The same question about other work."""
        return replace(
            self, batch=work.sequences, prompt_tokens=work.prompt_tokens, generate_tokens=work.generate_tokens
        )

    @property
    def only(self) -> Strategy | None:
        """The one strategy that is asked for; None: all are compared."""
        return None if self.strategy == "auto" else Strategy(self.strategy)

    @property
    def compute_dtype(self) -> str | None:
        """The dtype that is asked for; None: the faster one."""
        return None if self.dtype == "auto" else self.dtype

    @property
    def memory_bytes(self) -> int | None:
        """What each device may hold, if that was said."""
        return None if self.memory is None else parse_size(self.memory)

    @property
    def host_memory_bytes(self) -> int | None:
        """What each node's host memory may hold, if that was said."""
        return None if self.host_memory is None else parse_size(self.host_memory)

    @property
    def read_limit_bytes_per_s(self) -> float | None:
        """No faster than this, if that was said."""
        return None if self.read_limit is None else parse_rate(self.read_limit)

    @property
    def speculation(self) -> Speculation | None:
        """Drafts of each pass, where there are any."""
        if self.draft_tokens is None:
            return None
        acceptance = DEFAULT_ACCEPTANCE if self.acceptance is None else self.acceptance
        return Speculation(draft_tokens=self.draft_tokens, acceptance=acceptance)


Asked = tuple[Scenario, tuple[str, ...]]
"""a scenario, and what was assumed in it, in sentences"""


def scenario_on(machine: Machine, model: Model, request: PlanRequest, *, origin: str) -> Asked:
    """The scenario of a model on a described machine, simulated where its arithmetic was measured.

    Where a CPU computes, a large head is cut into pieces. `origin` names the machine in errors. Raises
    InvalidRequestError for options that do not apply, MachineError for what the machine does not say.
    """
    if request.expert_hit_rate is not None and not any(layer.num_experts for layer in model.layers()):
        raise InvalidRequestError(
            f"{model.name} has no experts that could be found anywhere; leave --expert-hit-rate out"
        )
    request = request.within(model.context_tokens)
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
        return scenario, (*scenario.model.notes, *machine.notes, *_notes_on_budgets(scenario, machine, request))
    if request.expert_hit_rate is not None and request.only is not Strategy.EXPERTS:
        raise InvalidRequestError(
            f"--expert-hit-rate does not apply to {origin}, which was measured: experts travel with their layer. Add "
            "--strategy experts"
        )
    machine = machine.on(request.device, origin=origin)
    on_cpu = not machine.accelerators
    model = replace(model, cut_head=on_cpu)
    refuse_long_context(model, request.workload)
    scenario = (_on_cpu if on_cpu else _on_accelerator)(machine, model, request)
    return scenario, (*model.notes, *machine.notes, *_notes_on_budgets(scenario, machine, request))


def compute_dtypes(model: Model, wanted: str | None) -> tuple[str, ...]:
    """The dtypes to compare: the one that is wanted, or the stored one and float32.

    Raises MachineError where the weights are stored in a dtype that is not computed with.
    """
    stored = model.stored_dtype
    if stored not in STORED_DTYPES and stored != model.weight_format:
        raise MachineError(f"{model.name} is stored as {stored}, which no machine file has measurements of")
    if wanted is not None:
        return (wanted,)
    own = STORED_DTYPES[stored].name if stored in STORED_DTYPES else "bfloat16"
    return tuple(dict.fromkeys((own, "float32")))


def work_seconds(curve: ComputeCurve, work: Workload) -> float:
    """Seconds per weight of the whole work: how the faster of two dtypes is told."""
    prefill = curve.seconds_per_parameter(work.sequences * work.prompt_tokens)
    return prefill + (work.generate_tokens - 1) * curve.seconds_per_parameter(work.sequences)


def refuse_on_cpu(*, host_memory: bool, cpu_blocks: bool, cache_on_host: bool) -> None:
    """Raise InvalidRequestError where an option for an accelerator is given although the CPU computes."""
    for option, given in (
        ("--host-memory", host_memory),
        ("--cpu-blocks", cpu_blocks),
        ("--cache-on-host", cache_on_host),
    ):
        if given:
            raise InvalidRequestError(
                f"{option} is for an accelerator (--device cuda); the CPU has one memory, which --memory bounds"
            )


def _on_cpu(machine: Machine, model: Model, request: PlanRequest) -> Scenario:
    """The CPU computes, in the dtype that is faster there among those that fit."""
    refuse_on_cpu(
        host_memory=request.host_memory is not None,
        cpu_blocks=request.cpu_blocks,
        cache_on_host=request.cache_on_host,
    )
    free_bytes, limit = machine.host_bytes, request.read_limit_bytes_per_s
    default_bytes = max(0, free_bytes - reserve_bytes(free_bytes))
    scenario = _measured(machine, model, request, default_bytes)
    scenarios = [
        replace(scenario, compute_dtype=dtype, rates=cpu_rates(machine, model, dtype, read_limit_bytes_per_s=limit))
        for dtype in compute_dtypes(model, request.compute_dtype)
    ]
    fitting = [each for each in scenarios if minimum_bytes(each) <= each.budget_bytes]
    return min(fitting or scenarios, key=lambda each: work_seconds(each.known_rates.known_curve, request.workload))


def _on_accelerator(machine: Machine, model: Model, request: PlanRequest) -> Scenario:
    """An accelerator computes, in the stored dtype unless another one was asked for, as a run on it does."""
    accelerator, host_bytes = machine.processor, machine.host_bytes
    free_bytes = accelerator.available_bytes
    budget_bytes = max(0, free_bytes - device_reserve_bytes(free_bytes))
    host_budget_bytes = max(0, host_bytes - host_reserve_bytes(host_bytes))
    dtype = compute_dtypes(model, request.compute_dtype)[0]
    rates = accelerator_rates(
        machine,
        model,
        dtype,
        read_limit_bytes_per_s=request.read_limit_bytes_per_s,
        cpu_layer=_cpu_layer(machine, model, request, dtype),
    )
    return replace(
        _measured(machine, model, request, budget_bytes),
        compute_dtype=dtype,
        host_budget_bytes=host_budget_bytes if request.host_memory_bytes is None else request.host_memory_bytes,
        device=accelerator.device,
        pinned=accelerator.copies is not None and accelerator.copies.page_locked,
        allow_cpu=request.cpu_blocks,
        allow_host_cache=request.cache_on_host,
        rates=rates,
    )


def _measured(machine: Machine, model: Model, request: PlanRequest, default_bytes: int) -> Scenario:
    """What is asked of any measured device."""
    return Scenario(
        model=model,
        workload=request.workload,
        budget_bytes=default_bytes if request.memory_bytes is None else request.memory_bytes,
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
        ("--dtype", request.compute_dtype is not None, "use --weights"),
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
