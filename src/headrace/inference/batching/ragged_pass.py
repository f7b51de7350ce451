"""A pass of tokens from many sequences, none of them padded: the model sees one row of tokens, attention sees each.

Everything in a transformers model but attention treats tokens one by one, so the tokens of all sequences are laid end
to end in one row of shape (1, tokens). Attention goes through transformers' own register of attention functions: ours
takes each sequence's queries out of the row and its keys and values out of a pool, so the result of a sequence does
not depend on who shares the pass, but for the rounding of the matrix products around it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from headrace.errors import UnsupportedModelError
from headrace.inference.transformers_seam import (
    ROPE_BY_LENGTH,
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    bends_scores,
    cache_argument,
    causal_mask_function,
    exchanges_attention,
    use_attention,
)
from headrace.planning.jobs.packing import Copy, Turn

ATTENTION = "headrace_ragged"
LOOKED_AHEAD = 64
"""positions over which a rule is looked at"""
_WITHOUT_EFFECT = frozenset({
    "dropout", "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions",
    "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep",
})  # fmt: skip
"""arguments of attention functions that change nothing here: a window is in the rule of the mask already"""
_OWN_POSITIONS = ("bloom", "falcon", "mpt")
"""position biases inside of the attention code, or attention code that is not exchangeable"""


class _Part(NamedTuple):
    """Where one sequence's tokens lie: rows [first_row, last_row) of the pass, positions [start, start + length)."""

    first_row: int
    last_row: int
    start: int
    length: int
    whole: int
    """tokens of the sequence as it was when it was last computed as a whole, if that is more"""


class RaggedCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of all sequences: per layer two tensors of shape (positions, heads, head size)."""

    def __init__(self, *, positions: int) -> None:
        self.layers: list[Any] = []
        self._positions = positions
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._rows = torch.empty(0, dtype=torch.long)
        self._written: tuple[torch.Tensor, torch.Tensor] | None = None

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
        self._written = key_states, value_states
        return self._written

    def keeps(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether these are what was written last: some models keep what keys and values are made of."""
        return self._written is not None and keys is self._written[0] and values is self._written[1]

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

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Of a mask that is never made: see `ragged_mask`."""
        del layer_idx
        return query_length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given with every pass."""
        del layer_idx
        return 0


class MaskRule:
    """Which positions a token sees, as the model itself says it. Handed through the model in place of a mask."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.is_plain = function is causal_mask_function
        """every token sees itself and all before it"""

    def seen(self, positions: torch.Tensor, length: int) -> torch.Tensor:
        """Whether the tokens at these positions see those at [0, length): shape (positions, length)."""
        zero = torch.zeros((1, 1), dtype=torch.long)
        seen = self._function(zero, zero, positions[:, None], torch.arange(length)[None, :])
        return torch.as_tensor(seen).broadcast_to(len(positions), length)

    @cached_property
    def looks_ahead(self) -> bool:
        """Whether a token sees one that comes later."""
        return not self.is_plain and bool(self.seen(torch.arange(LOOKED_AHEAD), LOOKED_AHEAD).triu(1).any())


def ragged_mask(*_args: Any, mask_function: Callable[..., Any], **_kwargs: Any) -> MaskRule:
    """In place of a mask for one row of tokens, which would be of many sequences: the rule that it would follow."""
    return MaskRule(mask_function)


CAUSAL = MaskRule(causal_mask_function)


class _View(NamedTuple):
    """What the tokens of a turn see: positions from `begin` on, all of them or those of a mask."""

    begin: int
    mask: torch.Tensor | None
    """shape (groups * tokens, length - begin)"""


class _Layout:
    """The sequences of one pass, and what they see, found once for all layers of a kind."""

    def __init__(self, cache: RaggedCache, parts: Sequence[_Part], *, bends_scores: bool = True) -> None:
        self.cache = cache
        self.parts = parts
        self.bends_scores = bends_scores
        """the model's own attention heeds a softcap"""
        self._views: dict[tuple[MaskRule, int, int, int], _View] = {}
        self._looked_at: set[MaskRule] = set()

    def view(self, rule: MaskRule, tokens: int, length: int, groups: int) -> _View:
        """What the last `tokens` of `length` see; repeated for the heads of a group."""
        if rule.is_plain and tokens == 1:
            return _View(0, None)
        if tokens == 1 and rule not in self._looked_at:
            self._look_for_single_tokens(rule, groups)
        found = self._views.get((rule, tokens, length, groups))
        if found is None:
            seen = rule.seen(torch.arange(length - tokens, length), length)
            begin = int(seen.any(0).int().argmax())
            seen = seen[:, begin:]
            found = _View(begin, None if seen.all() else seen.repeat(groups, 1))
            self._views[rule, tokens, length, groups] = found
        return found

    def _look_for_single_tokens(self, rule: MaskRule, groups: int) -> None:
        """Find at once what the lone tokens of all sequences see, where that is all from some position on."""
        self._looked_at.add(rule)
        lengths = torch.tensor([part.length for part in self.parts if part.last_row - part.first_row == 1])
        longest = int(lengths.max())
        seen = rule.seen(lengths - 1, longest) & (torch.arange(longest) < lengths[:, None])
        begins = seen.int().argmax(1)
        for length, begin, count in zip(lengths.tolist(), begins.tolist(), seen.sum(1).tolist(), strict=True):
            if count == length - begin:
                self._views[rule, 1, length, groups] = _View(begin, None)


