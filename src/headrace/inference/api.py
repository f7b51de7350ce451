"""`headrace.load`, `headrace.plan`, `headrace.probe`: from a model directory and a budget to a model that runs."""

from __future__ import annotations

import bisect
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from headrace.errors import HeadraceError, InvalidRequestError, UnsupportedModelError
from headrace.inference.block_weights import BlockWeights, ConversionBuffer
from headrace.inference.ends import EmbeddingRows, StreamedHead, head_rows
from headrace.inference.handle import Handle, PassRecord
from headrace.inference.model_source import resolve_model
from headrace.inference.rehearsal import Rehearsed, rehearse
from headrace.inference.skeleton import attach_generation_config, build_skeleton, read_transformers_config
from headrace.inference.weight_names import Recipe, recipes_of, require_all
from headrace.planning.estimate import Pace
from headrace.planning.model_spec import ModelSpec
from headrace.planning.plan import COMPUTE_DTYPES, STORED_AS, EmbeddingPlacement, Plan, Strategy, Workload
from headrace.planning.planner import (
    Candidate,
    Request,
    conversion_bytes,
    minimum_bytes,
    plan_fastest,
    plan_strategy,
    refuse_below_minimum,
)
from headrace.planning.probed_machine import ComputeCurve, ProbedMachine
from headrace.streaming import probe as machine_probe
from headrace.streaming.arena import Arena
from headrace.streaming.checkpoint import TORCH_DTYPES, Checkpoint
from headrace.streaming.device import CpuDevice, Device
from headrace.streaming.stream import Stream, StreamSettings
from headrace.streaming.system_memory import (
    default_budget_bytes,
    keep_heap_small,
    resident_bytes,
    return_free_memory,
)
from headrace.units import format_bytes, format_rate, parse_rate, parse_size

DEFAULT_MAX_TOKENS = 1024
QUICK_CURVE_TOKENS = (1, 4, 16, 64, 256)
QUICK_READ_S = 0.25
CONTENTION_MIN_BYTES = 100 << 20
"""Smaller checkpoints are not worth the half second of measuring how reading and computing slow each other."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Options(NamedTuple):
    """Everything that decides how a model is loaded; sizes in bytes, rates in bytes per second."""

    budget_bytes: int
    workload: Workload
    strategy: Strategy | None = None
    dtype: str | None = None
    read_limit_bytes_per_s: float | None = None
    machine: ProbedMachine | None = None
    attention: str | None = None
    poison: bool = False
    trust_remote_code: bool = False


class Studied(NamedTuple):
    """A model and this machine, measured together: what planning needs."""

    request: Request
    pace: Pace
    notes: tuple[str, ...]


def load(
    model: str | Path,
    *,
    memory: str | int | None = None,
    device: str = "cpu",
    strategy: str = "auto",
    dtype: str = "auto",
    batch: int = 1,
    prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    read_limit: str | float | None = None,
    machine: ProbedMachine | None = None,
    attention: str | None = None,
    poison: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Return the transformers model in `model` with weights that stream within `memory` bytes.

    `batch`, `prompt_tokens` and `max_tokens` (prompt and new tokens together) say what the KV cache and the work
    space are planned for; generation beyond that is refused before it starts. `strategy` is auto, resident,
    sequential or overlap; `dtype` auto, float32, bfloat16 or float16. `read_limit` bounds the reader (bytes per
    second, or text such as 500MB/s). The model is a context manager; `model.headrace` holds plan, prediction,
    timeline and `close()`.

    Raises CheckpointError, UnsupportedModelError, BudgetError, InvalidRequestError.
    """
    started = time.perf_counter()
    if device != "cpu":
        raise InvalidRequestError(f"device {device!r} is not supported yet; headrace computes on the cpu so far")
    checkpoint = Checkpoint(resolve_model(model))
    options = make_options(
        checkpoint.spec,
        memory=memory,
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
    )
    return load_checkpoint(checkpoint, options, started=started)


