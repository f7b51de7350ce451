"""Drafts for transformers' assisted generation whose length follows what pays.

Drafting and checking are transformers' own: prompt lookup, or a small model. Only the number of drafted tokens is
decided here, pass by pass, by `DraftLength`; with none the pass is a plain decode pass.
"""

from __future__ import annotations

from typing import Any

import torch

from headrace.inference.kv_cache import build_cache
from headrace.inference.transformers_seam import CandidateGenerator, draft_without_confidence, set_draft_length
from headrace.planning.jobs.draft_length import DraftLength


class AdaptiveCandidates(CandidateGenerator):  # type: ignore[misc]  # transformers is untyped
    """A candidate generator of transformers, asked for as many tokens as pay."""

    def __init__(self, inner: Any, length: DraftLength, handle: Any) -> None:
        self._inner = inner
        self._length = length
        self._handle = handle
        self._proposed = 0
        self._passes_before = len(handle.passes)
        draft_without_confidence(inner, build_cache)

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The ids with the drafted ones behind them, and the drafts' logits where there are any."""
        wanted = self._length.next_length()
        self._proposed = 0
        if not wanted:
            return input_ids, None
        set_draft_length(self._inner, wanted)
        ids, logits = self._inner.get_candidates(input_ids, **kwargs)
        self._proposed = ids.shape[1] - input_ids.shape[1]
        return ids, logits

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Learn from a pass: how many drafts were right, and how long the pass took."""
        del input_ids, scores
        passes = self._handle.passes
        # The first pass of a text is its prompt's, and tells nothing about a decode pass.
        seconds = passes[-1].end_s - passes[-2].end_s if len(passes) - self._passes_before > 2 else None
        self._length.record(self._proposed, int(num_matches), seconds)
