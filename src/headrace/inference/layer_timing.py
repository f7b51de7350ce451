"""Run one block of this very model, alone, and time it: the surest way to know what a pass will cost.

The planner's curve knows the machine; a timed layer knows this model's shapes, attention and small operations on
it. It builds the same transformers model with a single layer, gives it the first block's real weights, and times that
layer at the run's own number of tokens, for a prefill pass and for a decode pass at half of what is generated; what a
step of `generate` takes beside the layers it learns from a few steps of that model. Peak memory: one block, the
conversion buffer, one layer's work space and FLUSH_BYTES, all given back.

On an accelerator calls only enqueue, and enqueuing takes its time too: there the model has LAYERS_ENQUEUED layers, all
with the same weights, and a layer's time is its share of the time from the first one's begin to the last one's end.

Other processes only ever add to a time, and where they take a processor from a product of several threads they add a
lot. So figures are medians of repetitions that are spread over several rounds. What waiting for a reader costs is a
mean instead: after some waits, and not after others, the system puts two threads of a product on one processor for
some ten milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from headrace.errors import BudgetError
from headrace.inference.block_weights import BlockWeights, ConversionBuffer
from headrace.inference.embedding_and_head import EmbeddingRows
from headrace.inference.kv_cache import build_cache, lay_out_cache
from headrace.inference.loading import Loading
from headrace.inference.skeleton import build_skeleton, shortened_config
from headrace.inference.transformers_seam import cache_argument
from headrace.inference.weight_names import recipes_of
from headrace.model.blocks import HEAD_CHUNK_ROWS, product_slices
from headrace.model.layout import ByteRange, lay_out
from headrace.model.stored_model import StoredBlock
from headrace.planning.plan import Placement
from headrace.planning.rates import LayerTimes
from headrace.planning.workload import Workload
from headrace.streaming.arena import Arena, Memory, Piece
from headrace.streaming.checkpoint import Checkpoint, torch_dtype
from headrace.streaming.device import CpuDevice, Device
from headrace.streaming.stream import Stream

PROMPT_TOKENS_MAX = 2048
"""Longer prompts are scaled up from this one; the part of attention that grows with the square is then missing."""

SCALED_FROM_TOKENS = 512
PREFILL_S_MAX = 1.0
"""Prefills of several sequences are scaled up from so many tokens where the layer would take longer than this."""

ROUNDS = 3
DECODES_PER_ROUND = 3
WAITS_PER_ROUND = 6
OTHERS_S_MAX = 0.25
"""Other numbers of tokens are tried less often where a round of them would take longer than this."""

FLUSH_BYTES = 48 << 20
"""Read before every repetition: in a run, other layers' weights pass through the CPU's cache in between."""

WAITED_BYTES = 16 << 20
WAKE_S_MAX = 0.02
"""A longer delay comes from elsewhere."""

LAYERS_ENQUEUED = 4

CACHE_BYTES_MAX = 64 << 20
ROWS_TRIED = 128
STEPS = 6


class Timed(NamedTuple):
    """Seconds of a whole layer, and of one weight of the head, at so many tokens in a decode pass."""

    tokens: int
    layer_s: float
    head_seconds_per_parameter: float


class TimedLayer(NamedTuple):
    """What one layer, the head and a pass outside of them took, in seconds."""

    layer: LayerTimes
    stall_penalty_s: float
    """by how much longer the layer takes after a wait"""
    pass_overhead_s: float
    """a decode step beside layers and head: masks, positions, choosing the token"""
    first_pass_overhead_s: float
    """the same inside of the first pass, of whole prompts"""
    row_s: float
    """one distinct row of the embedding from the checkpoint"""
    head_seconds_per_parameter: float
    others: tuple[Timed, ...] = ()
    """decode passes of other numbers of tokens"""


def time_layer(
    loading: Loading,
    dtype: torch.dtype,
    *,
    conversion_bytes: int,
    copy_misaligned: bool,
    device: Device,
    other_tokens: Sequence[int] = (),
) -> TimedLayer:
    """Time the first layer of the checkpoint under its workload, and in decode passes of `other_tokens`.

    `device` computes: the one that the model is loaded onto, or the CPU beside it.
    """
    with torch.inference_mode():
        stage = _Stage(
            loading, dtype, conversion_bytes=conversion_bytes, copy_misaligned=copy_misaligned, device=device
        )
        try:
            return _timed_layer(stage, loading.options.workload, other_tokens)
        finally:
            stage.close()


def _timed_layer(stage: _Stage, workload: Workload, other_tokens: Sequence[int]) -> TimedLayer:
    sequences, prompt = workload.sequences, min(workload.prompt_tokens, PROMPT_TOKENS_MAX)
    past = workload.prompt_tokens + workload.generate_tokens // 2
    stage.run(1, 1, 0)
    together = max(1, min(sequences, SCALED_FROM_TOKENS // prompt))
    first_s = stage.run(together, prompt, 0).layer_s
    if first_s * sequences / together < PREFILL_S_MAX:
        together = sequences
    scale = sequences * workload.prompt_tokens / (together * prompt)
    prefills: list[_Parts] = []
    decodes: list[float] = []
    waited: list[float] = []
    others: dict[int, list[float]] = {tokens: [] for tokens in other_tokens}
    for _ in range(ROUNDS):
        prefills.append(stage.run(together, prompt, 0))
        decodes += [stage.run(sequences, 1, past).layer_s for _ in range(DECODES_PER_ROUND)]
        if stage.waits_on_host:
            waited += [stage.run(sequences, 1, past, wait=True).layer_s for _ in range(WAITS_PER_ROUND)]
        for tokens, times in others.items():
            if not times or times[0] < OTHERS_S_MAX:
                times.append(stage.run(tokens, 1, past).layer_s)
    decode_s = typical(decodes)
    return TimedLayer(
        layer=LayerTimes(prefill_s=typical([part.layer_s for part in prefills]) * scale, decode_s=decode_s),
        stall_penalty_s=max(0.0, statistics.fmean(min(time_s - decode_s, WAKE_S_MAX) for time_s in waited))
        if waited
        else 0.0,
        pass_overhead_s=stage.step_overhead_s(sequences),
        first_pass_overhead_s=typical([part.beside_s for part in prefills]) * scale,
        row_s=stage.row_s(),
        head_seconds_per_parameter=stage.head_s(sequences),
        others=tuple(Timed(tokens, typical(times), stage.head_s(tokens)) for tokens, times in others.items()),
    )


def typical(values: Sequence[float]) -> float:
    """The median, the lower one of two."""
    return statistics.median_low(values)


class _Parts(NamedTuple):
    """One pass: the layer, and everything beside it."""

    layer_s: float
    beside_s: float


class _Stage:
    """The model with one layer (on an accelerator with a few of the same weights), its weights in place."""

    def __init__(
        self,
        loading: Loading,
        dtype: torch.dtype,
        *,
        conversion_bytes: int,
        copy_misaligned: bool,
        device: Device,
    ) -> None:
        checkpoint, config = loading.checkpoint, loading.config
        self._checkpoint, self._dtype = checkpoint, dtype
        self._device, self._where = device, device.torch_device
        self.waits_on_host = device.uses_host_memory
        self._layers = 1 if device.uses_host_memory else LAYERS_ENQUEUED
        self._model = build_skeleton(
            shortened_config(config, self._layers),
            dtype,
            attention=loading.options.asked.attention,
            device=self._where,
        )
        model, architecture = checkpoint.model, checkpoint.model.architecture
        self._width = model.hidden_size if architecture.model_type != "opt" else config.word_embed_proj_dim
        self._flush = torch.ones(FLUSH_BYTES // 4, device=self._where)
        self._set_fixed()
        block, prefix = model.blocks[0], f"{architecture.layers}.0."
        recipes = {
            name.removeprefix(prefix): recipe
            for name, recipe in recipes_of(self._model, block.tensors).items()
            if name.startswith(prefix)
        }
        self._memory, self._piece = _bring(checkpoint, block, device)
        buffer = ConversionBuffer(conversion_bytes, self._where)
        positions = block.layout.positions if device.uses_host_memory else block.aligned.positions
        layers = [self._model.get_submodule(f"{architecture.layers}.{number}") for number in range(self._layers)]
        weights = [
            BlockWeights(layer, recipes, positions, dtype, buffer, copy_misaligned, self._where) for layer in layers
        ]
        for own in weights:
            own.enter(self._piece, stays=False)
        self._weights = weights[0]
        part = block.layout.extents[0]
        waited = lay_out([ByteRange("part", part.file_index, part.file_offset, min(part.length, WAITED_BYTES))])
        self._stream = Stream(
            layouts=[waited, waited],
            places=[Placement.DISK, Placement.DISK],
            source=checkpoint.open_source(),
            device=CpuDevice(),
            settings=replace(loading.reader, slots=1, slot_bytes=waited.footprint_bytes, overlap=False),
        )
        self._next_part, self._waits = 0, False
        self._entered_s = self._left_s = 0.0
        layers[0].register_forward_pre_hook(self._enter)
        layers[-1].register_forward_hook(self._leave)

    def _set_fixed(self) -> None:
        checkpoint = self._checkpoint
        fixed = checkpoint.read_tensors(checkpoint.model.fixed)
        for name, recipe in recipes_of(self._model, checkpoint.model.fixed).items():
            module_name, _, own_name = name.rpartition(".")
            value = fixed[recipe.ingredients[0].entry.name].to(self._dtype).to(self._where)
            module = self._model.get_submodule(module_name)
            module.register_parameter(own_name, nn.Parameter(value, requires_grad=False))

    def _enter(self, *_: Any) -> None:
        if self._waits:
            self._waits = False
            self._stream.wait(self._next_part)
            self._stream.release(self._next_part)
            self._next_part = 1 - self._next_part
            self._entered_s = time.perf_counter()
            self._weights.enter(self._piece, stays=False)
            return
        self._entered_s = self._now()

    def _leave(self, *_: Any) -> None:
        self._left_s = self._now()

    def _now(self) -> float:
        """The moment when all that was enqueued is done."""
        self._device.synchronize()
        return time.perf_counter()

    def run(self, sequences: int, tokens: int, past_tokens: int, *, wait: bool = False) -> _Parts:
        """One pass of so many new tokens after so many earlier ones, with other data in the CPU's cache.

        With `wait`, the layer begins right after having waited for bytes from the disk.
        """
        layer = next(self._checkpoint.model.layers())
        token_bytes = layer.kv_elements_per_token * self._dtype.itemsize * sequences
        past_tokens = min(past_tokens, CACHE_BYTES_MAX // token_bytes)
        hidden = torch.randn(sequences, tokens, self._width).to(self._dtype).to(self._where)
        cache = build_cache(self._model.config, capacity_tokens=past_tokens + tokens)
        if past_tokens:
            states = torch.zeros(
                sequences, layer.kv_heads, past_tokens, layer.key_dim, dtype=self._dtype, device=self._where
            )
            for number in range(self._layers):
                cache.update(states, states, number)
        given = {cache_argument(self._model.base_model): cache}
        self._flush.amax()
        self._waits = wait
        start = self._now()
        self._model.base_model(inputs_embeds=hidden, use_cache=True, **given)
        whole = self._now() - start
        inside = self._left_s - self._entered_s
        return _Parts(inside / self._layers, whole - inside)

    def step_overhead_s(self, sequences: int) -> float:
        """Seconds from the end of a step's layer to the beginning of the next one's: `generate` with an idle head."""
        stored, model = self._checkpoint.model, self._model
        vocabulary = stored.blocks[-1].tensors[0].shape[0]
        rows = torch.zeros(sequences, self._width, dtype=self._dtype)
        EmbeddingRows(model.get_input_embeddings(), self._dtype, lambda wanted: rows[: len(wanted)], device=self._where)
        model.set_output_embeddings(_IdleHead(sequences, vocabulary, self._dtype, self._where))
        model.headrace = _Admitting()
        gaps: list[float] = []

        def note_gap(*_: Any) -> None:
            if self._left_s:
                gaps.append(self._now() - self._left_s)

        self._left_s = 0.0
        layer = model.get_submodule(f"{stored.architecture.layers}.0")
        hook = layer.register_forward_pre_hook(note_gap)
        ids = torch.zeros(sequences, 2, dtype=torch.long, device=self._where)
        model.generation_config.eos_token_id = None
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
        hook.remove()
        return typical(gaps[1:])

    def row_s(self) -> float:
        """Seconds per row when some are read from all over the embedding's table."""
        entry = self._checkpoint.model.embedding
        count = min(ROWS_TRIED, entry.shape[0])
        rows = [number * entry.shape[0] // count for number in range(count)]
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            self._checkpoint.read_rows(entry, rows)
            seconds.append(time.perf_counter() - start)
        return typical(seconds) / count

    def head_s(self, tokens: int) -> float:
        """Seconds per element of the head's matrix at `tokens` rows, from one piece of made-up weights."""
        entry = self._checkpoint.model.blocks[-1].tensors[0]
        first, last = product_slices(entry.shape[0], HEAD_CHUNK_ROWS)[0]
        count, columns, stored = last - first, entry.shape[1], torch_dtype(entry)
        on = self._where
        weights = torch.full((count, columns), 0.5, dtype=stored, device=on)  # zeros would all be one page
        made = torch.empty(count, columns, dtype=self._dtype, device=on) if stored is not self._dtype else None
        hidden = torch.randn(tokens, columns).to(self._dtype).to(on)
        logits = torch.zeros(tokens, count + 1, dtype=self._dtype, device=on)

        def once() -> None:
            self._flush.amax()
            start = self._now()
            logits[:, :count] = functional.linear(hidden, weights if made is None else made.copy_(weights))
            seconds.append(self._now() - start)

        seconds: list[float] = []
        for _ in range(ROUNDS * DECODES_PER_ROUND):
            once()
        return typical(seconds[1:]) / (count * columns)

    def close(self) -> None:
        """End the readers, give the memory back."""
        self._stream.close()
        self._memory.close()
        self._device.release_cached()


def _bring(checkpoint: Checkpoint, block: StoredBlock, device: Device) -> tuple[Memory, Piece]:
    """One block's weights where they are computed with; the caller closes the memory."""
    if device.uses_host_memory:
        arena = Arena(block.read_bytes)
        arena.touch()
        piece = arena.take(block.read_bytes)
        checkpoint.read_block(block, piece)
        return arena, piece
    memory = device.allocate(block.held_bytes)
    piece = memory.take(block.held_bytes)
    piece.tensor.copy_(checkpoint.read_aligned(block))
    return memory, piece


class _IdleHead(nn.Module):
    """A head whose logits are there already."""

    def __init__(self, sequences: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._logits = torch.ones(sequences, 1, vocabulary, dtype=dtype, device=device)
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits for the last position, whatever the hidden states."""
        del hidden
        return self._logits


class _Admitting:
    """Stands where a loaded model's handle is; lets every request in."""

    def admit(self, **_: int) -> None:
        """Nothing is refused."""

    def lay_out_cache(self, cache: Any, *, capacity_tokens: int) -> None:
        """Keys and values where the layer computes."""
        lay_out_cache(cache, capacity_tokens=capacity_tokens)

    def out_of_memory(self, error: BaseException) -> BudgetError:
        """The device has less memory than was free a moment ago."""
        return BudgetError(f"a layer does not fit into what is free of the device's memory: {error}")