def make_options(
    spec: ModelSpec,
    *,
    memory: str | int | None,
    strategy: str = "auto",
    dtype: str = "auto",
    batch: int = 1,
    prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    read_limit: str | float | None = None,
    machine: ProbedMachine | None = None,
    attention: str | None = None,
    poison: bool = False,
    trust_remote_code: bool = False,
) -> Options:
    """Check the arguments of `load`; raises InvalidRequestError for any that cannot be meant."""
    if strategy != "auto" and strategy not in {item.value for item in Strategy}:
        names = ", ".join(item.value for item in Strategy)
        raise InvalidRequestError(f"unknown strategy {strategy!r}; choose auto, {names}")
    if dtype != "auto" and dtype not in COMPUTE_DTYPES:
        raise InvalidRequestError(f"unsupported dtype {dtype!r}; choose auto, {', '.join(COMPUTE_DTYPES)}")
    longest = spec.config.context_tokens
    max_tokens = min(longest, DEFAULT_MAX_TOKENS) if max_tokens is None else max_tokens
    if not 2 <= max_tokens <= longest:
        raise InvalidRequestError(
            f"{max_tokens} tokens of context were asked for; {spec.name} can do 2 to {longest} (prompt and new ones)"
        )
    prompt_tokens = max_tokens // 2 if prompt_tokens is None else prompt_tokens
    if not 1 <= prompt_tokens < max_tokens:
        raise InvalidRequestError(f"a prompt of {prompt_tokens} tokens leaves nothing of {max_tokens} to generate")
    if batch < 1:
        raise InvalidRequestError(f"batch must be at least 1, not {batch}")
    if isinstance(memory, str):
        memory = parse_size(memory)
    limit = parse_rate(read_limit) if isinstance(read_limit, str) else read_limit
    if limit is not None and not 0 < limit < float("inf"):
        raise InvalidRequestError(f"the read limit must be positive, not {limit}")
    return Options(
        budget_bytes=default_budget_bytes() if memory is None else memory,
        workload=Workload(sequences=batch, prompt_tokens=prompt_tokens, generate_tokens=max_tokens - prompt_tokens),
        strategy=None if strategy == "auto" else Strategy(strategy),
        dtype=None if dtype == "auto" else dtype,
        read_limit_bytes_per_s=limit,
        machine=machine,
        attention=attention,
        poison=poison,
        trust_remote_code=trust_remote_code,
    )


def study(checkpoint: Checkpoint, options: Options, config: Any) -> Studied:
    """Measure what planning needs of this model on this machine: dtype, disk, one block. About half a second."""
    spec = checkpoint.spec
    notes: list[str] = []
    stored = STORED_AS[spec.stored_dtype]
    names = [options.dtype] if options.dtype is not None else list(dict.fromkeys((stored, "float32")))
    copies = {name: machine_probe.products_need_alignment(_DTYPES[name]) for name in names}
    requests = {
        name: Request(
            spec=spec,
            workload=options.workload,
            compute_dtype=name,
            budget_bytes=options.budget_bytes,
            copies_weights=copies[name],
        )
        for name in names
    }
    fitting = [name for name in names if minimum_bytes(requests[name], options.strategy) <= options.budget_bytes]
    if not fitting:
        refuse_below_minimum(requests[names[0]], options.strategy)
    curves = {name: _curve(spec, name) for name in fitting}
    name = min(fitting, key=lambda item: _work_seconds(curves[item], options.workload))
    if len(names) > 1:
        compared = ", ".join(f"{n} {_work_seconds(curves[n], options.workload) * 1e9:.3g}" for n in fitting)
        notes.append(f"compute dtype {name}: nanoseconds per weight of this work: {compared}")
    request = requests[name]
    rehearsed = rehearse(
        checkpoint,
        config,
        options.workload,
        _DTYPES[name],
        conversion_bytes=conversion_bytes(request),
        copy_misaligned=copies[name],
        attention=options.attention,
    )
    link = _measure_link(checkpoint, options, name)
    notes.append(
        f"disk: {format_rate(link.alone_bytes_per_s)} in direct reads of this checkpoint, "
        f"{format_rate(link.busy_bytes_per_s)} while computing (then {link.compute_slowdown:.2f} times as long)"
    )
    return Studied(request, _pace(curves[name], rehearsed, link, options, spec), tuple(notes))


