"""A planning case in which an accelerator computes, fed over its link from host memory and from the disk."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from headrace.cli.planning_case import Asked, PlanningCase, constants_of
from headrace.errors import BudgetError, MachineError
from headrace.machine.machine import Machine
from headrace.model.stored_model import StoredModel
from headrace.planning.accelerator_memory import AcceleratorRequest
from headrace.planning.accelerator_pace import AcceleratorPace, predict_on_accelerator
from headrace.planning.accelerator_planner import (
    minimum_bytes_on_accelerator,
    plan_fastest_on_accelerator,
    plan_on_accelerator,
)
from headrace.planning.estimate import LayerTimes, Prediction
from headrace.planning.estimate_interval import PredictionInterval, prediction_interval
from headrace.planning.load_options import compute_dtypes, device_reserve_bytes, host_reserve_bytes
from headrace.planning.plan import Plan, Strategy, Workload
from headrace.planning.planner import Candidate
from headrace.planning.probed_pace import pace_from_probe, processor_layer_from_probe
from headrace.units import format_bytes, format_rate

if TYPE_CHECKING:
    from headrace.streaming.checkpoint import Checkpoint
    from headrace.streaming.device import Device


@dataclass(frozen=True, kw_only=True)
class AcceleratorCase(PlanningCase):
    """The runtime's planner for an accelerator, and what it is asked.

    The pace knows how fast the processor computes a layer, where that is known, even if it may compute none.
    """

    request: AcceleratorRequest
    pace: AcceleratorPace

    def plan(self, strategy: Strategy) -> Candidate:
        """Return the strategy's fastest plan."""
        return plan_on_accelerator(self.request, strategy, self.pace)

    def with_budget(self, budget_bytes: int) -> Candidate:
        """Return the fastest plan under another budget of the device's memory."""
        return plan_fastest_on_accelerator(replace(self.request, budget_bytes=budget_bytes), self.pace)

    def with_host_budget(self, budget_bytes: int) -> Candidate:
        """Return the fastest plan under another budget of host memory."""
        return plan_fastest_on_accelerator(replace(self.request, host_budget_bytes=budget_bytes), self.pace)

    def with_processor(self) -> Candidate:
        """Return the fastest plan in which the processor may compute layers."""
        return plan_fastest_on_accelerator(replace(self.request, allow_cpu=True), self.pace)

    def predict(self, plan: Plan) -> Prediction:
        """Predict without what the rehearsal found; layers of the processor take as long as in the asked workload."""
        return self.predict_at(replace(self.pace, device=replace(self.pace.device, layer=None)), plan)

    def predict_at(self, pace: AcceleratorPace, plan: Plan) -> Prediction:
        """Predict what the plan does at another pace."""
        return predict_on_accelerator(self.request.model, plan, pace, pinned=self.request.pinned)

    def least_bytes(self, workload: Workload) -> int:
        """Return the smallest budget of the device's memory for this work."""
        return minimum_bytes_on_accelerator(replace(self.request, workload=workload))

    def bytes_for_all(self) -> int | None:
        """Return the smallest budget with which the device holds all weights, keys and values."""
        alone = replace(self.request, allow_cpu=False, allow_host_cache=False)
        try:
            return minimum_bytes_on_accelerator(alone, Strategy.RESIDENT)
        except BudgetError:
            return None

    def interval(self, candidate: Candidate) -> PredictionInterval:
        """Move the rates of disk and link and the time of computing."""
        return prediction_interval(
            self.request.model,
            candidate,
            self.pace,
            read_is_limited=self.read_is_limited,
            pinned=self.request.pinned,
        )

    def describe_machine(self) -> str:
        """Name the rates of disk and link, and both budgets."""
        device, name = self.machine["device"], self.machine["accelerator"]
        return (
            f"reads {format_rate(self.pace.device.read_bytes_per_s)}, copies {format_rate(self.pace.link_bytes_per_s)} "
            f"to {device if name == device else f'{device} ({name})'}; headrace may hold "
            f"{format_bytes(self.request.budget_bytes)} of it and {format_bytes(self.request.host_budget_bytes)} of "
            "the host"
        )


