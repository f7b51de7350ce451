"""The question that `headrace plan` puts to the planner for a checkpoint: on this machine, or on one of a file.

Measuring takes a second or two and needs torch. A machine file, written by `headrace probe` here or elsewhere, needs
none; the model is then known by its headers alone.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from headrace.errors import MachineError
from headrace.machine.machine import Machine
from headrace.model.config_fields import read_config
from headrace.model.safetensors_index import TensorIndex
from headrace.model.stored_model import StoredModel, build_stored_model
from headrace.planning.infeasible import budget_for_everything, minimum_bytes
from headrace.planning.load_options import (
    Options,
    compute_dtypes,
    device_reserve_bytes,
    host_reserve_bytes,
    make_options,
    reserve_bytes,
    work_seconds,
)
from headrace.planning.plan import Strategy
from headrace.planning.probed_rates import accelerator_rates, cpu_layer_times, cpu_rates
from headrace.planning.rates import LayerTimes
from headrace.planning.scenario import Scenario
from headrace.planning.workload import Workload
from headrace.units import format_bytes, format_rate

if TYPE_CHECKING:
    from headrace.streaming.checkpoint import Checkpoint


class Asked(NamedTuple):
    """The options of `headrace plan` as given; None where the default is wanted."""

    memory: str | None
    workload: Workload
    strategy: Strategy | None
    dtype: str | None
    read_limit: str | None
    device: str = "auto"
    host_memory: str | None = None
    cpu_blocks: bool = False
    cache_on_host: bool = False

    def options(
        self,
        model: StoredModel,
        default_budget_bytes: Callable[[], int],
        default_host_budget_bytes: Callable[[], int] | None = None,
    ) -> Options:
        """Check what was asked for; `default_host_budget_bytes` is None where the CPU computes.

        The strategy is left open: one that does not fit is answered, not refused. Raises InvalidRequestError for what
        this model or this device cannot do.
        """
        return make_options(
            model,
            memory=self.memory,
            default_budget_bytes=default_budget_bytes,
            dtype=self.dtype or "auto",
            batch=self.workload.sequences,
            prompt_tokens=self.workload.prompt_tokens,
            max_tokens=self.workload.context_tokens,
            read_limit=self.read_limit,
            host_memory=self.host_memory,
            default_host_budget_bytes=default_host_budget_bytes,
            cpu_blocks=self.cpu_blocks,
            cache_on_host=self.cache_on_host,
        )


@dataclass(frozen=True, kw_only=True)
class PlanningCase:
    """A scenario, and where its numbers come from.

    The rates know how fast the CPU computes a layer for an accelerator, where that is known, even if it may compute
    none.
    """

    scenario: Scenario
    notes: tuple[str, ...]
    machine: dict[str, Any]
    """of the machine what JSON shows; `name` and, with an accelerator, `accelerator`"""

    def describe_machine(self) -> str:
        """How fast the machine moves bytes, and what headrace may hold of it, in half a sentence."""
        scenario, rates = self.scenario, self.scenario.known_rates
        reads, budget = format_rate(rates.read_bytes_per_s), format_bytes(scenario.budget_bytes)
        if scenario.on_cpu:
            return f"reads {reads}; headrace may hold {budget}"
        device, name = scenario.device, self.machine["accelerator"]
        return (
            f"reads {reads}, copies {format_rate(rates.link_bytes_per_s)} to "
            f"{device if name == device else f'{device} ({name})'}; headrace may hold {budget} of it and "
            f"{format_bytes(scenario.host_budget_bytes)} of the host"
        )


def measured_here(directory: Path, asked: Asked) -> PlanningCase:
    """Measure this machine with the model in `directory`, on the device that a run would take.

    Raises BudgetError where less is free than was asked for, as a run does.
    """
    from headrace.inference.calibration import calibrate
    from headrace.inference.skeleton import read_transformers_config
    from headrace.streaming.checkpoint import Checkpoint
    from headrace.streaming.cuda_device import list_gpus
    from headrace.streaming.device_budget import device_budget_bytes, host_budget_bytes, refuse_what_is_not_free
    from headrace.streaming.devices import open_device

    device = open_device(asked.device)
    checkpoint = Checkpoint(directory, cut_head=device.uses_host_memory)
    try:
        options = asked.options(
            checkpoint.model,
            lambda: device_budget_bytes(device),
            None if device.uses_host_memory else host_budget_bytes,
        )
        if not device.uses_host_memory:
            refuse_what_is_not_free(device, options.budget_bytes, options.host_budget_bytes)
        config = read_transformers_config(checkpoint.directory)
        scenario, notes = calibrate(checkpoint, options, config, device)
        if not device.uses_host_memory:
            scenario, notes = _with_cpu_layer(checkpoint, options, config, scenario, notes)
        names = {f"cuda:{gpu.number}": gpu.name for gpu in list_gpus()}
        return PlanningCase(
            scenario=scenario,
            notes=notes,
            machine={
                "name": platform.node() or "this machine",
                "processors": os.cpu_count(),
                "source": "measured just now with this model",
                **_constants(scenario, accelerator=names.get(device.name, device.name)),
            },
        )
    finally:
        checkpoint.close()


def _with_cpu_layer(
    checkpoint: Checkpoint, options: Options, config: Any, scenario: Scenario, notes: tuple[str, ...]
) -> tuple[Scenario, tuple[str, ...]]:
    """Time a layer on the CPU as well where not everything fits on the device, to know what the CPU could add."""
    from headrace.inference.calibration import time_cpu_layer

    rates = scenario.known_rates
    if options.cpu_blocks:
        if rates.cpu_layer is None:
            notes = (*notes, "--cpu-blocks: the host's budget does not even hold a layer to try, so none is planned")
        return scenario, notes
    enough_bytes = budget_for_everything(scenario)
    if enough_bytes is not None and enough_bytes <= scenario.budget_bytes:
        return scenario, notes
    layer = time_cpu_layer(checkpoint, options, config, scenario)
    return scenario.at(replace(rates, cpu_layer=layer)), notes


def from_description(directory: Path, asked: Asked, machine: Machine, *, origin: str) -> PlanningCase:
    """Plan for the machine of a file: its first accelerator, or the device that was asked for.

    Raises InvalidRequestError for a device that the file does not describe, MachineError for what it does not say.
    """
    machine = machine.on(asked.device, origin=origin)
    on_cpu = not machine.accelerators
    config, index = read_config(directory / "config.json"), TensorIndex.from_directory(directory)
    model = build_stored_model(directory.resolve().name, config, index, cut_head=on_cpu)
    if on_cpu:
        return _described_cpu(model, asked, machine, origin=origin)
    return _described_accelerator(model, asked, machine, origin=origin)


def _described_cpu(model: StoredModel, asked: Asked, machine: Machine, *, origin: str) -> PlanningCase:
    """Take the CPU of a machine file, with the dtype that is faster there among those that fit."""
    free_bytes = machine.host_bytes
    options = asked.options(model, lambda: max(0, free_bytes - reserve_bytes(free_bytes)))
    notes: tuple[str, ...] = ()
    if asked.memory is None:
        reserve = format_bytes(reserve_bytes(free_bytes))
        notes = (f"budget: the machine's {format_bytes(free_bytes)} less {reserve} in reserve",)
    scenarios = [
        Scenario(
            model=model,
            workload=asked.workload,
            compute_dtype=name,
            budget_bytes=options.budget_bytes,
            rates=cpu_rates(machine, model, compute_dtype=name, read_limit_bytes_per_s=options.read_limit_bytes_per_s),
            read_is_limited=options.read_limit_bytes_per_s is not None,
        )
        for name in compute_dtypes(model, asked.dtype)
    ]
    fitting = [each for each in scenarios if minimum_bytes(each) <= each.budget_bytes]
    scenario = min(fitting or scenarios, key=lambda each: work_seconds(each.known_rates.curve, asked.workload))
    about = {"name": machine.name, "memory_bytes": machine.host_bytes, "source": origin}
    return PlanningCase(scenario=scenario, notes=notes, machine={**about, **_constants(scenario)})


def _described_accelerator(model: StoredModel, asked: Asked, machine: Machine, *, origin: str) -> PlanningCase:
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
    scenario = Scenario(
        model=model,
        workload=asked.workload,
        compute_dtype=dtype,
        budget_bytes=options.budget_bytes,
        host_budget_bytes=options.host_budget_bytes,
        device=accelerator.device,
        pinned=accelerator.copies is not None and accelerator.copies.page_locked,
        allow_cpu=asked.cpu_blocks,
        allow_host_cache=asked.cache_on_host,
        rates=accelerator_rates(
            machine,
            model,
            compute_dtype=dtype,
            read_limit_bytes_per_s=options.read_limit_bytes_per_s,
            cpu_layer=_cpu_layer(machine, model, asked, dtype),
        ),
        read_is_limited=options.read_limit_bytes_per_s is not None,
    )
    return PlanningCase(
        scenario=scenario,
        notes=_notes_on_file(scenario, asked, machine),
        machine={
            "name": machine.name,
            "memory_bytes": host_bytes,
            "source": origin,
            "device_memory_bytes": int(accelerator.memory_bytes),
            "device_free_bytes": free_bytes,
            **_constants(scenario, accelerator=accelerator.name),
        },
    )


def _cpu_layer(machine: Machine, model: StoredModel, asked: Asked, dtype: str) -> LayerTimes | None:
    """None where the file does not say and nobody asked."""
    try:
        return cpu_layer_times(machine, model, asked.workload, compute_dtype=dtype)
    except MachineError:
        if asked.cpu_blocks:
            raise
        return None


def _notes_on_file(scenario: Scenario, asked: Asked, machine: Machine) -> tuple[str, ...]:
    accelerator, notes = machine.processor, []
    if asked.memory is None:
        free_bytes = accelerator.available_bytes
        notes.append(
            f"budget on {accelerator.device}: {format_bytes(free_bytes)} that were free when it was measured, less "
            f"{format_bytes(device_reserve_bytes(free_bytes))} in reserve"
        )
    elif scenario.budget_bytes > accelerator.memory_bytes:
        notes.append(
            f"--memory is more than {format_bytes(accelerator.memory_bytes)}, all that {accelerator.name} has: planned "
            "as if it had so much"
        )
    if asked.host_memory is None:
        reserve = format_bytes(host_reserve_bytes(machine.host_bytes))
        notes.append(f"budget on the host: its {format_bytes(machine.host_bytes)} less {reserve} in reserve")
    if not scenario.pinned:
        notes.append("no host memory was page-locked when it was measured: blocks travel more slowly, through a ring")
    if scenario.allow_cpu:
        notes.append("the CPU may compute layers: results may differ from the device's own in rounding")
    return tuple(notes)


def _constants(scenario: Scenario, *, accelerator: str = "") -> dict[str, Any]:
    """List the speeds that a prediction rests on, as JSON shows them."""
    rates, found = scenario.known_rates, {}
    if not scenario.on_cpu:
        found = {
            "device": scenario.device,
            "accelerator": accelerator,
            "link_bytes_per_s": rates.link_bytes_per_s,
            "staged_bytes_per_s": rates.staged_bytes_per_s,
            "page_locked": scenario.pinned,
        }
    return {
        **found,
        "read_bytes_per_s": rates.read_bytes_per_s,
        "compute_dtype": rates.curve.compute_dtype,
        "stored_dtype": scenario.model.stored_dtype,
        "arithmetic": [
            {"tokens": point.tokens, "parameters_per_s": 1 / point.seconds_per_parameter}
            for point in rates.curve.points
        ],
        "block_overhead_s": rates.block_overhead_s,
        "pass_overhead_s": rates.pass_overhead_s,
    }