def load_checkpoint(checkpoint: Checkpoint, options: Options, *, started: float | None = None) -> Any:
    """Measure, plan, take the memory, start the stream, and return the model. See `load`."""
    started = time.perf_counter() if started is None else started
    keep_heap_small()
    config = read_transformers_config(checkpoint.directory, trust_remote_code=options.trust_remote_code)
    studied = study(checkpoint, options, config)
    candidate = choose(studied, options.strategy)
    return assemble(
        checkpoint,
        config,
        candidate,
        studied,
        options,
        started=started,
    )


def choose(studied: Studied, strategy: Strategy | None) -> Candidate:
    """The fastest plan of the strategy that was asked for, or of all."""
    if strategy is None:
        return plan_fastest(studied.request, studied.pace)
    return plan_strategy(studied.request, strategy, studied.pace)


def assemble(
    checkpoint: Checkpoint,
    config: Any,
    candidate: Candidate,
    studied: Studied,
    options: Options,
    *,
    started: float,
    device: Device | None = None,
) -> Any:
    """Build the model by a plan: skeleton, stream, blocks, ends."""
    plan, spec = candidate.plan, checkpoint.spec
    dtype = _DTYPES[plan.compute_dtype]
    model = build_skeleton(config, dtype, attention=options.attention)
    attach_generation_config(model, checkpoint.directory)
    architecture = spec.config.architecture
    recipes = recipes_of(model, checkpoint.index.entries.values())
    _check_structure(model, spec, recipes)
    chunk_bytes, threads = (
        (options.machine.read_chunk_bytes, options.machine.reader_threads) if options.machine else (8 << 20, 2)
    )
    if options.read_limit_bytes_per_s is not None:
        threads = max(threads, 4)  # reads ahead of the limit, so that a slow moment of the disk does not show
        chunk_bytes = min(chunk_bytes, max(1 << 20, int(options.read_limit_bytes_per_s / 100) >> 12 << 12))
    settings = StreamSettings(
        slots=plan.slots,
        slot_bytes=plan.slot_bytes,
        overlap=plan.strategy is not Strategy.SEQUENTIAL,
        reader_threads=threads,
        chunk_bytes=chunk_bytes,
        read_limit_bytes_per_s=options.read_limit_bytes_per_s,
        poison=options.poison,
        block_names=tuple(block.name for block in spec.blocks),
    )
    gc.collect()
    return_free_memory()
    process_overhead_bytes = resident_bytes()  # from here on, what is taken is weights, caches and work space
    _load_fixed(model, checkpoint, recipes, dtype)
    table = _resident_table(checkpoint) if plan.embedding is EmbeddingPlacement.RESIDENT else None
    stream = Stream(
        layouts=[block.layout for block in spec.blocks],
        resident=plan.resident,
        source=checkpoint.open_source(),
        device=device or CpuDevice(),
        settings=settings,
    )
    try:
        buffer = ConversionBuffer(conversion_bytes(studied.request))
        clean_ups = []
        for block in spec.blocks:
            if block.layer_index is None:
                continue
            prefix = f"{architecture.layers}.{block.layer_index}."
            weights = BlockWeights(
                model.get_submodule(prefix[:-1]),
                {name.removeprefix(prefix): r for name, r in recipes.items() if name.startswith(prefix)},
                block.layout.positions,
                dtype,
                buffer,
                studied.request.copies_weights,
            )
            clean_ups.append(_take_turns(weights, stream, block.index, stays=plan.resident[block.index]))
        head_blocks = [block for block in spec.blocks if block.head_rows is not None]
        head = StreamedHead(head_blocks, stream, dtype, buffer, copy_misaligned=studied.request.copies_weights)
        model.set_output_embeddings(head)
        _attach_embedding(model, checkpoint, stream, plan, dtype, table)
        model.headrace = Handle(
            checkpoint=checkpoint,
            plan=plan,
            prediction=candidate.prediction,
            pace=studied.pace,
            stream=stream,
            load_s=time.perf_counter() - started,
            process_overhead_bytes=process_overhead_bytes,
            notes=studied.notes,
            layers=tuple(model.get_submodule(architecture.layers)),
        )
        _record_passes(model, clean_ups)
    except BaseException:
        stream.close()
        raise
    return model