def measured_accelerator(checkpoint: Checkpoint, device: Device, asked: Asked) -> AcceleratorCase:
    """Measure this machine's disk, link, accelerator and processor with the model.

    Raises BudgetError where less is free than was asked for, as a run does.
    """
    from headrace.inference.accelerator_study import rehearse_processor, study_accelerator
    from headrace.inference.skeleton import read_transformers_config
    from headrace.streaming.cuda_device import list_gpus
    from headrace.streaming.device_budget import device_budget_bytes, host_budget_bytes, refuse_what_is_not_free

    options = asked.options(checkpoint.model, lambda: device_budget_bytes(device), host_budget_bytes)
    refuse_what_is_not_free(device, options.budget_bytes, options.host_budget_bytes)
    config = read_transformers_config(checkpoint.directory)
    request, pace, notes = study_accelerator(checkpoint, options, config, device)
    if asked.cpu_blocks and pace.processor_layer is None:
        notes = (*notes, "--cpu-blocks: the host's budget does not even hold a layer to try, so none is planned")
    names = {f"cuda:{gpu.number}": gpu.name for gpu in list_gpus()}
    case = AcceleratorCase(
        request=request,
        pace=pace,
        notes=notes,
        machine={
            "name": platform.node() or "this machine",
            "processors": os.cpu_count(),
            "source": "measured just now with this model",
            **_constants(request, pace, accelerator=names.get(device.name, device.name)),
        },
        read_is_limited=asked.read_limit is not None,
    )
    enough_bytes = case.bytes_for_all()
    if asked.cpu_blocks or (enough_bytes is not None and enough_bytes <= request.budget_bytes):
        return case
    # What the processor could add is worth knowing where not everything fits on the device.
    layer = rehearse_processor(checkpoint, options, config, request)
    return replace(case, pace=replace(pace, processor_layer=layer))


def described_accelerator(model: StoredModel, asked: Asked, machine: Machine, *, origin: str) -> AcceleratorCase:
    """Take a file's machine that computes on an accelerator: its free memory and all of the host's, less reserves.

    Computes in the stored dtype unless another one was asked for, as a run on an accelerator does. Raises MachineError
    where the file holds no measurement of that.
    """
    accelerator, host_bytes = machine.processor, machine.host_bytes
    free_bytes = accelerator.available_bytes
    options = asked.options(
        model,
        lambda: max(0, free_bytes - device_reserve_bytes(free_bytes)),
        lambda: max(0, host_bytes - host_reserve_bytes(host_bytes)),
    )
    dtype = compute_dtypes(model, asked.dtype)[0]
    request = AcceleratorRequest(
        model=model,
        workload=asked.workload,
        compute_dtype=dtype,
        budget_bytes=options.budget_bytes,
        host_budget_bytes=options.host_budget_bytes,
        device=accelerator.device,
        pinned=accelerator.copies is not None and accelerator.copies.page_locked,
        allow_cpu=asked.cpu_blocks,
        allow_host_cache=asked.cache_on_host,
    )
    pace = pace_from_probe(
        machine,
        model,
        compute_dtype=dtype,
        read_limit_bytes_per_s=options.read_limit_bytes_per_s,
        processor_layer=_processor_layer(machine, model, asked, dtype),
    )
    return AcceleratorCase(
        request=request,
        pace=pace,
        notes=_notes_on_file(request, asked, machine),
        machine={
            "name": machine.name,
            "memory_bytes": host_bytes,
            "source": origin,
            "device_memory_bytes": int(accelerator.memory_bytes),
            "device_free_bytes": free_bytes,
            **_constants(request, pace, accelerator=accelerator.name),
        },
        read_is_limited=options.read_limit_bytes_per_s is not None,
    )


def _processor_layer(machine: Machine, model: StoredModel, asked: Asked, dtype: str) -> LayerTimes | None:
    """None where the file does not say and nobody asked."""
    try:
        return processor_layer_from_probe(machine, model, asked.workload, compute_dtype=dtype)
    except MachineError:
        if asked.cpu_blocks:
            raise
        return None


def _notes_on_file(request: AcceleratorRequest, asked: Asked, machine: Machine) -> tuple[str, ...]:
    accelerator, notes = machine.processor, []
    if asked.memory is None:
        free_bytes = accelerator.available_bytes
        notes.append(
            f"budget on {accelerator.device}: {format_bytes(free_bytes)} that were free when it was measured, less "
            f"{format_bytes(device_reserve_bytes(free_bytes))} in reserve"
        )
    elif request.budget_bytes > accelerator.memory_bytes:
        notes.append(
            f"--memory is more than {format_bytes(accelerator.memory_bytes)}, all that {accelerator.name} has: planned "
            "as if it had so much"
        )
    if asked.host_memory is None:
        reserve = format_bytes(host_reserve_bytes(machine.host_bytes))
        notes.append(f"budget on the host: its {format_bytes(machine.host_bytes)} less {reserve} in reserve")
    if not request.pinned:
        notes.append("no host memory was page-locked when it was measured: blocks travel more slowly, through a ring")
    if request.allow_cpu:
        notes.append("the processor may compute layers: results may differ from the device's own in rounding")
    return tuple(notes)


def _constants(request: AcceleratorRequest, pace: AcceleratorPace, *, accelerator: str) -> dict[str, Any]:
    """List the speeds that the prediction rests on."""
    return {
        "device": request.device,
        "accelerator": accelerator,
        "link_bytes_per_s": pace.link_bytes_per_s,
        "staged_bytes_per_s": pace.staged_bytes_per_s,
        "page_locked": request.pinned,
        **constants_of(request.model, pace.device),
    }
