"""The next token of one sequence: greedy or drawn, with penalties and log-probabilities.

Every sequence has a generator of its own, so what it draws does not depend on who shares its passes. A draw is a
number between 0 and 1 looked up in the cumulated probabilities in the order of token ids: logits that differ in their
last bits (other passes round products otherwise) then give another token only where the number falls on an edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import LogitsProcessor

from headrace.errors import HeadraceError
from headrace.inference.generation_defaults import GenerationDefaults

NO_DEFAULTS = GenerationDefaults()
NOT_FINITE = "the model's logits are not finite numbers"


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen. Greedy where `temperature` is 0."""

    temperature: float = 0.0
    top_p: float | None = None
    """None, here and below: as the model asks"""
    top_k: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """how many of the likeliest tokens are listed at each place; None: no log-probabilities"""
    min_tokens: int = 0


class Chosen(NamedTuple):
    """A token, its log-probability under the model (None where not asked for), and the likeliest with theirs."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class NotFiniteError(HeadraceError):
    """The model gave logits that are no numbers."""


class Sampler:
    """Chooses the tokens of one sequence, one after the other.

    `ends` are the tokens that end the text, `defaults` what the model asks for; a text is `most_tokens` long at most,
    the prompt included.
    """

    def __init__(
        self,
        decoding: Decoding,
        seed: int,
        ends: frozenset[int],
        *,
        defaults: GenerationDefaults = NO_DEFAULTS,
        prompt: Sequence[int] = (),
        most_tokens: int | None = None,
    ) -> None:
        self.ends = ends
        self._logprobs = decoding.logprobs
        self._draws = decoding.temperature > 0
        self._generator = torch.Generator().manual_seed(seed)
        self._tokens = list(prompt)
        self._processors = defaults.processors(
            prompt,
            _Asked(decoding, ends, len(self._tokens)).if_any(),
            do_sample=self._draws,
            temperature=decoding.temperature or None,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            max_length=most_tokens,
        )

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is all there is to it."""
        return not self._draws and not self._processors and self._logprobs is None

    def choose(self, logits: torch.Tensor) -> Chosen:
        """Choose from logits of shape (vocabulary,); raises NotFiniteError where they are no numbers."""
        scores = logits.float()
        if self._processors:
            tokens = torch.tensor([self._tokens], dtype=torch.long)
            scores = self._processors(tokens, scores.unsqueeze(0).clone())[0]
        if self._draws:
            probabilities = scores.double().softmax(-1)
            edges = probabilities.cumsum(-1)
            drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * edges[-1]
            found = probabilities.nonzero()
            if not len(found):
                raise NotFiniteError(NOT_FINITE)
            token = min(int(torch.searchsorted(edges, drawn, right=True)), int(found[-1]))
        else:
            token = int(scores.argmax())
        if not torch.isfinite(scores[token]):
            raise NotFiniteError(NOT_FINITE)
        self._tokens.append(token)
        if self._logprobs is None:
            return Chosen(token)
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(min(self._logprobs, len(logprobs))) if self._logprobs else None
        likeliest = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Chosen(token, float(logprobs[token]), likeliest)


class _Asked(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Penalties, bias and least length that one request asks for."""

    def __init__(self, decoding: Decoding, ends: frozenset[int], prompt_tokens: int) -> None:
        self._decoding = decoding
        self._ends = ends
        self._prompt_tokens = prompt_tokens

    def if_any(self) -> list[_Asked]:
        """Itself, if it would change anything."""
        asked = self._decoding
        changes = asked.presence_penalty or asked.frequency_penalty or asked.logit_bias or asked.min_tokens
        return [self] if changes else []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Change scores of shape (1, vocabulary) in place, given all tokens so far."""
        decoding, own, row = self._decoding, input_ids[0, self._prompt_tokens :], scores[0]
        if len(own) and (decoding.presence_penalty or decoding.frequency_penalty):
            tokens, counts = torch.unique(own, return_counts=True)
            row[tokens] -= decoding.presence_penalty + decoding.frequency_penalty * counts.float()
        for token, bias in decoding.logit_bias:
            row[token] += bias
        if len(own) < decoding.min_tokens:
            row[[token for token in self._ends if token < len(row)]] = -torch.inf
        return scores


def sample_all(choosers: Sequence[Sampler], logits: torch.Tensor) -> list[Chosen | NotFiniteError]:
    """Choose for every row of logits, shape (sequences, vocabulary); the plain ones all at once."""
    if not len(choosers):
        return []
    values, tokens = logits.max(-1)
    finite = torch.isfinite(values.float()).tolist()
    chosen: list[Chosen | NotFiniteError] = []
    for row, (chooser, token) in enumerate(zip(choosers, tokens.tolist(), strict=True)):
        if chooser.is_plain:
            chosen.append(Chosen(token) if finite[row] else NotFiniteError(NOT_FINITE))
        else:
            try:
                chosen.append(chooser.choose(logits[row]))
            except NotFiniteError as error:
                chosen.append(error)
    return chosen
