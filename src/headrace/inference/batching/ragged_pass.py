"""A pass of tokens from many sequences, none of them padded: the model sees one row of tokens, attention sees each.

Everything in a transformers model but attention treats tokens one by one, so the tokens of all sequences are laid end
to end in one row of shape (1, tokens). Attention goes through transformers' own register of attention functions: ours
takes each sequence's queries out of the row and its keys and values out of a pool, so the result of a sequence does
not depend on who shares the pass, but for the rounding of the matrix products around it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from headrace.errors import UnsupportedModelError
from headrace.inference.transformers_seam import (
    AttentionInterface,
    Cache,
    cache_argument,
    exchanges_attention,
    use_attention,
)
from headrace.planning.jobs.packing import Copy, Turn

ATTENTION = "headrace_ragged"
_OWN_POSITIONS = ("bloom", "falcon", "mpt")
"""position biases inside of the attention code, or attention code that is not exchangeable"""


class _Part(NamedTuple):
    """Where one sequence's tokens lie: rows [first_row, last_row) of the pass, positions [start, start + length)."""

    first_row: int
    last_row: int
    start: int
    length: int


class RaggedCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of all sequences: per layer two tensors of shape (positions, heads, head size)."""

    def __init__(self, *, positions: int) -> None:
        self.layers: list[Any] = []
        self._positions = positions
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._rows = torch.empty(0, dtype=torch.long)

    def place(self, rows: torch.Tensor) -> None:
        """Say which position each row of the next pass is written to."""
        self._rows = rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write states of shape (1, heads, tokens, head size) where `place` said; hand them through."""
        if layer_idx not in self._keys:
            self._keys[layer_idx] = self._new(key_states)
            self._values[layer_idx] = self._new(value_states)
        self._keys[layer_idx].index_copy_(0, self._rows, key_states[0].transpose(0, 1))
        self._values[layer_idx].index_copy_(0, self._rows, value_states[0].transpose(0, 1))
        return key_states, value_states

    def _new(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_empty((self._positions, states.shape[1], states.shape[3]))  # touched as it is written

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy ranges of positions, in every layer."""
        for memory in (*self._keys.values(), *self._values.values()):
            for source, target, tokens in copies:
                memory[target : target + tokens].copy_(memory[source : source + tokens])

    def layer(self, layer_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer."""
        return self._keys[layer_index], self._values[layer_index]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given with every pass."""
        del layer_idx
        return 0


class _Layout:
    """The sequences of one pass, and the masks of those with several tokens, made once for all layers."""

    def __init__(self, cache: RaggedCache, parts: Sequence[_Part]) -> None:
        self.cache = cache
        self.parts = parts
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def mask(self, tokens: int, length: int, window: int | None, groups: int) -> torch.Tensor:
        """True where query i, at position length - tokens + i, may see key j; repeated for the heads of a group."""
        found = self._masks.get((tokens, length, window))
        if found is None:
            query = torch.arange(length - tokens, length)[:, None]
            key = torch.arange(length)[None, :]
            seen = key <= query
            if window is not None:
                seen &= key > query - window
            found = seen.repeat(groups, 1)
            self._masks[tokens, length, window] = found
        return found


_layout: ContextVar[_Layout] = ContextVar("headrace_ragged_layout")


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend sequence by sequence. `query` is (1, heads, tokens, head size); returns (1, tokens, heads, size), None.

    The heads of a group share keys, so they are laid out as more queries of the same keys. `key` and `value`, the
    states of this pass, are in the pool already.
    """
    del key, value, attention_mask, dropout
    layout = _layout.get()
    keys, values = layout.cache.layer(module.layer_idx)  # type: ignore[arg-type]
    heads, kv_heads = query.shape[1], keys.shape[1]
    groups = heads // kv_heads
    attended = query.new_empty((query.shape[2], heads, values.shape[2]))
    for first_row, last_row, start, length in layout.parts:
        tokens = last_row - first_row
        begin = start
        if tokens == 1 and sliding_window is not None and length > sliding_window:
            begin = start + length - sliding_window
        own_keys = keys[begin : start + length].transpose(0, 1).unsqueeze(0)
        own_values = values[begin : start + length].transpose(0, 1).unsqueeze(0)
        own_query = query[:, :, first_row:last_row].reshape(1, kv_heads, groups * tokens, query.shape[3])
        mask = None if tokens == 1 else layout.mask(tokens, length, sliding_window, groups)
        if softcap is None:
            result = functional.scaled_dot_product_attention(own_query, own_keys, own_values, mask, scale=scaling)
        else:
            result = _softcapped(own_query, own_keys, own_values, mask, scaling, softcap)
        attended[first_row:last_row] = result.view(heads, tokens, -1).transpose(0, 1)
    return attended.unsqueeze(0), None


def _softcapped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores are bent by softcap * tanh(score / softcap)."""
    scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ values


AttentionInterface.register(ATTENTION, ragged_attention)


class RaggedRunner:
    """Runs packed passes on a loaded model, with a pool of `positions` for keys and values taken for good."""

    def __init__(self, model: Any, *, positions: int) -> None:
        require_ragged(model)
        self._model = model
        self._cache = RaggedCache(positions=positions)
        self._cache_argument = cache_argument(model)
        use_attention(model, ATTENTION)

    def run(self, copies: Sequence[Copy], turns: Sequence[Turn], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Compute one pass; `tokens` holds the token ids of each turn.

        Returns the logits of the turns that sample, in their order: shape (samples, vocabulary), compute dtype.
        """
        ids = list(itertools.chain.from_iterable(tokens))
        assert len(ids) == sum(turn.tokens for turn in turns), "turns and their tokens differ"
        parts, places = _laid_out(turns)
        last_rows = [part.last_row - 1 for part, turn in zip(parts, turns, strict=True) if turn.samples]
        positions = [place for turn in turns for place in range(turn.first, turn.first + turn.tokens)]
        self._cache.place(places)
        # A pass in which only prompts go on still goes through the head, which streams in its turn: for one row.
        kept = torch.tensor(last_rows or [len(ids) - 1])
        with _in_layout(_Layout(self._cache, parts)), torch.inference_mode():
            self._cache.copy(copies)
            output = self._model(
                input_ids=torch.tensor([ids]),
                position_ids=torch.tensor([positions]),
                use_cache=True,
                logits_to_keep=kept,
                **{self._cache_argument: self._cache},
            )
        self._model.headrace.passes.clear()  # a long job must not grow by remembering its passes
        return output.logits[0, : len(last_rows)]  # type: ignore[no-any-return]


def _laid_out(turns: Sequence[Turn]) -> tuple[list[_Part], torch.Tensor]:
    """Rows of each turn in the pass, and the position of the pool that each row is written to."""
    parts: list[_Part] = []
    places: list[int] = []
    row = 0
    for turn in turns:
        end = turn.first + turn.tokens
        parts.append(_Part(row, row + turn.tokens, turn.start, end))
        places.extend(range(turn.start + turn.first, turn.start + end))
        row += turn.tokens
    return parts, torch.tensor(places)


def attend_alone(
    module: torch.nn.Module, cache: RaggedCache, turns: Sequence[Turn], query: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    """Write keys and values and attend, as a layer does, outside of a model: to be timed."""
    parts, places = _laid_out(turns)
    cache.place(places)
    cache.update(states, states, 0)
    with _in_layout(_Layout(cache, parts)):
        return ragged_attention(module, query, states, states, None)[0]


def require_ragged(model: Any) -> None:
    """Raise UnsupportedModelError for a model whose attention cannot be exchanged."""
    if not exchanges_attention(model) or model.config.model_type in _OWN_POSITIONS:
        raise UnsupportedModelError(
            f"batches of {model.config.model_type} models are not supported: their attention in transformers does not "
            "go through its register of attention functions. headrace run takes them, several prompts at a time"
        )


@contextmanager
def _in_layout(layout: _Layout) -> Iterator[None]:
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)
