"""Measure what planning needs of one model on an accelerator: link, arithmetic, disk, one layer rehearsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from headrace.dtypes import STORED_DTYPES
from headrace.errors import BudgetError, HeadraceError
from headrace.inference.layer_timing import time_layer
from headrace.inference.study import largest_shape, reader_settings, rehearsed_pace
from headrace.machine.compute_curve import ComputeCurve
from headrace.machine.machine import Copies, Processor
from headrace.model.layout import align_down
from headrace.model.model import WORK_SPACE_CONSTANT_BYTES
from headrace.model.stored_model import StoredModel
from headrace.planning.accelerator_memory import AcceleratorRequest
from headrace.planning.accelerator_pace import AcceleratorPace, predict_on_accelerator
from headrace.planning.accelerator_planner import (
    plan_fastest_on_accelerator,
    plan_on_accelerator,
    refuse_below_minimum_on_accelerator,
)
from headrace.planning.estimate import LayerTimes, Pace
from headrace.planning.jobs.draft_length import DraftLength
from headrace.planning.load_options import Options
from headrace.planning.plan import Plan, Strategy
from headrace.planning.planner import Candidate
from headrace.planning.probed_pace import handover_s_per_token
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.device import CpuDevice, Device
from headrace.streaming.probe import machine as machine_probe
from headrace.streaming.probe.link import probe_accelerator
from headrace.streaming.probe.sizes import ProbeSizes
from headrace.streaming.torch_dtypes import TORCH_DTYPES
from headrace.units import format_rate

QUICK = ProbeSizes(
    size_bytes=64 << 20,
    tokens=(1, 16, 128, 1024, 4096, 16384),
    rotated_bytes=128 << 20,
    repetitions=3,
    batch_s=0.004,
    launches=100,
    warm_up_s=0.1,
)
QUICK_READ_S = 0.25
FEW_TOKENS = 64
REHEARSED_TOKENS_MAX = 1 << 16


class AcceleratorStudied(NamedTuple):
    """A model and an accelerator, measured together: what planning needs."""

    request: AcceleratorRequest
    accelerator_pace: AcceleratorPace
    notes: tuple[str, ...]

    @property
    def pace(self) -> Pace:
        """The device's own."""
        return self.accelerator_pace.device

    @property
    def copies_weights(self) -> bool:
        """Blocks lie at aligned places already."""
        return False

    @property
    def cpu_conversion_bytes(self) -> int:
        """The processor's buffer for weights that it converts."""
        return self.request.cpu_conversion_bytes

    @property
    def link_bytes_per_s(self) -> float | None:
        """Of page-locked memory, while the device computes."""
        return self.accelerator_pace.link_bytes_per_s


