"""`headrace.load`, `headrace.probe`: from a model directory and a budget to a model that runs."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from headrace.inference.assembly import assemble
from headrace.inference.calibration import time_cpu_layer
from headrace.inference.generation_defaults import read_generation_config
from headrace.inference.load_options import LoadKeywords, LoadOptions, Options
from headrace.inference.loading import Loading
from headrace.inference.remembered import calibrated
from headrace.inference.sources.model_source import resolve_model
from headrace.machine.machine import Machine
from headrace.planning.infeasible import budget_for_everything
from headrace.planning.jobs.draft_length import DraftLength
from headrace.planning.plan import Placement, Plan
from headrace.planning.planner import plan_fastest, plan_strategy
from headrace.planning.prediction import predict
from headrace.planning.scenario import Scenario
from headrace.planning.scenarios import PlanRequest
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.device import Device
from headrace.streaming.devices import maker_name, open_device
from headrace.streaming.probe import machine as machine_probe
from headrace.streaming.system_memory import keep_heap_small
from headrace.units import format_bytes

DRAFTS_TIMED = (3, 7, 15, 31)
"""numbers of drafts with which a layer is timed"""


def load(model: str | Path, **options: Unpack[LoadKeywords]) -> Any:
    """Return the transformers model in `model` with weights that stream within `memory` bytes of the device's memory.

    The options are the fields of `LoadOptions`, with its defaults. Sizes are bytes or text such as 2GiB; what is not
    given is what is free, less a reserve.

    memory, device, host_memory: `device` is auto (what HEADRACE_DEVICE names, else the first GPU, else the CPU), cpu,
        cuda or cuda:N. On a GPU blocks that do not fit wait in up to `host_memory` bytes of page-locked host memory,
        the rest on the disk.
    cpu_blocks, cache_on_host, compile_layers: the CPU may compute some of a GPU's blocks; keys and values may wait on
        the host; torch.compile fuses small operations. The first and the last change results by rounding; without them
        results equal those of a run with everything resident bit for bit.
    batch, prompt_tokens, max_tokens: what the KV cache and the work space are planned for; `max_tokens` are prompt and
        new tokens together. Generation beyond that is refused before it starts.
    strategy, dtype: auto, resident, sequential or overlap; auto, float32, bfloat16 or float16.
    draft_tokens: transformers' assisted generation (`prompt_lookup_num_tokens` or `assistant_model`) drafts as many
        tokens as pay, up to so many, for one sequence at a time.
    read_limit: bounds the reader, in bytes per second, or as text such as 500MB/s.
    machine: what `headrace.probe` or a machine file says of the disk, and of a GPU, which then is not measured again.
    attention, trust_remote_code: transformers' name of an attention function; run code that comes with the model.
    fresh: measure again, and not take what an earlier start measured.
    poison: overwrite memory that is given back, to find late uses.

    The model is a context manager; `model.headrace` holds plan, prediction, timeline and `close()`.
    Raises CheckpointError, UnsupportedModelError, BudgetError, InvalidRequestError.
    """
    started = time.perf_counter()
    asked = LoadOptions(**options)
    device = open_device(asked.device)
    checkpoint = Checkpoint(resolve_model(model), cut_head=device.uses_host_memory)
    generation_config = read_generation_config(checkpoint.directory)
    loaded = load_checkpoint(checkpoint, asked.checked(checkpoint.model, device), device, started=started)
    if generation_config is not None:
        loaded.generation_config = generation_config
    return loaded


def load_checkpoint(checkpoint: Checkpoint, options: Options, device: Device, *, started: float) -> Any:
    """Measure, plan, take the memory, start the stream, and return the model; its generation config is the caller's.

    For an accelerator the checkpoint was opened with its head in one piece. `started`: when loading began.
    """
    loading = Loading.of(checkpoint, options, device)
    keep_heap_small()
    drafts = options.asked.draft_tokens
    calibration = calibrated(loading, pass_tokens=[1 + count for count in DRAFTS_TIMED if count <= drafts])
    scenario = calibration.scenario
    candidate = plan_fastest(scenario) if options.strategy is None else plan_strategy(scenario, options.strategy)
    model = assemble(loading, candidate, calibration, started=started)
    if drafts:
        model.headrace.draft_length = draft_length(scenario, candidate.plan, drafts)
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
    age_s: float
    """since it was measured, where an earlier start did that"""


def calibrated_for_planning(directory: Path, request: PlanRequest) -> PlannedHere:
    """Measure this machine with the model in `directory`, on the device that a run would take.

    Raises BudgetError where less is free than was asked for, as a run does.
    """
    device = open_device(request.device)
    checkpoint = Checkpoint(directory, cut_head=device.uses_host_memory)
    try:
        request = request.within(checkpoint.model.context_tokens)
        asked = LoadOptions(
            memory=request.memory,
            host_memory=request.host_memory,
            dtype=request.dtype,
            batch=request.batch,
            prompt_tokens=request.prompt_tokens,
            max_tokens=request.workload.context_tokens,
            read_limit=request.read_limit,
            cpu_blocks=request.cpu_blocks,
            cache_on_host=request.cache_on_host,
            fresh=request.fresh,
        )
        loading = Loading.of(checkpoint, asked.checked(checkpoint.model, device), device)
        scenario, notes, _, age_s = calibrated(loading)
        if not device.uses_host_memory:
            scenario, notes = _with_cpu_layer(loading, scenario, notes)
        if request.speculation is not None:
            scenario = replace(scenario, draft_tokens=request.speculation.draft_tokens, speculation=request.speculation)
        name = "" if device.uses_host_memory else maker_name(device)
        return PlannedHere(scenario, notes, name, age_s)
    finally:
        checkpoint.close()


def _with_cpu_layer(loading: Loading, scenario: Scenario, notes: tuple[str, ...]) -> tuple[Scenario, tuple[str, ...]]:
    """Time a layer on the CPU as well where not everything fits on the device, to know what the CPU could add."""
    rates = scenario.known_rates
    if scenario.allow_cpu:
        if rates.cpu_layer is None:
            notes = (*notes, "--cpu-blocks: the host's budget does not even hold a layer to try, so none is planned")
        return scenario, notes
    enough_bytes = budget_for_everything(scenario)
    if enough_bytes is not None and enough_bytes <= scenario.budget_bytes:
        return scenario, notes
    layer = time_cpu_layer(loading, scenario)
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
