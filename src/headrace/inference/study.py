"""Measure what planning needs of one model on this machine: which dtype, the disk, one layer rehearsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from headrace.errors import HeadraceError, UnsupportedModelError
from headrace.inference.layer_timing import Rehearsed, Timed, time_layer
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.machine.machine import Disk
from headrace.model.stored_model import StoredModel
from headrace.planning.estimate import Pace
from headrace.planning.load_options import Options, compute_dtypes, work_seconds
from headrace.planning.plan import Strategy
from headrace.planning.planner import (
    Candidate,
    Packed,
    Request,
    conversion_bytes,
    minimum_bytes,
    plan_fastest,
    plan_strategy,
    refuse_below_minimum,
)
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.probe import machine as machine_probe
from headrace.streaming.stream import StreamSettings
from headrace.streaming.torch_dtypes import STORED_TORCH_DTYPES, TORCH_DTYPES
from headrace.units import format_rate

QUICK_CURVE_TOKENS = (1, 4, 16, 64, 256)
QUICK_READ_S = 0.25
CONTENTION_MIN_BYTES = 100 << 20
"""Smaller checkpoints are not worth the half second of measuring how reading and computing slow each other."""
REHEARSED_BREAK_EVEN_TOKENS_MAX = 512


class Studied(NamedTuple):
    """A model and this machine, measured together: what planning needs."""

    request: Request
    pace: Pace
    notes: tuple[str, ...]

    @property
    def copies_weights(self) -> bool:
        """Weights are copied to aligned places before they are used."""
        return self.request.copies_weights

    @property
    def cpu_conversion_bytes(self) -> int:
        """There is no processor beside this one."""
        return 0

    @property
    def link_bytes_per_s(self) -> float | None:
        """Nothing is copied."""
        return None


def study(
    checkpoint: Checkpoint,
    options: Options,
    config: Any,
    *,
    pass_tokens: Sequence[int] = (),
    packed: Packed | None = None,
) -> Studied:
    """Measure what planning needs of this model on this machine: dtype, disk, one block. About a second.

    `pass_tokens`: further numbers of tokens in a pass at which the layer is timed. `packed`: the least that packed
    passes must hold.
    """
    model = checkpoint.model
    notes: list[str] = []
    names = compute_dtypes(model, options.dtype)
    copies = {name: machine_probe.products_need_alignment(TORCH_DTYPES[name]) for name in names}
    requests = {
        name: Request(
            model=model,
            workload=options.workload,
            compute_dtype=name,
            budget_bytes=options.budget_bytes,
            copies_weights=copies[name],
            draft_tokens=options.draft_tokens,
            packed=packed,
        )
        for name in names
    }
    fitting = [name for name in names if minimum_bytes(requests[name], options.strategy) <= options.budget_bytes]
    if not fitting:
        refuse_below_minimum(requests[names[0]], options.strategy)
    curves = {name: _curve(model, name) for name in fitting}
    name = min(fitting, key=lambda item: work_seconds(curves[item], options.workload))
    if len(names) > 1:
        compared = ", ".join(f"{n} {work_seconds(curves[n], options.workload) * 1e9:.3g}" for n in fitting)
        notes.append(f"compute dtype {name}: nanoseconds per weight of this work: {compared}")
    request = requests[name]
    link = _measure_link(checkpoint, options, name)
    rehearsed = time_layer(
        checkpoint,
        config,
        options.workload,
        TORCH_DTYPES[name],
        conversion_bytes=conversion_bytes(request),
        copy_misaligned=copies[name],
        attention=options.attention,
        reader=reader_settings(options),
        other_tokens=sorted(
            {*_break_even_tokens(model, curves[name], link.busy_bytes_per_s, options.workload.sequences), *pass_tokens}
            - {options.workload.sequences}
        ),
    )
    notes.append(
        f"disk: {format_rate(link.alone_bytes_per_s)} in direct reads of this checkpoint, "
        f"{format_rate(link.busy_bytes_per_s)} while computing (then {link.compute_slowdown:.2f} times as long)"
    )
    return Studied(request, _pace(curves[name], rehearsed, link, options, model), tuple(notes))


def choose(studied: Studied, strategy: Strategy | None) -> Candidate:
    """The fastest plan of the strategy that was asked for, or of all."""
    if strategy is None:
        return plan_fastest(studied.request, studied.pace)
    return plan_strategy(studied.request, strategy, studied.pace)


def compare(studied: Studied, only: Strategy | None = None) -> dict[str, Candidate | HeadraceError]:
    """Every strategy's best plan, or the error that says why there is none."""
    found: dict[str, Candidate | HeadraceError] = {}
    for item in Strategy:
        if only is not None and item is not only:
            continue
        try:
            found[item.value] = plan_strategy(studied.request, item, studied.pace)
        except HeadraceError as error:
            found[item.value] = error
    return found


def _curve(model: StoredModel, dtype_name: str) -> ComputeCurve:
    """Time products in the shape of the model's largest matrix."""
    stored = STORED_TORCH_DTYPES[model.stored_dtype]
    return machine_probe.compute_curve(
        stored, TORCH_DTYPES[dtype_name], shape=largest_shape(model), tokens=QUICK_CURVE_TOKENS, repetitions=3
    )