def study_accelerator(
    checkpoint: Checkpoint, options: Options, config: Any, device: Device, *, pass_tokens: Sequence[int] = ()
) -> AcceleratorStudied:
    """Measure the link, the device's arithmetic, the disk and one layer on it. Some two seconds.

    `pass_tokens`: further numbers of tokens in a pass at which the layer is timed. Takes no more than the budget, and
    gives it back. Raises BudgetError before anything is measured where nothing could fit.
    """
    model = checkpoint.model
    name = options.dtype or STORED_DTYPES[model.stored_dtype].name
    settings = reader_settings(options)
    request = AcceleratorRequest(
        model=model,
        workload=options.workload,
        compute_dtype=name,
        budget_bytes=options.budget_bytes,
        host_budget_bytes=options.host_budget_bytes,
        device=device.name,
        pinned=_can_lock(device),
        allow_cpu=options.cpu_blocks,
        allow_host_cache=options.cache_on_host,
        draft_tokens=options.draft_tokens,
    )
    if options.read_limit_bytes_per_s is not None:
        request = replace(request, chunk_bytes=settings.chunk_bytes, ring_chunks=2 * settings.reader_threads)
    refuse_below_minimum_on_accelerator(request, options.strategy)
    probed = _known(options, device)
    if probed is None:
        sizes = _sizes(largest_shape(model), options.budget_bytes)
        probed = probe_accelerator(device, name=device.name, sizes=sizes, compute_dtypes=(name,))
        device.release_cached()
    copies = probed.copies
    assert copies is not None
    curve = _curve_of(probed, name, model)
    read_bytes_per_s = _read_rate(checkpoint, options)
    rehearsed = time_layer(
        checkpoint,
        config,
        options.workload,
        TORCH_DTYPES[name],
        conversion_bytes=request.conversion_bytes,
        copy_misaligned=False,
        attention=options.attention,
        reader=settings,
        other_tokens=sorted({*pass_tokens, *_near_break_even(request, curve, copies)} - {options.workload.sequences}),
        device=device,
    )
    on_cpu = rehearse_processor(checkpoint, options, config, request) if options.cpu_blocks else None
    copy_bytes_per_s = machine_probe.memory_copy_rate()
    link_bytes_per_s = copies.while_computing_bytes_per_s.expected
    hidden_bytes = model.hidden_size * TORCH_DTYPES[name].itemsize
    pace = AcceleratorPace(
        device=rehearsed_pace(curve, rehearsed, read_bytes_per_s, options, model),
        link_bytes_per_s=link_bytes_per_s,
        staged_bytes_per_s=min(copy_bytes_per_s, link_bytes_per_s),
        copy_latency_s=0.0,  # of copies in a row: each begins while the one before still goes on
        processor_layer=on_cpu,
        processor_handover_s=2 * copies.latency_s.expected,
        processor_handover_s_per_token=handover_s_per_token(copies, hidden_bytes),
        host_row_s=hidden_bytes / copies.pageable_bytes_per_s.expected + hidden_bytes / copy_bytes_per_s,
        memory_copy_bytes_per_s=copy_bytes_per_s,
    )
    notes = [
        f"link to {device.name}: {format_rate(copies.bytes_per_s.expected)} from page-locked memory alone, "
        f"{format_rate(link_bytes_per_s)} while computing, "
        f"{format_rate(copies.pageable_bytes_per_s.expected)} from ordinary memory",
        f"disk: {format_rate(read_bytes_per_s)} in direct reads of this checkpoint",
    ]
    if not request.pinned:
        notes.append("the system lets no host memory be page-locked: blocks travel more slowly, through a ring")
    if on_cpu is not None:
        notes.append("the processor may compute layers: results may differ from the device's own in rounding")
    return AcceleratorStudied(request, pace, tuple(notes))


def choose_on_accelerator(studied: AcceleratorStudied, strategy: Strategy | None) -> Candidate:
    """The fastest plan of the strategy that was asked for, or of all."""
    if strategy is None:
        return plan_fastest_on_accelerator(studied.request, studied.accelerator_pace)
    return plan_on_accelerator(studied.request, strategy, studied.accelerator_pace)


def compare_on_accelerator(
    studied: AcceleratorStudied, only: Strategy | None = None
) -> dict[str, Candidate | HeadraceError]:
    """Every strategy's best plan, or the error that says why there is none."""
    found: dict[str, Candidate | HeadraceError] = {}
    for strategy in Strategy if only is None else (only,):
        try:
            found[strategy.value] = choose_on_accelerator(studied, strategy)
        except HeadraceError as error:
            found[strategy.value] = error
    return found


def draft_length_on_accelerator(studied: AcceleratorStudied, plan: Plan, most: int) -> DraftLength:
    """What chooses the number of drafts, from the pass times that the planner predicts."""
    model = studied.request.model
    pace = replace(studied.accelerator_pace, device=replace(studied.pace, layer=None))

    @cache
    def pass_s(tokens: int) -> float:
        carried = replace(plan, workload=replace(plan.workload, sequences=tokens))
        return predict_on_accelerator(model, carried, pace, pinned=studied.request.pinned).decode_s_per_pass

    return DraftLength(pass_s=pass_s, most=most)


