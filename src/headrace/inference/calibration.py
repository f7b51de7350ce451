"""Measure what planning needs of one model on this machine: dtype, disk, arithmetic, link, one layer timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from headrace.dtypes import STORED_DTYPES
from headrace.errors import BudgetError, UnsupportedModelError
from headrace.inference.layer_timing import Timed, TimedLayer, time_layer
from headrace.inference.loading import Loading
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.machine.machine import Machine, Processor
from headrace.model.layout import align_down
from headrace.model.model import WORK_SPACE_CONSTANT_BYTES
from headrace.model.stored_model import StoredModel
from headrace.planning.infeasible import minimum_bytes, refuse_below_minimum
from headrace.planning.measured_rates import over_link
from headrace.planning.memory import MemoryAccount
from headrace.planning.rates import LayerTimes, Rates
from headrace.planning.scenario import Scenario
from headrace.planning.scenarios import compute_dtypes, work_seconds
from headrace.planning.workload import JobMemory
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.device import CpuDevice, Device
from headrace.streaming.device_budget import note_what_there_is_not
from headrace.streaming.pressure import PressureGauge
from headrace.streaming.probe import machine as machine_probe
from headrace.streaming.probe.link import probe_accelerator
from headrace.streaming.probe.sizes import ProbeSizes
from headrace.streaming.torch_dtypes import STORED_TORCH_DTYPES, TORCH_DTYPES
from headrace.units import format_rate

QUICK_READ_S = 0.25
QUICK_CURVE_TOKENS = (1, 4, 16, 64, 256)
CONTENTION_MIN_BYTES = 100 << 20
"""Smaller checkpoints are not worth the half second of measuring how reading and computing slow each other."""
NEAR_TOKENS_MAX = 1 << 16
NEAR_BUDGET_PART = 16
NEAR_S_MAX = 0.5
"""Near break-even no layer is timed at more tokens than it computes in this time."""
QUICK_PROBE = ProbeSizes(
    size_bytes=64 << 20,
    tokens=(1, 16, 128, 1024, 4096, 16384),
    rotated_bytes=128 << 20,
    repetitions=3,
    batch_s=0.004,
    launches=100,
    warm_up_s=0.1,
)
FEW_TOKENS = 64


class Calibration(NamedTuple):
    """A model and this machine, measured together: the scenario, its rates known, and what was found, in sentences."""

    scenario: Scenario
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    """those of the notes that tell of trouble, which come first"""
    age_s: float = 0.0
    """since this was measured, where an earlier start did it"""


def asked_scenario(loading: Loading, packed: JobMemory | None = None) -> Scenario:
    """The question, before anything is known of the hardware."""
    options = loading.options
    return Scenario(
        model=loading.checkpoint.model,
        workload=options.workload,
        budget_bytes=options.budget_bytes,
        host_budget_bytes=options.host_budget_bytes,
        device=loading.device.name,
        allow_cpu=options.asked.cpu_blocks,
        allow_host_cache=options.asked.cache_on_host,
        draft_tokens=options.asked.draft_tokens,
        packed=packed,
        read_is_limited=options.read_limit_bytes_per_s is not None,
    )


def calibrate(loading: Loading, *, pass_tokens: Sequence[int] = (), packed: JobMemory | None = None) -> Calibration:
    """Measure what planning needs of this model on its device. One or two seconds.

    `pass_tokens`: further numbers of tokens in a pass at which the layer is timed. `packed`: the least that packed
    passes must hold. On an accelerator it takes no more than the budget, and gives it back. Raises BudgetError before
    anything is measured where nothing could fit.
    """
    gauge = PressureGauge()
    if loading.device.uses_host_memory:
        scenario, notes = _calibrate_cpu(loading, pass_tokens, packed)
    else:
        scenario, notes = _calibrate_accelerator(loading, pass_tokens)
    pressure = gauge.pressure()
    warnings = (*note_what_there_is_not(loading.device, loading.options.budget_bytes), *pressure.notes())
    return Calibration(replace(scenario, busy=pressure.busy), (*warnings, *notes), warnings)


# -- the host's CPU -----------------------------------------------------------------------------------------------


def _calibrate_cpu(
    loading: Loading, pass_tokens: Sequence[int], packed: JobMemory | None
) -> tuple[Scenario, list[str]]:
    model, options = loading.checkpoint.model, loading.options
    notes: list[str] = []
    names = compute_dtypes(model, options.dtype)
    asked = asked_scenario(loading, packed)
    copied = loading.checkpoint.is_copied_by_transformers()
    scenarios = {
        name: replace(
            asked,
            compute_dtype=name,
            copies_weights=copied and machine_probe.products_need_alignment(TORCH_DTYPES[name]),
        )
        for name in names
    }
    fitting = [name for name in names if minimum_bytes(scenarios[name], options.strategy) <= options.budget_bytes]
    if not fitting:
        refuse_below_minimum(scenarios[names[0]], options.strategy)
    curves = {name: _cpu_curve(model, name) for name in fitting}
    name = min(fitting, key=lambda item: work_seconds(curves[item], options.workload))
    if len(names) > 1:
        compared = ", ".join(f"{n} {work_seconds(curves[n], options.workload) * 1e9:.3g}" for n in fitting)
        notes.append(f"compute dtype {name}: nanoseconds per weight of this work: {compared}")
    scenario = scenarios[name]
    disk = _measure_disk(loading, name)
    near = _near_break_even(scenario, curves[name], model.blocks[0].read_bytes / disk.busy_bytes_per_s)
    timed = time_layer(
        loading,
        TORCH_DTYPES[name],
        conversion_bytes=MemoryAccount(scenario).conversion_bytes,
        copy_misaligned=scenario.copies_weights,
        other_tokens=sorted({*near, *pass_tokens} - {options.workload.sequences}),
        device=loading.device,
    )
    notes.append(
        f"disk: {format_rate(disk.alone_bytes_per_s)} in direct reads of this checkpoint, "
        f"{format_rate(disk.busy_bytes_per_s)} while computing (then {disk.compute_slowdown:.2f} times as long)"
    )
    rates = replace(
        _layer_rates(scenario, curves[name], timed, disk.alone_bytes_per_s),
        compute_slowdown=disk.compute_slowdown,
        read_slowdown=disk.alone_bytes_per_s / disk.busy_bytes_per_s,
        read_latency_s=disk.read_latency_s,
        stall_penalty_s=timed.stall_penalty_s,
    )
    return scenario.at(rates), notes


def _cpu_curve(model: StoredModel, dtype_name: str) -> ComputeCurve:
    """Time products in the shape of the model's largest matrix."""
    stored = STORED_TORCH_DTYPES[model.stored_dtype]
    return machine_probe.compute_curve(
        stored, TORCH_DTYPES[dtype_name], shape=largest_shape(model), tokens=QUICK_CURVE_TOKENS, repetitions=3
    )


