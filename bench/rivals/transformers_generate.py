"""Greedy generation through transformers with every pass timed: what the rivals built on transformers share."""

from __future__ import annotations

import torch
from measured_run import PassClock
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList


class TokenTimer(StoppingCriteria):
    """Never stops anything: generate() asks it after every pass, when that pass's tokens are known."""

    def __init__(self, clock: PassClock) -> None:
        self.clock = clock

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor | None, **kwargs: object) -> torch.Tensor:
        """Note the time; answer that no sequence is over."""
        self.clock.token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def greedy_tokens(model: GenerationMixin, clock: PassClock) -> list[list[int]]:
    """Generate as many tokens per sequence as the task says, greedily and past any end token."""
    task = clock.task
    input_ids = torch.tensor(task.prompts(), dtype=torch.long)
    # transformers lets the checkpoint's generation_config.json stop sequences early; without an end token none stops.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0  # never used, as all prompts are of one length; silences a warning
    clock.begin()
    with torch.no_grad():
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=task.generate,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            stopping_criteria=StoppingCriteriaList([TokenTimer(clock)]),
        )
    return [[int(token) for token in row[input_ids.shape[1] :]] for row in output]
