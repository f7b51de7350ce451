"""`headrace.load`, `headrace.probe`: from a model directory and a budget to a model that runs."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from headrace.inference.assembly import assemble
from headrace.inference.calibration import calibrate, time_cpu_layer
from headrace.inference.model_source import resolve_model
from headrace.inference.skeleton import read_transformers_config
from headrace.machine.machine import Machine
from headrace.planning.infeasible import budget_for_everything
from headrace.planning.jobs.draft_length import DraftLength
from headrace.planning.load_options import Options, make_options
from headrace.planning.plan import Placement, Plan
from headrace.planning.planner import plan_fastest, plan_strategy
from headrace.planning.prediction import predict
from headrace.planning.scenario import Scenario
from headrace.planning.scenarios import PlanRequest
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.cuda_device import list_gpus
from headrace.streaming.device import CpuDevice, Device
from headrace.streaming.device_budget import device_budget_bytes, host_budget_bytes, refuse_what_is_not_free
from headrace.streaming.devices import open_device
from headrace.streaming.probe import machine as machine_probe
from headrace.streaming.system_memory import keep_heap_small
from headrace.units import format_bytes

DRAFTS_STUDIED = (3, 7, 15, 31)
"""numbers of drafts with which a layer is timed"""


def load(
    model: str | Path,
    *,
    memory: str | int | None = None,
    device: str | Device = "auto",
    host_memory: str | int | None = None,
    strategy: str = "auto",
    dtype: str = "auto",
    batch: int = 1,
    prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    read_limit: str | float | None = None,
    machine: Machine | None = None,
    attention: str | None = None,
    poison: bool = False,
    trust_remote_code: bool = False,
    draft_tokens: int = 0,
    cpu_blocks: bool = False,
    cache_on_host: bool = False,
    compile_layers: bool = False,
) -> Any:
    """Return the transformers model in `model` with weights that stream within `memory` bytes of the device's memory.

    `device` is auto (what HEADRACE_DEVICE names, else the first GPU, else the processor), cpu, cuda or cuda:N. On a GPU
    blocks that do not fit wait in up to `host_memory` bytes of page-locked host memory, the rest on the disk; with
    `cpu_blocks` the processor may compute some of them, with `cache_on_host` keys and values may wait on the
    host, with `compile_layers` torch.compile fuses the small operations. The first and the last of these change results
    by rounding; without them they equal those of a run with everything resident bit for bit.

    `batch`, `prompt_tokens` and `max_tokens` (prompt and new tokens together) say what the KV cache and the work
    space are planned for; generation beyond that is refused before it starts. `strategy` is auto, resident,
    sequential or overlap; `dtype` auto, float32, bfloat16 or float16. `read_limit` bounds the reader (bytes per
    second, or text such as 500MB/s). With `draft_tokens`, transformers' assisted
    generation (`prompt_lookup_num_tokens` or `assistant_model`) drafts as many tokens as pay, up to so many, for one
    sequence at a time. The model is a context manager; `model.headrace` holds plan, prediction, timeline and
    `close()`.

    Raises CheckpointError, UnsupportedModelError, BudgetError, InvalidRequestError.
    """
    started = time.perf_counter()
    computing = open_device(device)
    checkpoint = Checkpoint(resolve_model(model), cut_head=computing.uses_host_memory)
    options = make_options(
        checkpoint.model,
        memory=memory,
        default_budget_bytes=lambda: device_budget_bytes(computing),
        host_memory=host_memory,
        default_host_budget_bytes=None if computing.uses_host_memory else host_budget_bytes,
        strategy=strategy,
        dtype=dtype,
        batch=batch,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        read_limit=read_limit,
        machine=machine,
        attention=attention,
        poison=poison,
        trust_remote_code=trust_remote_code,
        draft_tokens=draft_tokens,
        cpu_blocks=cpu_blocks,
        cache_on_host=cache_on_host,
        compile_layers=compile_layers,
    )
    return load_checkpoint(checkpoint, options, device=computing, started=started)


def load_checkpoint(
    checkpoint: Checkpoint, options: Options, *, device: Device | None = None, started: float | None = None
) -> Any:
    """Measure, plan, take the memory, start the stream, and return the model. See `load`.

    `device`: the processor by default; for an accelerator the checkpoint was opened with its head in one piece.
    """
    started = time.perf_counter() if started is None else started
    device = CpuDevice() if device is None else device
    refuse_what_is_not_free(device, options.budget_bytes, options.host_budget_bytes)
    keep_heap_small()
    config = read_transformers_config(checkpoint.directory, trust_remote_code=options.trust_remote_code)
    pass_tokens = [1 + count for count in DRAFTS_STUDIED if count <= options.draft_tokens]
    calibration = calibrate(checkpoint, options, config, device, pass_tokens=pass_tokens)
    scenario = calibration.scenario
    candidate = plan_fastest(scenario) if options.strategy is None else plan_strategy(scenario, options.strategy)
    model = assemble(checkpoint, config, candidate, calibration, options, device=device, started=started)
    if options.draft_tokens:
        model.headrace.draft_length = draft_length(scenario, candidate.plan, options.draft_tokens)
    return model


def draft_length(scenario: Scenario, plan: Plan, most: int) -> DraftLength:
    """What chooses the number of drafts, from the pass times that the planner predicts."""
    scenario = scenario.without_layer

    @cache
    def pass_s(tokens: int) -> float:
        carried = replace(plan, workload=replace(plan.workload, sequences=tokens))
        return predict(carried, scenario).decode_s_per_pass

    return DraftLength(pass_s=pass_s, most=most)


class PlannedHere(NamedTuple):
    """A scenario of this machine, measured with a model, what was found in sentences, and the accelerator's name."""

    scenario: Scenario
    notes: tuple[str, ...]
    accelerator: str


