"""Keys and values that wait in page-locked host memory and visit the accelerator layer by layer.

For contexts whose cache is larger than what the device has left. Each layer's states so far are brought while the layer
before computes, the new ones are written back beside the computation, and attention sees them exactly as it would see
a cache that stays: the same numbers in the same shapes and strides, so the result is the same bit for bit.

On the host a layer's states lie token by token, so that what there is so far, and what is new, are one stretch of bytes
each. The device holds two such stages, in turn, and one laid out for attention.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from headrace.errors import InvalidRequestError
from headrace.inference.transformers_seam import DynamicLayer
from headrace.model.layout import align_up
from headrace.streaming.arena import Arena, Piece
from headrace.streaming.device import CACHE_LANE, COMPLETE, CopyPart, Device, DeviceEvent


class _LayerState:
    """What the host keeps of one layer."""

    def __init__(self, number: int) -> None:
        self.number = number
        """among the layers of its cache"""
        self.length = 0
        """tokens so far"""
        self.written: DeviceEvent = COMPLETE
        """the latest states have reached the host"""


class HostLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """One full-attention layer; its states are the `OffloadedCache`'s to keep."""

    def __init__(self, visits: OffloadedCache) -> None:
        super().__init__()
        self._visits = visits
        self._kept = visits.add_layer()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states of shape (sequences, heads, new tokens, head size); return all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._visits.visit(self._kept, key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self._kept.length

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Forget the last -`tokens_to_remove` tokens (a negative number, in a tensor for some releases)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, not {tokens_to_remove}")
        self._kept.length = max(0, self._kept.length + int(tokens_to_remove))

    def reset(self) -> None:
        """Forget all states."""
        self._kept.length = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let every sequence continue from the beam that was chosen for it. Waits for the device."""
        self._visits.reorder(self._kept, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: the memory was taken for the sequences of the first pass."""
        raise InvalidRequestError(f"a cache on the host cannot be repeated {repeats} times; keep it on the device")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused, as repeating is."""
        del indices
        raise InvalidRequestError("sequences cannot be taken out of a cache on the host; keep it on the device")


class _Stage:
    """Device memory for one layer's states, token by token, as they lie on the host."""

    def __init__(self, shape: tuple[int, ...], like: torch.Tensor, free: DeviceEvent) -> None:
        self.states = torch.empty((2, *shape), dtype=like.dtype, device=like.device)
        """keys and values, each (tokens, sequences, heads, head size)"""
        self.free = free
        """what the device last did with this memory is done"""
        self.arrived = free
        self.holds: _LayerState | None = None
        """whose states it holds or is being given"""
        self.tokens = 0


class OffloadedCache:
    """The host's side of all layers of one cache, and their turns on the device."""

    def __init__(self, device: Device, *, capacity_tokens: int) -> None:
        self._layers: list[_LayerState] = []
        self._device = device
        self._capacity = capacity_tokens
        self._places: list[Piece] = []
        self._stages: list[_Stage] = []
        self._laid_out: Sequence[torch.Tensor] = ()
        self._token_bytes = 0
        self._give_back: Callable[[], object] = lambda: None

    def add_layer(self) -> _LayerState:
        """One more layer, behind the others."""
        self._layers.append(_LayerState(len(self._layers)))
        return self._layers[-1]

    def visit(
        self, layer: _LayerState, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new states in, bring the next layer's, return this layer's keys and values so far."""
        past, end = layer.length, layer.length + key_states.shape[-2]
        if not self._stages:
            self._take_memory(key_states)
        elif end > self._capacity:
            self._grow(key_states, end)
        stage = self._stage_of(layer)
        self._device.compute_after(stage.arrived)
        for kept, new, whole in zip(stage.states, (key_states, value_states), self._laid_out, strict=True):
            kept[past:end].copy_(new.permute(2, 0, 1, 3))
            whole[:, :, :end].copy_(kept[:end].permute(1, 2, 0, 3))
        parts = [
            CopyPart(_stretch(kept, past, end), self._on_host(layer, number, past, end))
            for number, kept in enumerate(stage.states)
        ]
        layer.written = stage.free = self._device.copy(parts, after=[self._device.computed()], lane=CACHE_LANE).end
        layer.length, stage.holds, stage.tokens = end, layer, end
        following = self._layers[(layer.number + 1) % len(self._layers)]
        if following is not layer:
            self._bring(following)
        keys, values = self._laid_out
        return keys[:, :, :end], values[:, :, :end]

    def reorder(self, layer: _LayerState, beam_idx: torch.Tensor) -> None:
        """Permute the sequences of one layer on the host."""
        if not layer.length:
            return
        self._device.synchronize()
        chosen = beam_idx.to("cpu")
        like = self._stages[0].states[0]
        for number in range(2):
            flat = self._on_host(layer, number, 0, layer.length)
            states = flat.view(like.dtype).view(layer.length, *like.shape[1:])
            states.copy_(states.index_select(1, chosen))
        for stage in self._stages:
            if stage.holds is layer:
                stage.holds = None

    def _stage_of(self, layer: _LayerState) -> _Stage:
        for stage in self._stages:
            if stage.holds is layer and stage.tokens >= layer.length:
                return stage
        return self._bring(layer)

    def _bring(self, layer: _LayerState) -> _Stage:
        """Start to copy a layer's states so far into the stage that was used longer ago."""
        self._stages.reverse()
        stage = self._stages[-1]
        stage.holds, stage.tokens = layer, layer.length
        stage.arrived = stage.free
        if layer.length:
            parts = [
                CopyPart(self._on_host(layer, number, 0, layer.length), _stretch(kept, 0, layer.length))
                for number, kept in enumerate(stage.states)
            ]
            stage.arrived = self._device.copy(parts, after=[stage.free, layer.written], lane=CACHE_LANE).end
        return stage

    def _grow(self, states: torch.Tensor, tokens: int) -> None:
        """Make room for more tokens than were announced, as a cache that stays does; waits for the device.

        Drafts reach beyond the end of a text.
        """
        self._device.synchronize()
        before, give_back = self._places, self._give_back
        self._capacity = tokens
        self._take_memory(states)
        for layer in self._layers:
            for number in range(2):
                old = before[2 * layer.number + number].tensor[: layer.length * self._token_bytes]
                self._on_host(layer, number, 0, layer.length).copy_(old)
        give_back()

    def _take_memory(self, states: torch.Tensor) -> None:
        self._capacity = max(self._capacity, states.shape[-2])
        sequences, heads, _, size = states.shape
        shape = (self._capacity, sequences, heads, size)
        whole = (sequences, heads, self._capacity, size)
        # What was enqueued before may still read what the allocator gives, and copies go through another stream.
        self._stages = [_Stage(shape, states, self._device.computed()) for _ in range(2)]
        self._laid_out = [torch.empty(whole, dtype=states.dtype, device=states.device) for _ in range(2)]
        self._token_bytes = sequences * heads * size * states.dtype.itemsize
        each = align_up(self._capacity * self._token_bytes)
        arena = self._device.allocate_host(2 * len(self._layers) * each)
        self._places = [arena.take(each) for _ in range(2 * len(self._layers))]
        self._give_back = weakref.finalize(
            self, _give_back, self._device, arena, [stage.states for stage in self._stages]
        )

    def _on_host(self, layer: _LayerState, number: int, first: int, last: int) -> torch.Tensor:
        place = self._places[2 * layer.number + number].tensor
        return place[first * self._token_bytes : last * self._token_bytes]


def _stretch(kept: torch.Tensor, first: int, last: int) -> torch.Tensor:
    return kept[first:last].view(torch.uint8).flatten()


def _give_back(device: Device, arena: Arena, stages: list[torch.Tensor]) -> None:
    """Wait for the copies that are on their way, and only then let go of either side."""
    with contextlib.suppress(RuntimeError):
        device.synchronize()
    arena.close()
    stages.clear()
