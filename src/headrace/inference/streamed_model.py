"""What a streamed model has beyond the transformers class it is: its handle, admission of requests, and an end."""

from __future__ import annotations

from typing import Any, Self

import torch

from headrace.errors import InvalidRequestError
from headrace.inference.drafting import AdaptiveCandidates


class StreamedModel:
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

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' candidate generator; its length follows what pays where the model was loaded for drafts."""
        inner = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        length = self.headrace.draft_length
        return inner if length is None else AdaptiveCandidates(inner, length, self.headrace)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Admit or refuse the request, then give it a cache that stays inside the budget.

        transformers calls this before the first pass. Raises BudgetError with the numbers.
        """
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        given = model_kwargs.get("past_key_values")
        self.headrace.admit(sequences=batch_size * copies, context_tokens=max_cache_length)
        plain = generation_config.cache_implementation in (None, "dynamic")
        if given is None and plain and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.headrace.build_cache(
                self.config,  # type: ignore[attr-defined]
                capacity_tokens=max_cache_length,
            )
            return
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