def largest_shape(model: StoredModel) -> tuple[int, int]:
    """Rows and columns of the first layer's largest matrix, at most 8 M elements of it."""
    entries = [entry for entry in model.blocks[0].tensors if len(entry.shape) == 2]
    if not entries:
        raise UnsupportedModelError(f"{model.name}: the first layer holds no matrix")
    rows, columns = max(entries, key=lambda entry: entry.num_elements).shape
    return max(1, min(rows, (8 << 20) // columns)), columns


class _Link(NamedTuple):
    """The disk as this run will see it: alone, while computing, and what reading does to computing."""

    alone_bytes_per_s: float
    busy_bytes_per_s: float
    compute_slowdown: float
    read_latency_s: float


def _measure_link(checkpoint: Checkpoint, options: Options, dtype_name: str) -> _Link:
    """Read the checkpoint for a moment, alone and beside a product; a limit on the reader bounds both."""
    limit = options.read_limit_bytes_per_s or float("inf")
    files = checkpoint.index.files
    settings = machine_probe.ReadSettings(8 << 20, 2, 0.0)
    read_latency_s = machine_probe.handover_seconds(checkpoint.open_source(), reader_settings(options))
    source = checkpoint.open_source()
    try:
        rate = machine_probe.read_rate(
            source,
            files,
            chunk_bytes=settings.chunk_bytes,
            threads=settings.threads,
            seconds=min(QUICK_READ_S, max(0.02, checkpoint.index.total_bytes / 1e9)),
        )
        if checkpoint.index.total_bytes < CONTENTION_MIN_BYTES:
            rate = min(limit, rate or 1e9)  # 0 for less than a page: nothing that could take time
            return _Link(rate, rate, 1.0, read_latency_s)
        product = machine_probe.product_of(
            STORED_TORCH_DTYPES[checkpoint.model.stored_dtype],
            TORCH_DTYPES[dtype_name],
            shape=largest_shape(checkpoint.model),
            tokens=options.workload.sequences,
        )
        slowed = machine_probe.contention(source, files, settings, product, rounds=5, seconds=0.06)
    finally:
        source.close()
    alone, busy = min(limit, rate), min(limit, rate / slowed.read)
    # A reader that is held back takes so much less of the processor and of the memory's bandwidth.
    return _Link(alone, busy, 1.0 + (slowed.compute - 1.0) * busy * slowed.read / rate, read_latency_s)


def reader_settings(options: Options) -> StreamSettings:
    """How the stream will read; slots and the like are the plan's business."""
    disk = None if options.machine is None else options.machine.disk
    chunk_bytes, threads = (Disk.chunk_bytes, Disk.threads) if disk is None else (disk.chunk_bytes, disk.threads)
    if options.read_limit_bytes_per_s is not None:
        threads = max(threads, 4)  # reads ahead of the limit, so that a slow moment of the disk does not show
        chunk_bytes = min(chunk_bytes, max(1 << 20, int(options.read_limit_bytes_per_s / 100) >> 12 << 12))
    return StreamSettings(
        slots=1,
        slot_bytes=0,
        reader_threads=threads,
        chunk_bytes=chunk_bytes,
        read_limit_bytes_per_s=options.read_limit_bytes_per_s,
    )


def _break_even_tokens(
    model: StoredModel, curve: ComputeCurve, read_bytes_per_s: float, tokens_now: int
) -> tuple[int, ...]:
    """Tokens per pass about which computing a layer takes as long as reading it, and a third of that.

    There the curve is worth correcting by a rehearsal: the break-even of a plan that keeps up to two thirds of its
    blocks lies between. Nothing where that is far away, or where the work's own tokens are as good.
    """
    layer = model.blocks[0]
    read_s = layer.read_bytes / read_bytes_per_s
    tokens = 1
    while layer.active_parameters * curve.seconds_per_parameter(tokens) < read_s:
        tokens += max(1, tokens // 8)
        if tokens > REHEARSED_BREAK_EVEN_TOKENS_MAX:
            return ()
    near = {max(1, tokens // 3), tokens}
    return tuple(sorted(count for count in near if not 0.9 < count / tokens_now < 1.1))


def _pace(curve: ComputeCurve, rehearsed: Rehearsed, link: _Link, options: Options, model: StoredModel) -> Pace:
    return replace(
        rehearsed_pace(curve, rehearsed, link.alone_bytes_per_s, options, model),
        compute_slowdown=link.compute_slowdown,
        read_slowdown=link.alone_bytes_per_s / link.busy_bytes_per_s,
        read_latency_s=link.read_latency_s,
        stall_penalty_s=rehearsed.stall_penalty_s,
    )


def rehearsed_pace(
    curve: ComputeCurve, rehearsed: Rehearsed, read_bytes_per_s: float, options: Options, model: StoredModel
) -> Pace:
    """The pace of whoever the layer was rehearsed on, its curve bent through what was seen."""
    layers = [block for block in model.blocks if block.head_rows is None]
    mean = sum(block.active_parameters for block in layers) / len(layers)
    own = Timed(options.workload.sequences, rehearsed.layer.decode_s, rehearsed.head_seconds_per_parameter)
    timed = sorted((own, *rehearsed.others))
    return Pace(
        read_bytes_per_s=read_bytes_per_s,
        curve=curve.through([CurvePoint(t.tokens, t.layer_s / mean) for t in timed]),
        block_overhead_s=0.0,
        pass_overhead_s=rehearsed.pass_overhead_s,
        first_pass_overhead_s=rehearsed.first_pass_overhead_s,
        layer=rehearsed.layer,
        head_curve=curve.through([CurvePoint(t.tokens, t.head_seconds_per_parameter) for t in timed]),
        row_s=rehearsed.row_s,
    )