def plan(
    model: str | Path,
    *,
    memory: str | int | None = None,
    batch: int = 1,
    prompt_tokens: int = 16,
    generate_tokens: int = 32,
    strategy: str = "auto",
    dtype: str = "auto",
    read_limit: str | float | None = None,
) -> dict[str, Candidate | HeadraceError]:
    """Predict every strategy for this model on this machine: strategy name -> plan and prediction, or why not."""
    checkpoint = Checkpoint(resolve_model(model))
    try:
        options = make_options(
            checkpoint.spec,
            memory=memory,
            strategy=strategy,
            dtype=dtype,
            batch=batch,
            prompt_tokens=prompt_tokens,
            max_tokens=prompt_tokens + generate_tokens,
            read_limit=read_limit,
        )
        studied = study(checkpoint, options, read_transformers_config(checkpoint.directory))
    finally:
        checkpoint.close()
    return compare(studied, options.strategy)


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


def probe(directory: str | Path = ".") -> ProbedMachine:
    """Measure this machine and the disk that `directory` lies on."""
    return machine_probe.probe_machine(Path(directory))


# -- the parts of `study` and `assemble` ------------------------------------------------------------------------


def _curve(spec: ModelSpec, dtype_name: str) -> ComputeCurve:
    """Time products in the shape of the model's largest matrix."""
    stored = TORCH_DTYPES[spec.stored_dtype]
    return machine_probe.compute_curve(
        stored, _DTYPES[dtype_name], shape=_largest_shape(spec), tokens=QUICK_CURVE_TOKENS, repetitions=3
    )