_layout: ContextVar[_Layout] = ContextVar("headrace_ragged_layout")


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskRule | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend sequence by sequence. `query` is (1, heads, tokens, head size); returns (1, tokens, heads, size), None.

    The heads of a group share keys, so they are laid out as more queries of the same keys. `key` and `value`, the
    states of this pass, must be in the pool already. `s_aux`, shape (heads,): scores of a sink that gives nothing.
    Raises UnsupportedModelError for a mask or an argument that it does not know.
    """
    rule = _known(attention_mask, others)
    layout = _layout.get()
    softcap = softcap if layout.bends_scores else None
    if not layout.cache.keeps(key, value):
        raise UnsupportedModelError("their cache keeps something else than the keys and values that attention takes")
    keys, values = layout.cache.layer(module.layer_idx)  # type: ignore[arg-type]
    heads, kv_heads = query.shape[1], keys.shape[1]
    groups = heads // kv_heads
    attended = query.new_empty((query.shape[2], heads, values.shape[2]))
    for first_row, last_row, start, length, _whole in layout.parts:
        tokens = last_row - first_row
        begin, mask = layout.view(rule, tokens, length, groups)
        own_keys = keys[start + begin : start + length].transpose(0, 1).unsqueeze(0)
        own_values = values[start + begin : start + length].transpose(0, 1).unsqueeze(0)
        own_query = query[:, :, first_row:last_row].reshape(1, kv_heads, groups * tokens, query.shape[3])
        if softcap is None and s_aux is None:
            result = functional.scaled_dot_product_attention(own_query, own_keys, own_values, mask, scale=scaling)
        else:
            sinks = None if s_aux is None else s_aux.view(1, kv_heads, groups, 1).repeat_interleave(tokens, 2)
            result = _by_hand(own_query, own_keys, own_values, mask, scaling, softcap, sinks)
        attended[first_row:last_row] = result.view(heads, tokens, -1).transpose(0, 1)
    return attended.unsqueeze(0), None


def _known(mask: object, others: dict[str, Any]) -> MaskRule:
    """The rule of a layer's mask; raises UnsupportedModelError for what attention by sequence would get wrong."""
    unknown = [name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT]
    if unknown:
        raise UnsupportedModelError(f"their attention takes {unknown[0]!r}, which attention by sequence does not know")
    if mask is not None and not isinstance(mask, MaskRule):
        raise UnsupportedModelError("they make the mask of their attention themselves")
    rule = CAUSAL if mask is None else mask
    if others.get("is_causal") is False or rule.looks_ahead:
        raise UnsupportedModelError("their attention looks ahead to tokens of later passes")
    return rule


def _by_hand(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention whose scores are bent by softcap * tanh(score / softcap), or share their sum with a sink's."""
    scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)], -1)
    shares = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return shares[..., : keys.shape[-2]] @ values


AttentionInterface.register(ATTENTION, ragged_attention)
AttentionMaskInterface.register(ATTENTION, ragged_mask)


class RotaryBySequence(torch.nn.Module):
    """A rotary embedding whose frequencies follow the longest sequence of a pass, asked for each sequence by itself."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Tables of positions, as `inner` gives them."""
        tables = []
        for part in _layout.get().parts:
            own = position_ids[:, part.first_row : part.last_row]
            self.inner(x, own.new_zeros((1, 1)), *args, **kwargs)  # forgets how long sequences were before
            last = own.new_full((1, 1), part.whole - 1)
            found = self.inner(x, torch.cat([own, last], -1), *args, **kwargs)
            tables.append([found[:, :-1]] if isinstance(found, torch.Tensor) else [table[:, :-1] for table in found])
        joined = tuple(torch.cat(each, 1) for each in zip(*tables, strict=True))
        return joined if len(joined) > 1 else joined[0]


def separate_rotary(model: torch.nn.Module) -> None:
    """Ask embeddings whose frequencies depend on how long a sequence is for each sequence by itself."""
    for path, module in list(model.named_modules()):
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(kind in ROPE_BY_LENGTH for kind in kinds):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, RotaryBySequence(module))


class RaggedRunner:
    """Runs packed passes on a loaded model, with a pool of `positions` for keys and values taken for good."""

    def __init__(self, model: Any, *, positions: int) -> None:
        require_ragged(model)
        separate_rotary(model)
        self._model = model
        self._cache = RaggedCache(positions=positions)
        self._cache_argument = cache_argument(model)
        self._bends_scores = bends_scores(model)
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
        layout = _Layout(self._cache, parts, bends_scores=self._bends_scores)
        with _in_layout(layout), torch.inference_mode():
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
        parts.append(_Part(row, row + turn.tokens, turn.start, end, max(turn.whole, end)))
        places.extend(range(turn.start + turn.first, turn.start + end))
        row += turn.tokens
    return parts, torch.tensor(places)


def attend_alone(
    module: torch.nn.Module, cache: RaggedCache, turns: Sequence[Turn], query: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    """Write keys and values and attend, as a layer does, outside of a model: to be timed."""
    parts, places = _laid_out(turns)
    cache.place(places)
    kept = cache.update(states, states, 0)
    with _in_layout(_Layout(cache, parts)):
        return ragged_attention(module, query, *kept, CAUSAL)[0]


def require_ragged(model: Any) -> None:
    """Raise UnsupportedModelError for a model whose attention cannot be exchanged."""
    if not exchanges_attention(model) or model.config.model_type in _OWN_POSITIONS:
        raise UnsupportedModelError(
            f"the attention of {model.config.model_type} models does not go through the register of attention functions"
        )


@contextmanager
def _in_layout(layout: _Layout) -> Iterator[None]:
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)
