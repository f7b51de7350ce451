"""Sequences in groups get the logits that `generate` gives them alone, where tokens cannot be laid end to end."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import headrace
from headrace.inference.batching.packable import continues_prompts
from headrace.inference.batching.rectangular_pass import RectangularRunner
from headrace.planning.jobs.groups import GroupScheduler
from headrace.planning.jobs.packing import Need
from model_types import save_type

pytestmark = pytest.mark.usefixtures("made_up_speeds")

LENGTHS = (5, 5, 7, 9, 9, 14)
NEW = (6, 2, 5, 1, 4, 6)
PROMPTS: dict[Hashable, list[int]] = {
    number: [3 + (number + 7 * place) % 240 for place in range(length)] for number, length in enumerate(LENGTHS)
}
NEEDS: dict[Hashable, Need] = {
    number: Need(length, new) for number, (length, new) in enumerate(zip(LENGTHS, NEW, strict=True))
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 12,
    "short_factor": [1.0 + 0.1 * place for place in range(8)],
    "long_factor": [2.0 + 1.5 * place for place in range(8)],
}
OWN: dict[str, Any] = {
    "phi3": {"original_max_position_embeddings": 12, "rope_parameters": LONGROPE, "pad_token_id": 0},
    "gemma3_text": {"use_bidirectional_attention": True},
}
IN_ONE_LENGTH = set(OWN)


def alone(model: Any, key: Hashable) -> list[torch.Tensor]:
    """Logits of each token that `generate` gives a sequence by itself."""
    ids = torch.tensor([PROMPTS[key]])
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEEDS[key].new_tokens, **options)
    return [logits[0] for logits in found.logits]


@pytest.mark.parametrize("kind", ["mamba", "jamba", "bloom", "mpt", "openai-gpt", *OWN])
def test_groups_get_what_each_sequence_gets_alone(kind: str, tmp_path: Path) -> None:
    resident = save_type(kind, tmp_path, **OWN.get(kind, {}))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert continues_prompts(read) == (kind not in IN_ONE_LENGTH)
    expected = {key: alone(resident, key) for key in NEEDS}
    found: dict[Hashable, list[torch.Tensor]] = {key: [] for key in NEEDS}
    tokens = {key: list(prompt) for key, prompt in PROMPTS.items()}
    scheduler = GroupScheduler(most_sequences=4, pass_tokens=64, equal_prompts=kind in IN_ONE_LENGTH)
    for key, need in NEEDS.items():
        scheduler.add(key, need)
    with headrace.load(tmp_path, memory="256MiB", dtype="float32", strategy="overlap", batch=4, max_tokens=32) as model:
        runner = RectangularRunner(model, NEEDS)
        while (packed := scheduler.pack()) is not None:
            own = [tokens[turn.key][turn.first : turn.first + turn.tokens] for turn in packed.turns]
            rows = runner.run(packed.copies, packed.turns, own)
            for turn, row in zip([turn for turn in packed.turns if turn.samples], rows, strict=True):
                found[turn.key].append(row.clone())
                tokens[turn.key].append(int(row.argmax()))
            scheduler.advance()
    for key, own_logits in expected.items():
        for mine, theirs in zip(found[key], own_logits, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5), key
