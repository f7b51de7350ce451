"""The next token of one sequence: greedy or drawn, with penalties and log-probabilities.

Every sequence has a generator of its own, so what it draws does not depend on who shares its passes. A draw is a
number between 0 and 1 looked up in the cumulated probabilities in the order of token ids: logits that differ in their
last bits (other passes round products otherwise) then give another token only where the number falls on an edge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from headrace.errors import HeadraceError


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen. Greedy where `temperature` is 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """how many of the likeliest tokens are listed at each place; None: no log-probabilities"""
    min_tokens: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is all there is to it."""
        return (
            self.temperature == 0
            and not self.presence_penalty
            and not self.frequency_penalty
            and not self.logit_bias
            and self.logprobs is None
            and self.min_tokens == 0
        )


class Chosen(NamedTuple):
    """A token, its log-probability under the model (None where not asked for), and the likeliest with theirs."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class NotFiniteError(HeadraceError):
    """The model gave logits that are no numbers."""


@dataclass
class Sampler:
    """Chooses the tokens of one sequence, one after the other."""

    decoding: Decoding
    seed: int
    ends: frozenset[int]
    """tokens that end the text; not chosen before `min_tokens` are there"""
    _counts: Counter[int] = field(default_factory=Counter)
    _chosen: int = 0

    def __post_init__(self) -> None:
        decoding = self.decoding
        self._generator = torch.Generator().manual_seed(self.seed)
        self._warpers = LogitsProcessorList()
        if decoding.temperature > 0:
            if decoding.temperature != 1:
                self._warpers.append(TemperatureLogitsWarper(decoding.temperature))
            if decoding.top_k is not None:
                self._warpers.append(TopKLogitsWarper(decoding.top_k))
            if decoding.top_p < 1:
                self._warpers.append(TopPLogitsWarper(decoding.top_p))

    def choose(self, logits: torch.Tensor) -> Chosen:
        """Choose from logits of shape (vocabulary,); raises NotFiniteError where they are no numbers."""
        scores = self._adjusted(logits)
        if self.decoding.temperature == 0:
            token = int(scores.argmax())
        else:
            probabilities = self._warpers(None, scores.unsqueeze(0))[0].double().softmax(-1)
            edges = probabilities.cumsum(-1)
            drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * edges[-1]
            token = min(int(torch.searchsorted(edges, drawn, right=True)), int(probabilities.nonzero()[-1]))
        if not torch.isfinite(scores[token]):
            raise NotFiniteError("the model's logits are not finite numbers")
        self._counts[token] += 1
        self._chosen += 1
        if self.decoding.logprobs is None:
            return Chosen(token)
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(min(self.decoding.logprobs, len(logprobs))) if self.decoding.logprobs else None
        likeliest = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Chosen(token, float(logprobs[token]), likeliest)

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        decoding = self.decoding
        scores = logits.float()
        if scores is logits:
            scores = logits.clone()
        if self._counts and (decoding.presence_penalty or decoding.frequency_penalty):
            tokens = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            scores[tokens] -= decoding.presence_penalty + decoding.frequency_penalty * counts
        for token, bias in decoding.logit_bias:
            scores[token] += bias
        if self._chosen < decoding.min_tokens:
            scores[[token for token in self.ends if token < len(scores)]] = -torch.inf
        return scores


def sample_all(choosers: Sequence[Sampler], logits: torch.Tensor) -> list[Chosen | NotFiniteError]:
    """Choose for every row of logits, shape (sequences, vocabulary); the plain ones all at once."""
    if not len(choosers):
        return []
    values, tokens = logits.max(-1)
    finite = torch.isfinite(values.float()).tolist()
    chosen: list[Chosen | NotFiniteError] = []
    for row, (chooser, token) in enumerate(zip(choosers, tokens.tolist(), strict=True)):
        if not finite[row]:
            chosen.append(NotFiniteError("the model's logits are not finite numbers"))
        elif chooser.decoding.is_plain:
            chosen.append(Chosen(token))
        else:
            try:
                chosen.append(chooser.choose(logits[row]))
            except NotFiniteError as error:
                chosen.append(error)
    return chosen