def _near_break_even(request: AcceleratorRequest, curve: ComputeCurve, copies: Copies) -> list[int]:
    """Tokens per pass about which computing a layer takes as long as copying it, a third of that, and some before.

    Enqueuing binds at few tokens and arithmetic at many, so what the curve is wrong by at the one says nothing of the
    other. As many as a part of the budget holds.
    """
    model, layer = request.model, request.model.blocks[0]
    copy_s = layer.held_bytes / copies.while_computing_bytes_per_s.expected
    tokens = 1
    while layer.active_parameters * curve.seconds_per_parameter(tokens) < copy_s:
        tokens += max(1, tokens // 8)
        if tokens > REHEARSED_TOKENS_MAX:
            return [FEW_TOKENS]
    element_bytes = TORCH_DTYPES[request.compute_dtype].itemsize
    near = sorted({max(1, tokens // 3), tokens, min(tokens, FEW_TOKENS)})
    return [
        count
        for count in near
        if model.work_space_bytes(sequences=count, new_tokens=1, context_tokens=1, element_bytes=element_bytes)
        <= request.budget_bytes // 4 + WORK_SPACE_CONSTANT_BYTES
    ]


def _known(options: Options, device: Device) -> Processor | None:
    """What a machine file says of this device, which then is not measured again."""
    described = () if options.machine is None else options.machine.accelerators
    return next((own for own in described if own.device == device.name), None)


def _sizes(shape: tuple[int, int], budget_bytes: int) -> ProbeSizes:
    """What is moved and multiplied, within half of the budget."""
    part = max(1 << 16, align_down(budget_bytes // 16))
    rows_bytes = 4 * (shape[0] + shape[1])
    return replace(
        QUICK,
        shape=shape,
        size_bytes=min(QUICK.size_bytes, part),
        rotated_bytes=min(QUICK.rotated_bytes, part),
        tokens=tuple(count for count in QUICK.tokens if count == 1 or count * rows_bytes <= part),
    ).within(budget_bytes)


def _can_lock(device: Device) -> bool:
    """Try it with a page."""
    arena = device.allocate_host(4096)
    pinned = arena.pinned
    arena.close()
    return pinned


def _curve_of(probed: Processor, dtype_name: str, model: StoredModel) -> ComputeCurve:
    """The device's arithmetic in a dtype; what converting costs, where weights are stored in another, is rehearsed."""
    found = next(curve for curve in probed.arithmetic.curves if curve.compute_dtype == dtype_name)
    return replace(found, stored_dtype=model.stored_dtype)


def _read_rate(checkpoint: Checkpoint, options: Options) -> float:
    """Bytes per second of direct reads of this checkpoint, no faster than the reader's limit."""
    settings = reader_settings(options)
    source = checkpoint.open_source()
    try:
        rate = machine_probe.read_rate(
            source,
            checkpoint.index.files,
            chunk_bytes=settings.chunk_bytes,
            threads=settings.reader_threads,
            seconds=min(QUICK_READ_S, max(0.02, checkpoint.index.total_bytes / 1e9)),
        )
    finally:
        source.close()
    return min(options.read_limit_bytes_per_s or float("inf"), rate or 1e9)


def rehearse_processor(
    checkpoint: Checkpoint, options: Options, config: Any, request: AcceleratorRequest
) -> LayerTimes | None:
    """One layer computed by the processor; None where the host's budget does not hold one."""
    if request.host_budget_bytes < 2 * checkpoint.model.blocks[0].read_bytes + request.work_space_bytes:
        return None
    try:
        return time_layer(
            checkpoint,
            config,
            options.workload,
            TORCH_DTYPES[request.compute_dtype],
            conversion_bytes=request.cpu_conversion_bytes,
            copy_misaligned=False,
            attention=options.attention,
            reader=reader_settings(options),
            device=CpuDevice(),
        ).layer
    except BudgetError:
        return None
