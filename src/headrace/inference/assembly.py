"""From a plan to a model that runs: skeleton, memory, stream, blocks, ends."""

from __future__ import annotations

import bisect
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from headrace.errors import InvalidRequestError
from headrace.inference.block_weights import BlockWeights, ConversionBuffer, give_fixed
from headrace.inference.calibration import Calibration
from headrace.inference.compiling import compile_layers
from headrace.inference.cpu_blocks import HostInputs, compute_on_host
from headrace.inference.embedding_and_head import EmbeddingRows, StreamedHead, TableSource, head_rows
from headrace.inference.handle import Handle, Overheads
from headrace.inference.loading import Loading
from headrace.inference.skeleton import HOST, build_skeleton
from headrace.inference.weight_names import Recipe, recipes_of
from headrace.model.stored_model import StoredBlock
from headrace.planning.plan import TRAVELLING, EmbeddingPlacement, Placement, Plan
from headrace.planning.prediction import Candidate
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from headrace.streaming.arena import Arena
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.device import Device
from headrace.streaming.stream import Stream
from headrace.streaming.system_memory import resident_bytes, return_free_memory
from headrace.streaming.torch_dtypes import STORED_TORCH_DTYPES, TORCH_DTYPES

RESERVE_MARGIN_BYTES = 64 << 20


def assemble(loading: Loading, candidate: Candidate, calibration: Calibration, *, started: float) -> Any:
    """Build the model by a plan: skeleton, memory and stream, then layers, head and embedding that take turns in it."""
    checkpoint, device, plan = loading.checkpoint, loading.device, candidate.plan
    where, dtype = device.torch_device, TORCH_DTYPES[plan.compute_dtype]
    model = build_skeleton(loading.config, dtype, attention=loading.options.asked.attention, device=where)
    recipes = recipes_of(model, checkpoint.index.entries.values())
    overheads = _settle(device)
    # From here on, what is taken is weights, caches and work space.
    give_fixed(model, checkpoint, recipes, where)
    table = _table(checkpoint, plan, where)
    stream = _open_stream(loading, plan, calibration.scenario)
    try:
        buffer = ConversionBuffer(plan.memory.conversion_bytes, where)
        copies = calibration.scenario.copies_weights
        layers = _Layers(model, recipes, stream, loading, plan, buffer, copies_weights=copies)
        _refuse_other_inputs(model, loading)
        _attach_head(model, loading, stream, dtype, buffer, copies_weights=copies)
        _attach_embedding(model, loading, stream, plan, dtype, table)
        if loading.options.asked.compile_layers:
            compile_layers(list(layers.modules), dtype=dtype, stored_dtype=checkpoint.model.stored_dtype)
        model.headrace = Handle(
            checkpoint=checkpoint,
            plan=plan,
            prediction=candidate.prediction,
            scenario=calibration.scenario,
            notes=calibration.notes,
            warnings=calibration.warnings,
            stream=stream,
            device=device,
            layers=layers.modules,
            overheads=overheads,
            load_s=time.perf_counter() - started,
            view_droppers=tuple(weights.drop_views for weights in layers.weights),
        )
        _record_passes(model, layers)
        # Keys, values and activations come in passes; others that share the device must not take their room meanwhile.
        # A margin stays for tensors that the allocator keeps apart, so that all of it is within the promise.
        in_passes = plan.memory.kv_cache_bytes + plan.memory.work_space_bytes - RESERVE_MARGIN_BYTES
        device.reserve(max(0, in_passes))
    except BaseException:
        stream.close()
        raise
    return model


def _settle(device: Device) -> Overheads:
    """Give back what building left over, and note what is held before any weight is read."""
    gc.collect()
    return_free_memory()
    device.release_cached()
    device.reset_peak()
    return Overheads(process_bytes=resident_bytes(), device_bytes=device.held_bytes())


def _open_stream(loading: Loading, plan: Plan, scenario: Scenario) -> Stream:
    """Take the memory of the plan and start the readers."""
    blocks, device = loading.checkpoint.model.blocks, loading.device
    settings = replace(
        loading.reader,
        slots=plan.slots,
        slot_bytes=plan.slot_bytes,
        overlap=plan.strategy is not Strategy.SEQUENTIAL,
        poison=loading.options.asked.poison,
        block_names=tuple(block.name for block in blocks),
    )
    if not plan.uses_host_memory:
        settings = replace(settings, chunk_bytes=scenario.chunk_bytes, ring_chunks=scenario.ring_chunks)
    return Stream(
        layouts=[block.layout for block in blocks],
        aligned=None if device.uses_host_memory else [block.aligned for block in blocks],
        places=plan.placements,
        source=loading.checkpoint.open_source(),
        device=device,
        settings=settings,
    )


class _Layers:
    """The decoder layers, each of which waits for its weights and gives them back."""

    def __init__(
        self,
        model: Any,
        recipes: dict[str, Recipe],
        stream: Stream,
        loading: Loading,
        plan: Plan,
        buffer: ConversionBuffer,
        *,
        copies_weights: bool,
    ) -> None:
        stored, device = loading.checkpoint.model, loading.device
        path = loading.anatomy.layers
        self.modules: tuple[nn.Module, ...] = tuple(model.get_submodule(path))
        self.weights: list[BlockWeights] = []
        self.inputs = HostInputs()
        self._clean_ups: list[Callable[[], None]] = []
        cpu_buffer = ConversionBuffer(plan.host_memory.conversion_bytes)
        for block in stored.blocks:
            if block.layer_index is None:
                continue
            placement = plan.placements[block.index]
            on_cpu = placement is Placement.CPU
            weights = BlockWeights(
                self.modules[block.layer_index],
                f"{path}.{block.layer_index}",
                recipes,
                block.layout.positions if device.uses_host_memory else block.aligned.positions,
                cpu_buffer if on_cpu else buffer,
                copies_weights,
                HOST if on_cpu else device.torch_device,
                loading.anatomy.made_in,
            )
            self.weights.append(weights)
            self._clean_ups.append(_take_turns(weights, stream, block.index, stays=placement not in TRAVELLING))
            if on_cpu:
                compute_on_host(weights.block, self.inputs, device.torch_device)

    def clean_up(self) -> None:
        """Let go of what a pass that was broken off still holds."""
        for clean_up in self._clean_ups:
            clean_up()


