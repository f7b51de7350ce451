"""What a streamed model has beyond the transformers class it is: its handle, admission of requests, and an end."""

from __future__ import annotations

from typing import Any, Self

import torch

from headrace.errors import InvalidRequestError
from headrace.inference.drafting import AdaptiveCandidates
from headrace.inference.transformers_seam import GenerationHooks


class StreamedModel(GenerationHooks):
    """Mixed into the transformers class of a loaded model. Everything else is the transformers class itself."""

    headrace: Any
    """the `Handle`: plan, prediction, timeline, counters (typed loosely, since transformers evaluates annotations)"""

    def close(self) -> None:
        """Stop reading and give all memory back; the model cannot be used afterwards."""
        self.headrace.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass. Raises BudgetError where an accelerator runs out of memory; the model stays usable."""
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        except torch.OutOfMemoryError as error:
            raise self.headrace.out_of_memory(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def save_pretrained(self, *_args: Any, **_kwargs: Any) -> None:
        """Refused: the weights are in the checkpoint, not in this object."""
        raise InvalidRequestError(
            f"a streamed model holds no weights to save; they are in {self.headrace.checkpoint.directory}, unchanged"
        )

    def admit(self, *, sequences: int, context_tokens: int) -> None:
        """Refuse a request of `generate` that does not fit with a BudgetError that has the numbers."""
        self.headrace.admit(sequences=sequences, context_tokens=context_tokens)

    def lay_out_cache(self, cache: Any, *, capacity_tokens: int) -> None:
        """Keep the cache of a request inside the budget."""
        self.headrace.lay_out_cache(cache, capacity_tokens=capacity_tokens)

    def drafts_from(self, candidates: Any) -> Any:
        """transformers' candidate generator; its length follows what pays where the model was loaded for drafts."""
        length = self.headrace.draft_length
        return candidates if length is None else AdaptiveCandidates(candidates, length, self.headrace)
