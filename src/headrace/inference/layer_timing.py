"""Run one layer of each kind of this very model, alone, and time it: the surest way to know what a pass will cost.

The planner's curve knows the machine; a timed layer knows this model's shapes, attention and small operations on it.
The transformers model is built as for a run, one layer gets its real weights, and the others hand their input on. The
layer is timed at the run's own number of tokens, for a prefill pass and for a decode pass at half of what is generated;
what a pass takes outside of its layers is timed as well.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from headrace.errors import BudgetError
from headrace.inference.block_weights import BlockWeights, ConversionBuffer, give_fixed
from headrace.inference.dry_pass import PREFILL_TOKENS
from headrace.inference.embedding_and_head import EmbeddingRows
from headrace.inference.kv_cache import build_cache, lay_out_cache
from headrace.inference.loading import Loading
from headrace.inference.skeleton import build_skeleton
from headrace.inference.transformers_seam import DynamicLayer, cache_argument
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

PREFILLS_S = 0.5
"""Prefills that took so long together are not repeated: what others take for a moment is a small part of that."""

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
DISTINCT_TOKENS = 128
_ONE_NUMBER = (1, 1, 1, 1)
STEPS = 6


class Timed(NamedTuple):
    """Seconds of a whole layer, and of one weight of the head, at so many tokens in a decode pass."""

    tokens: int
    layer_s: float
    head_seconds_per_parameter: float


class TimedLayer(NamedTuple):
    """What the layers, the head and a pass outside of them took, in seconds."""

    layers: tuple[LayerTimes, ...]
    """by kind"""
    decode_s: float
    """a decode pass of the mean layer"""
    stall_penalty_s: float
    """by how much longer a layer takes after a wait"""
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
    """Time the first layer of each kind under the run's workload, and in decode passes of `other_tokens`.

    `device` computes: the one that the model is loaded onto, or the CPU beside it.
    """
    kinds, blocks, work = loading.anatomy.kinds, loading.checkpoint.model.blocks, loading.options.workload
    found: list[_TimedKind] = []
    with torch.inference_mode():
        for number in loading.anatomy.first_of_kinds:
            stage = _Stage(
                loading,
                dtype,
                number,
                conversion_bytes=conversion_bytes,
                copy_misaligned=copy_misaligned,
                device=device,
            )
            with contextlib.closing(stage):
                if not found:
                    found.append(_timed_kind(stage, work, other_tokens))
                    ends = _timed_ends(stage, work, other_tokens)
                    continue
                try:
                    found.append(_timed_kind(stage, work, other_tokens))
                except (ValueError, TypeError, KeyError, AttributeError):
                    # The layer wants something that one before it makes: by its size, then, from the first one.
                    found.append(found[0].scaled(blocks[number].active_parameters / blocks[0].active_parameters))
    shares = [kinds.count(kind) / len(kinds) for kind in range(len(found))]
    others = {
        tokens: sum(share * own.others[tokens] for share, own in zip(shares, found, strict=True))
        for tokens in other_tokens
    }
    return TimedLayer(
        layers=tuple(own.layer for own in found),
        decode_s=sum(share * own.layer.decode_s for share, own in zip(shares, found, strict=True)),
        stall_penalty_s=found[0].stall_penalty_s,
        pass_overhead_s=ends.pass_overhead_s,
        first_pass_overhead_s=found[0].first_pass_overhead_s,
        row_s=ends.row_s,
        head_seconds_per_parameter=ends.head_s,
        others=tuple(Timed(tokens, layer_s, ends.other_heads_s[tokens]) for tokens, layer_s in others.items()),
    )


class _TimedKind(NamedTuple):
    """One layer; seconds."""

    layer: LayerTimes
    stall_penalty_s: float
    first_pass_overhead_s: float
    others: dict[int, float]

    def scaled(self, factor: float) -> _TimedKind:
        """A layer so many times as large."""
        return self._replace(
            layer=self.layer.scaled(factor), others={tokens: factor * own for tokens, own in self.others.items()}
        )


class _TimedEnds(NamedTuple):
    """What lies outside of the layers; seconds."""

    pass_overhead_s: float
    row_s: float
    head_s: float
    other_heads_s: dict[int, float]


def _timed_kind(stage: _Stage, workload: Workload, other_tokens: Sequence[int]) -> _TimedKind:
    sequences, prompt = workload.sequences, min(workload.prompt_tokens, PROMPT_TOKENS_MAX)
    past = workload.prompt_tokens + workload.generate_tokens // 2
    stage.run(1, 1, 0)
    together = max(1, min(sequences, SCALED_FROM_TOKENS // prompt))
    prefills = [stage.run(together, prompt, 0)]
    if together < sequences and prefills[0].layer_s * sequences / together < PREFILL_S_MAX:
        together = sequences
        prefills.clear()
    scale = sequences * workload.prompt_tokens / (together * prompt)
    decodes: list[float] = []
    waited: list[float] = []
    others: dict[int, list[float]] = {tokens: [] for tokens in other_tokens}
    for _ in range(ROUNDS):
        if sum(part.layer_s for part in prefills) < PREFILLS_S:
            prefills.append(stage.run(together, prompt, 0))
        decodes += [stage.run(sequences, 1, past).layer_s for _ in range(DECODES_PER_ROUND)]
        if stage.waits_on_host:
            waited += [stage.run(sequences, 1, past, wait=True).layer_s for _ in range(WAITS_PER_ROUND)]
        for tokens, times in others.items():
            if not times or times[0] < OTHERS_S_MAX:
                times.append(stage.run(tokens, 1, past).layer_s)
    decode_s = typical(decodes)
    return _TimedKind(
        layer=LayerTimes(prefill_s=typical([part.layer_s for part in prefills]) * scale, decode_s=decode_s),
        stall_penalty_s=max(0.0, statistics.fmean(min(time_s - decode_s, WAKE_S_MAX) for time_s in waited))
        if waited
        else 0.0,
        first_pass_overhead_s=typical([part.beside_s for part in prefills]) * scale,
        others={tokens: typical(times) for tokens, times in others.items()},
    )


def _timed_ends(stage: _Stage, workload: Workload, other_tokens: Sequence[int]) -> _TimedEnds:
    return _TimedEnds(
        pass_overhead_s=stage.step_overhead_s(workload.sequences),
        row_s=stage.row_s(),
        head_s=stage.head_s(workload.sequences),
        other_heads_s={tokens: stage.head_s(tokens) for tokens in other_tokens},
    )


def typical(values: Sequence[float]) -> float:
    """The median, the lower one of two."""
    return statistics.median_low(values)


class _Parts(NamedTuple):
    """One pass: the layer, and everything beside it."""

    layer_s: float
    beside_s: float


class _Stage:
    """The model with one layer in place (on an accelerator a few with the same weights); the others pass input on."""

    def __init__(
        self,
        loading: Loading,
        dtype: torch.dtype,
        number: int,
        *,
        conversion_bytes: int,
        copy_misaligned: bool,
        device: Device,
    ) -> None:
        checkpoint, anatomy = loading.checkpoint, loading.anatomy
        self._checkpoint, self._dtype, self._anatomy = checkpoint, dtype, anatomy
        self._device, self._where = device, device.torch_device
        self.waits_on_host = device.uses_host_memory
        self._model = build_skeleton(
            loading.config, dtype, attention=loading.options.asked.attention, device=self._where
        )
        block, path = checkpoint.model.blocks[number], f"{anatomy.layers}.{number}"
        recipes = recipes_of(self._model, (*block.tensors, *checkpoint.model.fixed))
        give_fixed(self._model, checkpoint, recipes, self._where)
        for table in map(self._model.get_submodule, (anatomy.embedding, *anatomy.tables)):
            rows = torch.randn(min(DISTINCT_TOKENS, table.num_embeddings), table.embedding_dim).to(dtype)
            EmbeddingRows(table, dtype, rows.__getitem__, device=self._where)
        self._tokens = min(DISTINCT_TOKENS, self._model.get_submodule(anatomy.embedding).num_embeddings)
        self._flush = torch.ones(FLUSH_BYTES // 4, device=self._where)
        self._memory, self._piece = _bring(checkpoint, block, device)
        buffer = ConversionBuffer(conversion_bytes, self._where)
        positions = block.layout.positions if device.uses_host_memory else block.aligned.positions
        path_of_list, _, name_of_list = anatomy.layers.rpartition(".")
        layers = self._model.get_submodule(anatomy.layers)
        self._timed = self._numbers_like(number, layers, 1 if device.uses_host_memory else LAYERS_ENQUEUED)
        timed = [layers[other] for other in self._timed]
        weights = [
            BlockWeights(layer, path, recipes, positions, buffer, copy_misaligned, self._where, anatomy.made_in)
            for layer in timed
        ]
        for each in weights:
            each.enter(self._piece, stays=False)
        self._weights = weights[0]
        list_owner = self._model.get_submodule(path_of_list)
        passing = [
            layer if other in self._timed else _HandsOn(layer, anatomy.outputs[other])
            for other, layer in enumerate(layers)
        ]
        setattr(list_owner, name_of_list, nn.ModuleList(passing))
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
        timed[0].register_forward_pre_hook(self._enter)
        timed[-1].register_forward_hook(self._leave)

    def _numbers_like(self, number: int, layers: nn.ModuleList, most: int) -> list[int]:
        """`number` and later layers of the same kind and shapes."""

        def shapes(layer: nn.Module) -> list[tuple[int, ...]]:
            return [tuple(parameter.shape) for parameter in layer.parameters()]

        kinds = self._anatomy.kinds
        return [
            other
            for other in range(number, len(layers))
            if kinds[other] == kinds[number] and shapes(layers[other]) == shapes(layers[number])
        ][:most]

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
        kept = self._anatomy.caches[self._timed[0]]
        token_bytes = max(1, kept.elements_per_token) * self._dtype.itemsize * sequences
        past_tokens = min(past_tokens, CACHE_BYTES_MAX // token_bytes)
        # Tokens of many kinds, so that they go to many experts.
        ids = (torch.arange(sequences * tokens) % self._tokens).view(sequences, tokens).to(self._where)
        given = self._cache(sequences, past_tokens, past_tokens + tokens)
        self._flush.amax()
        self._waits = wait
        start = self._now()
        self._pass(ids, given)
        whole = self._now() - start
        inside = self._left_s - self._entered_s
        return _Parts(inside / len(self._timed), whole - inside)

    def _pass(self, ids: torch.Tensor, cache: dict[str, Any]) -> None:
        base = self._model.base_model
        if base is self._model:
            self._put_idle_head(len(ids), 1)
        base(input_ids=ids, use_cache=True, **cache)

    def _put_idle_head(self, sequences: int, vocabulary: int) -> None:
        path, _, name = self._anatomy.head.rpartition(".")
        setattr(self._model.get_submodule(path), name, _IdleHead(sequences, vocabulary, self._dtype, self._where))

    def _cache(self, sequences: int, past_tokens: int, capacity_tokens: int) -> dict[str, Any]:
        """A cache with so many tokens in it, as an argument of a pass; none where the model keeps it otherwise.

        Layers that are not timed keep one number of each token, so that positions and masks are right.
        """
        if not self._anatomy.has_cache_layers:
            return {}
        name = cache_argument(self._model.base_model)
        cache = build_cache(self._model.config, capacity_tokens=capacity_tokens)
        if not past_tokens:
            return {name: cache}
        first, kept = 0, self._anatomy.caches[self._timed[0]]
        if kept.state_elements:  # states have to come from somewhere
            first = min(past_tokens, PREFILL_TOKENS)
            ids = torch.zeros(sequences, first, dtype=torch.long, device=self._where)
            self._pass(ids, {name: cache})
        for number, layer in enumerate(cache.layers):
            if not isinstance(layer, DynamicLayer):
                continue
            timed = number in self._timed
            heads = kept.heads if timed else _ONE_NUMBER
            count = past_tokens - first if timed else past_tokens
            if count:
                keys, values = (
                    torch.zeros(sequences, own, count, width, dtype=self._dtype, device=self._where)
                    for own, width in (heads[:2], heads[2:])
                )
                layer.update(keys, values)
        return {name: cache}

    def step_overhead_s(self, sequences: int) -> float:
        """Seconds from the end of a step's layer to the beginning of the next one's: `generate` with an idle head."""
        stored, model = self._checkpoint.model, self._model
        vocabulary = stored.blocks[-1].tensors[0].shape[0]
        self._put_idle_head(sequences, vocabulary)
        model.headrace = _Admitting()
        gaps: list[float] = []

        def note_gap(*_: Any) -> None:
            if self._left_s:
                gaps.append(self._now() - self._left_s)

        self._left_s = 0.0
        layer = model.get_submodule(f"{self._anatomy.layers}.{self._timed[0]}")
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


class _HandsOn(nn.Module):
    """Stands where a layer is and returns the hidden states that it is given; what is asked of it the layer answers."""

    def __init__(self, layer: nn.Module, outputs: int | None) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not one of its modules, so that nothing reaches its weights
        self._outputs = outputs

    def __getattr__(self, name: str) -> Any:
        """What this module has not, the layer may have: the kind of its attention, say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states as the layer would."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if self._outputs is None else (hidden, *[None] * (self._outputs - 1))


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