class _Disk(NamedTuple):
    """The disk as this run will see it: alone, while computing, and what reading does to computing."""

    alone_bytes_per_s: float
    busy_bytes_per_s: float
    compute_slowdown: float
    read_latency_s: float


def _measure_disk(loading: Loading, dtype_name: str) -> _Disk:
    """Read the checkpoint for a moment, alone and during a product; a limit on the reader bounds both."""
    checkpoint, limit = loading.checkpoint, loading.reader.read_limit_bytes_per_s or float("inf")
    files = checkpoint.index.files
    settings = machine_probe.ReadSettings(8 << 20, 2, 0.0)
    read_latency_s = machine_probe.handover_seconds(checkpoint.open_source(), loading.reader)
    source = checkpoint.open_source()
    try:
        if checkpoint.index.total_bytes < CONTENTION_MIN_BYTES:
            rate = machine_probe.median_read_rate(
                source,
                files,
                chunk_bytes=settings.chunk_bytes,
                threads=settings.threads,
                seconds=_read_seconds(checkpoint),
            )
            rate = min(limit, rate or 1e9)  # 0 for less than a page: nothing that could take time
            return _Disk(rate, rate, 1.0, read_latency_s)
        product = machine_probe.product_of(
            STORED_TORCH_DTYPES[checkpoint.model.stored_dtype],
            TORCH_DTYPES[dtype_name],
            shape=largest_shape(checkpoint.model),
            tokens=loading.options.workload.sequences,
        )
        slowed = machine_probe.contention(source, files, settings, product, rounds=5, seconds=0.06)
    finally:
        source.close()
    rate = slowed.read_bytes_per_s
    alone, busy = min(limit, rate), min(limit, rate / slowed.read)
    # A reader that is held back takes so much less of the CPU and of the memory's bandwidth.
    return _Disk(alone, busy, 1.0 + (slowed.compute - 1.0) * busy * slowed.read / rate, read_latency_s)


