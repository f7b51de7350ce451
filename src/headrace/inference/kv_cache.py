"""Keys and values in memory taken once: the transformers cache, with layers that do not grow by copying.

transformers' dynamic layer concatenates at every token, so it holds one layer twice and frees what the allocator may
not give back. Here a full-attention layer takes its final length at the first token (pages are touched only as they
are written) and hands out views, so that the attention kernels see the same numbers in the same shapes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from headrace.inference.host_cache import HostLayer, OffloadedCache
from headrace.inference.transformers_seam import DynamicCache, DynamicLayer


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A full-attention cache layer of a fixed greatest length, in tokens."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, capacity_tokens: int) -> None:
        super().__init__()
        self.capacity_tokens = capacity_tokens
        self._key_memory: torch.Tensor | None = None
        self._value_memory: torch.Tensor | None = None

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states of shape (sequences, heads, new tokens, head size); return all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        end = past + key_states.shape[-2]
        if not self._holds(self.keys, key_states):
            self._take(key_states, value_states, max(end, self.capacity_tokens))
        assert self._key_memory is not None
        assert self._value_memory is not None
        self._key_memory[:, :, past:end].copy_(key_states)
        self._value_memory[:, :, past:end].copy_(value_states)
        self.keys, self.values = self._key_memory[:, :, :end], self._value_memory[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let every sequence continue from the beam that was chosen for it; in place."""
        if self.get_seq_length() > 0:
            self.keys.copy_(self.keys.index_select(0, beam_idx.to(self.keys.device)))
            self.values.copy_(self.values.index_select(0, beam_idx.to(self.values.device)))

    def reset(self) -> None:
        """Forget all states and give the memory back."""
        super().reset()
        self._key_memory = self._value_memory = None

    def _holds(self, keys: torch.Tensor, new: torch.Tensor) -> bool:
        """Whether `keys` (as far as they go) lie in this layer's own memory and the new ones fit behind them."""
        memory = self._key_memory
        if memory is None or memory.shape[0] != new.shape[0]:
            return False
        past = self.get_seq_length()
        own = past == 0 or keys.data_ptr() == memory.data_ptr()
        return own and past + new.shape[-2] <= memory.shape[-2]

    def _take(self, key_states: torch.Tensor, value_states: torch.Tensor, capacity: int) -> None:
        past = self.get_seq_length()
        memories = []
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            memory = torch.empty((*new.shape[:2], capacity, new.shape[-1]), dtype=new.dtype, device=new.device)
            if past:
                memory[:, :, :past].copy_(old)
            memories.append(memory)
        self._key_memory, self._value_memory = memories


def build_cache(config: Any, *, capacity_tokens: int) -> DynamicCache:
    """A cache for this model, laid out where its layers compute."""
    cache = DynamicCache(config=config)
    lay_out_cache(cache, capacity_tokens=capacity_tokens)
    return cache


def lay_out_cache(
    cache: DynamicCache,
    *,
    capacity_tokens: int,
    visits: OffloadedCache | None = None,
    on_cpu: Collection[int] = (),
) -> None:
    """Exchange the layers of an empty cache; sliding-window layers stay transformers' own, bounded by their window.

    With `visits` the states of full-attention layers wait in host memory, but for the layers `on_cpu`, whose
    states are made there.
    """
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            if visits is None or number in on_cpu:
                cache.layers[number] = PreallocatedLayer(capacity_tokens)
            else:
                cache.layers[number] = HostLayer(visits)