def calibrated_for_planning(directory: Path, request: PlanRequest) -> PlannedHere:
    """Measure this machine with the model in `directory`, on the device that a run would take.

    Raises BudgetError where less is free than was asked for, as a run does.
    """
    device = open_device(request.device)
    checkpoint = Checkpoint(directory, cut_head=device.uses_host_memory)
    try:
        options = make_options(
            checkpoint.model,
            memory=request.memory_bytes,
            default_budget_bytes=lambda: device_budget_bytes(device),
            dtype=request.dtype or "auto",
            batch=request.workload.sequences,
            prompt_tokens=request.workload.prompt_tokens,
            max_tokens=request.workload.context_tokens,
            read_limit=request.read_limit_bytes_per_s,
            host_memory=request.host_memory_bytes,
            default_host_budget_bytes=None if device.uses_host_memory else host_budget_bytes,
            cpu_blocks=request.cpu_blocks,
            cache_on_host=request.cache_on_host,
        )
        if not device.uses_host_memory:
            refuse_what_is_not_free(device, options.budget_bytes, options.host_budget_bytes)
        config = read_transformers_config(checkpoint.directory)
        scenario, notes, _ = calibrate(checkpoint, options, config, device)
        if not device.uses_host_memory:
            scenario, notes = _with_cpu_layer(checkpoint, options, config, scenario, notes)
        names = {f"cuda:{gpu.number}": gpu.name for gpu in list_gpus()}
        name = "" if device.uses_host_memory else names.get(device.name, device.name)
        return PlannedHere(scenario, notes, name)
    finally:
        checkpoint.close()


def _with_cpu_layer(
    checkpoint: Checkpoint, options: Options, config: Any, scenario: Scenario, notes: tuple[str, ...]
) -> tuple[Scenario, tuple[str, ...]]:
    """Time a layer on the CPU as well where not everything fits on the device, to know what the CPU could add."""
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


def probe(directory: str | Path = ".", device: str | Device = "auto") -> Machine:
    """Measure this machine, the disk that `directory` lies on, and the accelerator that `device` means, if any."""
    return machine_probe.probe_machine(Path(directory), device=device)


def describe_plan(plan: Plan) -> str:
    """One line about a plan for people."""
    if plan.uses_host_memory:
        return (
            f"{plan.strategy.value}: {plan.resident_blocks} of {plan.num_blocks} blocks resident, {plan.slots} slots, "
            f"{format_bytes(plan.streamed_bytes_per_pass)} read per pass, {plan.compute_dtype}, "
            f"{format_bytes(plan.memory.total_bytes)} of {format_bytes(plan.budget_bytes)}"
        )
    words = {
        Placement.DEVICE: f"on {plan.device}",
        Placement.HOST: "in host memory",
        Placement.DISK: "on the disk",
        Placement.CPU: "on the CPU",
    }
    where = ", ".join(
        f"{plan.placements.count(placement)} {text}"
        for placement, text in words.items()
        if placement in plan.placements
    )
    cache = ", keys and values on the host" if plan.cache_on_host else ""
    return (
        f"{plan.strategy.value}: of {plan.num_blocks} blocks {where}; {plan.slots} slots, "
        f"{format_bytes(plan.streamed_bytes_per_pass)} copied per pass, {plan.compute_dtype}{cache}, "
        f"{format_bytes(plan.memory.total_bytes)} of {format_bytes(plan.budget_bytes)} on the device, "
        f"{format_bytes(plan.host_memory.total_bytes)} of {format_bytes(plan.host_budget_bytes)} on the host"
    )