# -- an accelerator -----------------------------------------------------------------------------------------------


def _calibrate_accelerator(loading: Loading, pass_tokens: Sequence[int]) -> tuple[Scenario, list[str]]:
    model, options, device = loading.checkpoint.model, loading.options, loading.device
    name = options.dtype or STORED_DTYPES[model.stored_dtype].name
    scenario = replace(asked_scenario(loading), compute_dtype=name, pinned=_can_lock(device))
    if options.read_limit_bytes_per_s is not None:
        reader = loading.reader
        scenario = replace(scenario, chunk_bytes=reader.chunk_bytes, ring_chunks=2 * reader.reader_threads)
    refuse_below_minimum(scenario, options.strategy)
    probed = _known(options.asked.machine, device)
    if probed is None:
        sizes = _probe_sizes(largest_shape(model), options.budget_bytes)
        probed = probe_accelerator(device, name=device.name, sizes=sizes, compute_dtypes=(name,))
        device.release_cached()
    copies = probed.copies
    assert copies is not None
    curve = replace(
        next(curve for curve in probed.arithmetic.curves if curve.compute_dtype == name),
        stored_dtype=model.stored_dtype,
    )  # what converting costs, where weights are stored in another dtype, is timed with the layer
    link_bytes_per_s = copies.while_computing_bytes_per_s.expected
    read_bytes_per_s = _read_rate(loading)
    near = _near_break_even(scenario, curve, model.blocks[0].held_bytes / link_bytes_per_s)
    timed = time_layer(
        loading,
        TORCH_DTYPES[name],
        conversion_bytes=MemoryAccount(scenario).conversion_bytes,
        copy_misaligned=False,
        other_tokens=sorted({*pass_tokens, *near} - {options.workload.sequences}),
        device=device,
    )
    on_cpu = time_cpu_layer(loading, scenario) if scenario.allow_cpu else None
    rates = over_link(
        _layer_rates(scenario, curve, timed, read_bytes_per_s),
        copies,
        hidden_bytes=model.hidden_size * TORCH_DTYPES[name].itemsize,
        memory_copy_bytes_per_s=machine_probe.memory_copy_rate(),
        cpu_layer=on_cpu,
    )
    notes = [
        f"link to {device.name}: {format_rate(copies.bytes_per_s.expected)} from page-locked memory alone, "
        f"{format_rate(link_bytes_per_s)} while computing, "
        f"{format_rate(copies.pageable_bytes_per_s.expected)} from ordinary memory",
        f"disk: {format_rate(read_bytes_per_s)} in direct reads of this checkpoint",
    ]
    if not scenario.pinned:
        notes.append("the system lets no host memory be page-locked: blocks travel more slowly, through a ring")
    if on_cpu is not None:
        notes.append("the CPU may compute layers: results may differ from the device's own in rounding")
    return scenario.at(rates), notes


def time_cpu_layer(loading: Loading, scenario: Scenario) -> LayerTimes | None:
    """One layer computed by the CPU for an accelerator; None where the host's budget does not hold one."""
    account = MemoryAccount(scenario)
    if scenario.host_budget_bytes < 2 * loading.checkpoint.model.blocks[0].read_bytes + account.work_space_bytes:
        return None
    try:
        return time_layer(
            loading,
            TORCH_DTYPES[scenario.compute_dtype],
            conversion_bytes=account.cpu_conversion_bytes,
            copy_misaligned=False,
            device=CpuDevice(),
        ).layers[0]
    except BudgetError:
        return None


def _known(machine: Machine | None, device: Device) -> Processor | None:
    """What a machine file says of this device, which then is not measured again."""
    described = () if machine is None else machine.accelerators
    return next((own for own in described if own.device == device.name), None)