def _refuse_other_inputs(model: Any, loading: Loading) -> None:
    """Let what sees images or hears sounds refuse to: its weights are not there."""

    def refuse(_module: nn.Module, _args: Any) -> None:
        name = loading.checkpoint.model.name
        raise InvalidRequestError(f"headrace runs {name} as the text model that it holds: give it no images and sounds")

    for path in loading.anatomy.unused:
        model.get_submodule(path).register_forward_pre_hook(refuse)


def _attach_head(
    model: Any, loading: Loading, stream: Stream, dtype: torch.dtype, buffer: ConversionBuffer, *, copies_weights: bool
) -> None:
    """Put the streamed head in the place of the model's own."""
    path, _, name = loading.anatomy.head.rpartition(".")
    outer = model.get_submodule(path)
    own = getattr(outer, name)
    head = StreamedHead(
        [block for block in loading.checkpoint.model.blocks if block.head_rows is not None],
        stream,
        dtype,
        buffer,
        copy_misaligned=copies_weights,
        bias=own.bias,
        whole=not loading.device.uses_host_memory,
        device=loading.device.torch_device,
    )
    setattr(outer, name, head)


def _table(checkpoint: Checkpoint, plan: Plan, device: torch.device) -> torch.Tensor | None:
    """The whole embedding table where the plan keeps it, on the device or on the host; None elsewhere."""
    if plan.embedding is EmbeddingPlacement.RESIDENT:
        return _read_table(checkpoint).to(device)
    return _read_table(checkpoint) if plan.embedding is EmbeddingPlacement.HOST else None


def _read_table(checkpoint: Checkpoint) -> torch.Tensor:
    """The whole embedding table, in host memory of its own."""
    entry = checkpoint.model.embedding
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
    return piece.tensor[start : start + entry.size_bytes].view(STORED_TORCH_DTYPES[entry.dtype]).view(entry.shape)


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
    model: Any, loading: Loading, stream: Stream, plan: Plan, dtype: torch.dtype, table: torch.Tensor | None
) -> None:
    """Let the embedding, and other tables with a row for each token, look up rows where the plan keeps them."""
    checkpoint, device = loading.checkpoint, loading.device.torch_device
    stored = checkpoint.model
    heads = [block for block in stored.blocks if block.head_rows is not None]

    def rows(wanted: list[int]) -> torch.Tensor:
        if table is not None:
            return table[wanted]
        if plan.embedding is EmbeddingPlacement.HEAD and plan.uses_host_memory:
            found = _rows_of_head(heads, stream, wanted)
            if found is not None:
                return found
        return checkpoint.read_rows(stored.embedding, wanted)

    source: TableSource | None = None
    if not plan.uses_host_memory and plan.embedding is EmbeddingPlacement.RESIDENT:
        source = lambda: table  # noqa: E731
    elif not plan.uses_host_memory and plan.embedding is EmbeddingPlacement.HEAD:
        source = lambda: _whole_head(heads[0], stream)  # noqa: E731
    EmbeddingRows(model.get_submodule(loading.anatomy.embedding), dtype, rows, table=source, device=device)
    for path, entry in zip(loading.anatomy.tables, stored.parts.tables, strict=True):
        EmbeddingRows(model.get_submodule(path), dtype, partial(checkpoint.read_rows, entry), device=device)


def _whole_head(head: StoredBlock, stream: Stream) -> torch.Tensor | None:
    """Tied weights whose head stays on an accelerator, once it has arrived."""
    piece = stream.peek(head.index)
    return None if piece is None else head_rows(head, piece, aligned=True)


def _rows_of_head(heads: list[Any], stream: Stream, wanted: list[int]) -> torch.Tensor | None:
    """Take rows of tied weights from the resident head, once it has arrived."""
    pieces = [stream.peek(block.index) for block in heads]
    if any(piece is None for piece in pieces):
        return None
    parts = [head_rows(block, piece) for block, piece in zip(heads, pieces, strict=True) if piece is not None]
    firsts = [block.head_rows.first for block in heads]
    places = [bisect.bisect_right(firsts, row) - 1 for row in wanted]
    return torch.stack([parts[place][row - firsts[place]] for place, row in zip(places, wanted, strict=True)])


def _record_passes(model: Any, layers: _Layers) -> None:
    """Note when each forward pass begins and ends, and its tokens; clean up after one that was broken off."""
    starts: list[float] = []

    def clean() -> None:
        starts.clear()
        layers.clean_up()

    def begin(_module: nn.Module, _args: Any, _kwargs: dict[str, Any]) -> None:
        if model.headrace.closed:
            raise InvalidRequestError("this model was closed; load it again")
        if starts:
            clean()
        layers.inputs.forget()
        starts.append(time.perf_counter())

    def end(_module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        given = kwargs.get("input_ids")
        if given is None:
            given = kwargs.get("inputs_embeds")
        tokens = int(given.shape[0] * given.shape[1]) if given is not None else 0
        model.headrace.note_pass(starts.pop(), tokens)

    model.headrace.clean_up = clean
    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(end, with_kwargs=True)
