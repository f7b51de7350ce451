"""Streamed logits equal transformers' resident logits bit for bit: every architecture, dtype, budget, batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import headrace
from headrace.errors import BudgetError
from headrace.inference.transformers_seam import cache_argument, cache_in
from tiny_models import CONFIGS, resident_reference, save_tiny

pytestmark = pytest.mark.usefixtures("made_up_speeds")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save_tiny(name, root / name) for name in CONFIGS}


def passes(model: Any, batch: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits of a prefill (left-padded from the second sequence on), three decode passes and a chunk of two."""
    torch.manual_seed(3)
    ids = torch.randint(3, 320, (batch, 11))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, : 2 * row] = 0
        mask[row, : 2 * row] = 0
    ids, mask = ids.to(model.device), mask.to(model.device)
    collected = []
    with torch.inference_mode():
        cache = None
        cache_name = cache_argument(model)
        step = ids
        for new in (1, 1, 1, 2, 0):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
            extra = {} if model.config.model_type in {"opt", "gpt_neox"} else {"position_ids": positions}
            out = model(input_ids=step, attention_mask=mask, use_cache=True, **extra, **{cache_name: cache})
            collected.append(out.logits)
            cache = cache_in(out)
            if not new:
                break
            step = out.logits[:, -1:].argmax(-1).repeat(1, new)
            mask = torch.cat([mask, mask.new_ones(batch, new)], dim=-1)
    assert collected[0].dtype is dtype
    return collected


def smallest_budget(directory: Path, dtype: str, strategy: str) -> int:
    with pytest.raises(BudgetError) as refused:
        headrace.load(
            directory, memory=1 << 20, dtype=dtype, strategy=strategy, batch=3, prompt_tokens=12, max_tokens=24
        )
    assert refused.value.required_bytes is not None
    return refused.value.required_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.versions)])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_streamed_logits_equal_resident_logits(checkpoints: dict[str, Path], name: str, dtype: str) -> None:
    directory = checkpoints[name]
    reference = resident_reference(directory, DTYPES[dtype])
    expected = {batch: passes(reference, batch, DTYPES[dtype]) for batch in (1, 3)}
    floor = smallest_budget(directory, dtype, "overlap")
    sequential_floor = smallest_budget(directory, dtype, "sequential")
    all_resident = smallest_budget(directory, dtype, "resident")
    budgets = [("auto", sequential_floor), ("overlap", floor), ("overlap", (floor + all_resident) // 2)]
    seen = set()
    for strategy, budget in [*budgets, ("auto", all_resident), ("auto", all_resident + (1 << 20))]:
        with headrace.load(
            directory,
            memory=budget,
            dtype=dtype,
            strategy=strategy,
            batch=3,
            prompt_tokens=12,
            max_tokens=24,
            poison=True,
        ) as model:
            seen.add((model.headrace.plan.strategy.value, model.headrace.plan.resident_blocks))
            for batch, logits in expected.items():
                for step, (wanted, got) in enumerate(zip(logits, passes(model, batch, DTYPES[dtype]), strict=True)):
                    assert torch.equal(wanted, got), (strategy, budget, batch, step)
    assert len(seen) >= 3, seen  # nothing resident, some, all


@pytest.mark.parametrize("strategy", ["overlap", "resident"])
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.versions), "gpt2", "mistral"])
def test_generate_behaves_as_on_a_resident_model(checkpoints: dict[str, Path], name: str, strategy: str) -> None:
    directory = checkpoints[name]
    reference = resident_reference(directory, torch.float32)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = (ids != 0).long()
    ways: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "repetition_penalty": 1.3},
    ]
    floor = smallest_budget(directory, "float32", strategy)
    for way in ways:
        inputs, attention = (ids[:1, 2:], mask[:1, 2:]) if "prompt_lookup_num_tokens" in way else (ids, mask)
        outputs = []
        for model in (
            reference,
            headrace.load(
                directory,
                memory=floor + (4 << 20),
                dtype="float32",
                strategy=strategy,
                batch=6,
                prompt_tokens=8,
                max_tokens=24,
            ),
        ):
            torch.manual_seed(11)
            outputs.append(
                model.generate(inputs, attention_mask=attention, max_new_tokens=10, min_new_tokens=10, **way)
            )
        model.close()
        assert torch.equal(outputs[0], outputs[1]), way


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("vocab_size", [20_480, 20_000, 20_001])
def test_a_head_in_pieces(tmp_path: Path, dtype: str, vocab_size: int) -> None:
    directory = save_tiny("llama", tmp_path / "wide", vocab_size=vocab_size, shard="1GB", num_hidden_layers=2)
    reference = resident_reference(directory, getattr(torch, dtype))
    options: dict[str, Any] = {"dtype": dtype, "batch": 3, "prompt_tokens": 40, "max_tokens": 60}
    with torch.inference_mode(), headrace.load(directory, memory="64MB", strategy="overlap", **options) as model:
        pieces = sum(block.head_rows is not None for block in model.headrace.checkpoint.model.blocks)
        assert pieces == (1 if vocab_size % 8 else 3)
        for batch, tokens in ((1, 1), (1, 9), (1, 33), (3, 1), (3, 4), (3, 11)):
            ids = torch.arange(batch * tokens).view(batch, tokens)
            for keep in (1, 2, 0):
                wanted = reference(input_ids=ids, logits_to_keep=keep).logits
                assert torch.equal(wanted, model(input_ids=ids, logits_to_keep=keep).logits), (batch, tokens, keep)