def _probe_sizes(shape: tuple[int, int], budget_bytes: int) -> ProbeSizes:
    """What is moved and multiplied, within half of the budget."""
    part = max(1 << 16, align_down(budget_bytes // 16))
    rows_bytes = 4 * (shape[0] + shape[1])
    return replace(
        QUICK_PROBE,
        shape=shape,
        size_bytes=min(QUICK_PROBE.size_bytes, part),
        rotated_bytes=min(QUICK_PROBE.rotated_bytes, part),
        tokens=tuple(count for count in QUICK_PROBE.tokens if count == 1 or count * rows_bytes <= part),
    ).within(budget_bytes)


def _can_lock(device: Device) -> bool:
    """Try it with a page."""
    arena = device.allocate_host(4096)
    pinned = arena.pinned
    arena.close()
    return pinned


def _read_rate(loading: Loading) -> float:
    """Bytes per second of direct reads of this checkpoint, no faster than the reader's limit."""
    checkpoint, reader = loading.checkpoint, loading.reader
    source = checkpoint.open_source()
    try:
        rate = machine_probe.median_read_rate(
            source,
            checkpoint.index.files,
            chunk_bytes=reader.chunk_bytes,
            threads=reader.reader_threads,
            seconds=_read_seconds(checkpoint),
        )
    finally:
        source.close()
    return min(reader.read_limit_bytes_per_s or float("inf"), rate or 1e9)


# -- either -------------------------------------------------------------------------------------------------------


def _read_seconds(checkpoint: Checkpoint) -> float:
    return min(QUICK_READ_S, max(0.02, checkpoint.index.total_bytes / 1e9))


def largest_shape(model: StoredModel) -> tuple[int, int]:
    """Rows and columns of the first layer's largest matrix, at most 8 M elements of it."""
    entries = [entry for entry in model.blocks[0].tensors if len(entry.shape) == 2]
    if not entries:
        raise UnsupportedModelError(f"{model.name}: the first layer holds no matrix")
    rows, columns = max(entries, key=lambda entry: entry.num_elements).shape
    return max(1, min(rows, (8 << 20) // columns)), columns


def _near_break_even(scenario: Scenario, curve: ComputeCurve, load_s: float) -> list[int]:
    """Tokens per pass about which computing a layer takes as long as loading it (`load_s`), and a third of that.

    There the curve is worth correcting by timing: the break-even of a plan that keeps up to two thirds of its blocks
    lies between. No more tokens than a part of the budget holds; on a CPU none where the work's own are as good. On an
    accelerator few tokens as well: enqueuing binds at few and arithmetic at many.
    """
    model, tokens_now = scenario.model, scenario.workload.sequences
    tokens, target_s = 1, min(load_s, NEAR_S_MAX)
    while model.blocks[0].active_parameters * curve.seconds_per_parameter(tokens) < target_s:
        tokens += max(1, tokens // 8)
        if tokens > NEAR_TOKENS_MAX:
            break
    near = {max(1, tokens // 3), tokens}
    if scenario.on_cpu:
        near = {count for count in near if not 0.9 < count / tokens_now < 1.1}
    else:
        near.add(min(tokens, FEW_TOKENS))
    return sorted({_as_many_as_fit(scenario, count) for count in near})


def _as_many_as_fit(scenario: Scenario, tokens: int) -> int:
    """At most so many tokens whose work space is a small part of the budget: timing is within the promise as well."""
    element_bytes = TORCH_DTYPES[scenario.compute_dtype].itemsize
    most_bytes = scenario.budget_bytes // NEAR_BUDGET_PART + WORK_SPACE_CONSTANT_BYTES

    def needed(count: int) -> int:
        return scenario.model.work_space_bytes(
            sequences=count, new_tokens=1, context_tokens=1, element_bytes=element_bytes
        )

    while tokens > 1 and needed(tokens) > most_bytes:
        tokens = tokens * 3 // 4
    return tokens


def _layer_rates(scenario: Scenario, curve: ComputeCurve, timed: TimedLayer, read_bytes_per_s: float) -> Rates:
    """The rates of what the layer was timed on, its curve bent through what was seen."""
    layers = [block for block in scenario.model.blocks if block.head_rows is None]
    mean = sum(block.active_parameters for block in layers) / len(layers)
    own = Timed(scenario.workload.sequences, timed.decode_s, timed.head_seconds_per_parameter)
    points = sorted((own, *timed.others))
    return Rates(
        read_bytes_per_s=read_bytes_per_s,
        curve=curve.through([CurvePoint(t.tokens, t.layer_s / mean) for t in points]),
        block_overhead_s=0.0,
        pass_overhead_s=timed.pass_overhead_s,
        first_pass_overhead_s=timed.first_pass_overhead_s,
        layers=timed.layers,
        head_curve=curve.through([CurvePoint(t.tokens, t.head_seconds_per_parameter) for t in points]),
        row_s=timed.row_s,
    )