def _largest_shape(spec: ModelSpec) -> tuple[int, int]:
    """Rows and columns of the first layer's largest matrix, at most 8 M elements of it."""
    entries = [entry for entry in spec.blocks[0].tensors if len(entry.shape) == 2]
    if not entries:
        raise UnsupportedModelError(f"{spec.name}: the first layer holds no matrix")
    rows, columns = max(entries, key=lambda entry: entry.num_elements).shape
    return max(1, min(rows, (8 << 20) // columns)), columns


def _work_seconds(curve: ComputeCurve, work: Workload) -> float:
    prefill = curve.seconds_per_parameter(work.sequences * work.prompt_tokens)
    return prefill + (work.generate_tokens - 1) * curve.seconds_per_parameter(work.sequences)


class _Link(NamedTuple):
    """The disk as this run will see it: alone, while computing, and what reading does to computing."""

    alone_bytes_per_s: float
    busy_bytes_per_s: float
    compute_slowdown: float


def _measure_link(checkpoint: Checkpoint, options: Options, dtype_name: str) -> _Link:
    """Read the checkpoint for a moment, alone and beside a product; a limit on the reader bounds both."""
    limit = options.read_limit_bytes_per_s or float("inf")
    files = checkpoint.index.files
    settings = machine_probe.ReadSettings(8 << 20, 2, 0.0)
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
            return _Link(rate, rate, 1.0)
        product = machine_probe.product_of(
            TORCH_DTYPES[checkpoint.spec.stored_dtype],
            _DTYPES[dtype_name],
            shape=_largest_shape(checkpoint.spec),
            tokens=options.workload.sequences,
        )
        slowed = machine_probe.contention(source, files, settings, product, rounds=2, seconds=0.1)
    finally:
        source.close()
    alone, busy = min(limit, rate), min(limit, rate / slowed.read)
    # A reader that is held back takes so much less of the processor and of the memory's bandwidth.
    return _Link(alone, busy, 1.0 + (slowed.compute - 1.0) * busy * slowed.read / rate)


def _pace(curve: ComputeCurve, rehearsed: Rehearsed, link: _Link, options: Options, spec: ModelSpec) -> Pace:
    tokens = options.workload.sequences
    head = curve.scaled(rehearsed.head_seconds_per_parameter / curve.seconds_per_parameter(tokens))
    pace = Pace(
        read_bytes_per_s=link.alone_bytes_per_s,
        compute_slowdown=link.compute_slowdown,
        read_slowdown=link.alone_bytes_per_s / link.busy_bytes_per_s,
        curve=curve,
        block_overhead_s=0.0,
        pass_overhead_s=rehearsed.pass_overhead_s,
        layer=rehearsed.layer,
        head_curve=head,
    )
    layers = [block for block in spec.blocks if block.head_rows is None]
    mean = sum(block.active_parameters for block in layers) / len(layers)
    overhead = rehearsed.layer.decode_s - mean * curve.seconds_per_parameter(tokens)
    return replace(pace, block_overhead_s=max(0.0, overhead))


def _check_structure(model: Any, spec: ModelSpec, recipes: dict[str, Recipe]) -> None:
    """Refuse anything that would run with missing or misplaced weights."""
    architecture = spec.config.architecture
    layers = model.get_submodule(architecture.layers)
    if len(layers) != spec.config.num_layers:
        raise UnsupportedModelError(f"{spec.name} has {len(layers)} layers where config.json says otherwise")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        raise UnsupportedModelError(f"the head of {spec.name} is no plain matrix, which headrace cannot stream yet")
    if spec.tied and not getattr(model.config, "tie_word_embeddings", False):
        raise UnsupportedModelError(
            f"{spec.name} has no {architecture.head}.weight, and its config.json does not say that the head is tied "
            "to the embedding"
        )
    ends = {head, model.get_input_embeddings()}
    require_all(
        recipes,
        (
            f"{path}.{name}" if path else name
            for path, module in model.named_modules()
            if module not in ends
            for name, _ in module.named_parameters(recurse=False)
        ),
    )


def _load_fixed(model: Any, checkpoint: Checkpoint, recipes: dict[str, Recipe], dtype: torch.dtype) -> None:
    """Give the model its small tensors for good: final norm, position table, persistent buffers."""
    values = checkpoint.read_tensors(checkpoint.spec.fixed)
    own = {entry.name for entry in checkpoint.spec.fixed}
    for name, recipe in recipes.items():
        if recipe.ingredients[0].entry.name not in own:
            continue
        if not recipe.is_one_tensor:
            raise UnsupportedModelError(f"{name} is put together from several tensors outside the layers")
        module_name, _, own_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        value = values[recipe.ingredients[0].entry.name].to(dtype)
        if own_name in dict(module.named_buffers(recurse=False)):
            module.register_buffer(own_name, value)
        else:
            module.register_parameter(own_name, nn.Parameter(value, requires_grad=False))


def _resident_table(checkpoint: Checkpoint) -> torch.Tensor:
    """The whole embedding table, in memory of its own."""
    entry = checkpoint.spec.embedding
    layout_start = entry.offset - entry.offset % 4096
    length = -(-(entry.offset + entry.size_bytes) // 4096) * 4096 - layout_start
    arena = Arena(length)
    piece = arena.take(length)
    source = checkpoint.open_source()
    try:
        source.read_into(entry.file_index, layout_start, piece.buffer)
    finally:
        source.close()
    start = entry.offset - layout_start
    return piece.tensor[start : start + entry.size_bytes].view(TORCH_DTYPES[entry.dtype]).view(entry.shape)


def _take_turns(weights: BlockWeights, stream: Stream, block_index: int, *, stays: bool) -> Callable[[], None]:
    """Let a block wait for its bytes before it computes and give them back afterwards.

    Returns what gives them back after an interrupt (torch calls no hook then); it does nothing at other times.
    """
    waiting: list[int] = []

    def enter(_module: nn.Module, _args: Any) -> None:
        piece = stream.wait(block_index)
        waiting.append(block_index)
        weights.enter(piece, stays=stays)

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        if waiting:
            waiting.pop()
            weights.leave()
            stream.release(block_index)

    weights.block.register_forward_pre_hook(enter, prepend=True)
    weights.block.register_forward_hook(leave, always_call=True)

    def clean_up() -> None:
        if waiting:
            waiting.clear()
            weights.abandon()
            stream.release(block_index)

    return clean_up


def _attach_embedding(
    model: Any,
    checkpoint: Checkpoint,
    stream: Stream,
    plan: Plan,
    dtype: torch.dtype,
    table: torch.Tensor | None,
) -> None:
    entry = checkpoint.spec.embedding
    heads = [block for block in checkpoint.spec.blocks if block.head_rows is not None]

    def rows(wanted: list[int]) -> torch.Tensor:
        if table is not None:
            return table[wanted]
        if plan.embedding is EmbeddingPlacement.HEAD:
            found = _rows_of_head(heads, stream, wanted)
            if found is not None:
                return found
        return checkpoint.read_rows(entry, wanted)

    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise UnsupportedModelError(f"the embedding of {checkpoint.spec.name} is no table of rows")
    EmbeddingRows(embedding, dtype, rows)


def _rows_of_head(heads: list[Any], stream: Stream, wanted: list[int]) -> torch.Tensor | None:
    """Take rows of tied weights from the resident head, once it has arrived."""
    pieces = [stream.peek(block.index) for block in heads]
    if any(piece is None for piece in pieces):
        return None
    parts = [head_rows(block, piece) for block, piece in zip(heads, pieces, strict=True) if piece is not None]
    firsts = [block.head_rows.first for block in heads]
    places = [bisect.bisect_right(firsts, row) - 1 for row in wanted]
    return torch.stack([parts[place][row - firsts[place]] for place, row in zip(places, wanted, strict=True)])


def _record_passes(model: Any, clean_ups: list[Callable[[], None]]) -> None:
    """Note when each forward pass begins and ends, and its tokens; clean up after one that was broken off."""
    starts: list[float] = []

    def begin(_module: nn.Module, _args: Any, _kwargs: dict[str, Any]) -> None:
        if model.headrace.closed:
            raise InvalidRequestError("this model was closed; load it again")
        if starts:
            starts.clear()
            for clean_up in clean_ups:
                clean_up()
        starts.append(time.perf_counter())

    def end(_module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        given = kwargs.get("input_ids")
        if given is None:
            given = kwargs.get("inputs_embeds")
        tokens = int(given.shape[0] * given.shape[1]) if given is not None else 0
        model.headrace.passes.append(PassRecord(starts.pop(), time.perf_counter(), tokens))

    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(end, with_kwargs=True)


def describe_plan(plan: Plan) -> str:
    """One line about a plan for people."""
    return (
        f"{plan.strategy.value}: {plan.resident_blocks} of {plan.num_blocks} blocks resident, {plan.slots} slots, "
        f"{format_bytes(plan.streamed_bytes_per_pass)} read per pass, {plan.compute_dtype}, "
        f"{format_bytes(plan.memory.total_bytes)} of {format_bytes(plan.budget_bytes)}"
    )
