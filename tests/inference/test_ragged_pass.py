"""Sequences that share passes get the logits that they get alone: every architecture, chunks, windows, prefixes."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch

import headrace
from headrace.errors import UnsupportedModelError
from headrace.inference.batching.ragged_pass import RaggedRunner
from headrace.planning.jobs.packing import Need, PassScheduler, PositionPool
from tiny_models import CONFIGS, resident_reference, save_tiny

pytestmark = pytest.mark.usefixtures("made_up_speeds")

SUPPORTED = sorted(name for name in CONFIGS if not name.startswith("falcon"))
LENGTHS = (1, 9, 23, 4, 17)
NEW = (6, 3, 5, 1, 8)


def alone(model: Any, prompt: list[int], new: int) -> list[torch.Tensor]:
    """Logits at each sampled position of greedy decoding, whole sequences without a cache."""
    tokens, logits = list(prompt), []
    for _ in range(new):
        with torch.inference_mode():
            row = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        logits.append(row)
        tokens.append(int(row.argmax()))
    return logits


def together(
    runner: RaggedRunner, scheduler: PassScheduler, prompts: dict[Hashable, list[int]], needs: dict[Hashable, Need]
) -> dict[Hashable, list[torch.Tensor]]:
    logits: dict[Hashable, list[torch.Tensor]] = {key: [] for key in needs}
    tokens = {key: list(prompt) for key, prompt in prompts.items()}
    for key, need in needs.items():
        scheduler.add(key, need)
    while (packed := scheduler.pack()) is not None:
        own = [tokens[turn.key][turn.first : turn.first + turn.tokens] for turn in packed.turns]
        rows = runner.run(packed.copies, packed.turns, own)
        for turn, row in zip([turn for turn in packed.turns if turn.samples], rows, strict=True):
            logits[turn.key].append(row.clone())
            tokens[turn.key].append(int(row.argmax()))
        scheduler.advance()
    return logits


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ragged")
    return {name: save_tiny(name, root / name) for name in CONFIGS}


@pytest.mark.parametrize("shared", [0, 8], ids=["apart", "common-beginning"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_logits_do_not_depend_on_who_shares_the_pass(name: str, shared: int, checkpoints: dict[str, Path]) -> None:
    generator = torch.Generator().manual_seed(5)
    system = torch.randint(3, 320, (shared,), generator=generator).tolist()
    prompts: dict[Hashable, list[int]] = {}
    needs: dict[Hashable, Need] = {}
    for number, (length, new) in enumerate(zip(LENGTHS, NEW, strict=True)):
        prompts[number] = system + torch.randint(3, 320, (length,), generator=generator).tolist()
        needs[number] = Need(len(prompts[number]), new, "system" if shared else None, shared)
    reference = resident_reference(checkpoints[name], torch.float32)
    with headrace.load(
        checkpoints[name], memory="48MiB", dtype="float32", strategy="overlap", batch=1, max_tokens=48
    ) as model:
        runner = RaggedRunner(model, positions=150)
        scheduler = PassScheduler(
            most_sequences=3,
            pass_tokens=7,
            pool=PositionPool(150),
            prefixes={"system": Need(shared, 0)} if shared else {},
        )
        prompts["system"] = system
        found = together(runner, scheduler, prompts, needs)
    for key, need in needs.items():
        expected = alone(reference, prompts[key], need.new_tokens)
        assert len(found[key]) == need.new_tokens
        for step, (mine, theirs) in enumerate(zip(found[key], expected, strict=True)):
            assert torch.allclose(mine, theirs, rtol=2e-4, atol=2e-4), f"{key}, token {step}"


@pytest.mark.parametrize("name", ["falcon", "falcon-alibi"])
def test_attention_that_cannot_be_exchanged_is_refused(name: str, checkpoints: dict[str, Path]) -> None:
    with (
        headrace.load(checkpoints[name], memory="64MiB", dtype="float32", max_tokens=32) as model,
        pytest.raises(UnsupportedModelError, match="falcon"),
    ):
        RaggedRunner(model, positions=10)
