"""A pass over a group of sequences that are all at the same position: the model computes what `generate` would.

For models whose attention cannot be exchanged, or which keep more of a sequence than keys and values. No row is padded
and none knows of another, so this is right wherever `generate` is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from headrace.inference.transformers_seam import GenerationPasses
from headrace.planning.jobs.packing import Copy, Need, Turn


class RectangularRunner:
    """Runs the passes of a `GroupScheduler` on a loaded model. `needs` are those of all sequences."""

    def __init__(self, model: Any, needs: Mapping[Hashable, Need]) -> None:
        self._model = model
        self._needs = needs
        self._rows = 0
        self._passes: GenerationPasses | None = None

    def run(self, copies: Sequence[Copy], turns: Sequence[Turn], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Compute one pass; `tokens` holds the token ids of each turn, equally many.

        Returns the logits of the turns that sample, in their order: shape (samples, vocabulary), compute dtype.
        """
        assert not copies, "beginnings are not shared between rows"
        if not turns[0].first:
            self._passes = None  # its cache goes before the next one comes
            self._rows = len(turns)
            positions = max(self._needs[turn.key].positions for turn in turns)
            self._passes = GenerationPasses(self._model, sequences=self._rows, most_tokens=positions)
        assert self._passes is not None, "a group goes on that did not begin"
        ids = torch.zeros((self._rows, turns[0].tokens), dtype=torch.long)  # rows that are done repeat any token
        for turn, own in zip(turns, tokens, strict=True):
            ids[turn.start] = torch.tensor(own)
        with torch.inference_mode():
            logits = self._passes.run(ids)
        self._model.headrace.passes.clear()  # a long job must not grow by remembering its passes
        return logits[[turn.start for turn in turns if turn.samples]]
