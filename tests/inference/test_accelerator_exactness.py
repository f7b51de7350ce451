"""A model on an accelerator equals transformers' resident one bit for bit: architectures, places, dtypes, budgets.

The accelerator is made of host memory and computes with torch's own kernels on the processor, so its sums are the
processor's; what is proven here is that every block computes with the right bytes at aligned places, whatever came
before it. Its queues move only when somebody waits, so a wait that is missing shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import headrace
from accelerator_machine import make_up
from headrace.errors import BudgetError
from headrace.planning.plan import EmbeddingPlacement, Placement
from headrace.streaming.fakes.accelerator import Drive, FakeAccelerator
from inference.test_exactness import DTYPES, passes
from tiny_models import CONFIGS, resident_reference, save_tiny

OPTIONS: dict[str, Any] = {"batch": 3, "prompt_tokens": 12, "max_tokens": 24}
PLENTY = 1 << 30


@pytest.fixture(autouse=True)
def _made_up_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    saved = {name: save_tiny(name, root / name) for name in CONFIGS}
    many = save_tiny("gemma3", root / "many", num_hidden_layers=12, sliding_window_pattern=2)
    return {**saved, "gemma3-many": many}


@contextmanager
def on_accelerator(directory: Path, device: FakeAccelerator, **options: Any) -> Iterator[Any]:
    """Load, and see that nothing is left on the device."""
    with headrace.load(directory, device=device, **{**OPTIONS, **options}) as model:
        yield model
    assert device.held_bytes() == 0
    assert device.violations == []


def smallest(directory: Path, **options: Any) -> int:
    """The least device memory with which this loads."""
    with pytest.raises(BudgetError) as refused:
        headrace.load(directory, device=FakeAccelerator(), memory=1 << 20, **{**OPTIONS, **options})
    assert refused.value.required_bytes is not None
    return refused.value.required_bytes


def ring_and(share: float, directory: Path) -> int:
    """A host budget of the ring and a share of the weights."""
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return (64 << 20) + int(share * weights)


CASES = [(name, "bfloat16") for name in sorted(CONFIGS)]
CASES += [(name, "float32") for name in ("falcon-alibi", "gemma2", "gpt2", "llama-bias", "mixtral")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_logits_equal_resident_logits(checkpoints: dict[str, Path], name: str, dtype: str) -> None:
    directory = checkpoints[name]
    reference = resident_reference(directory, DTYPES[dtype])
    expected = {batch: passes(reference, batch, DTYPES[dtype]) for batch in (1, 3)}
    least = {strategy: smallest(directory, dtype=dtype, strategy=strategy) for strategy in ("sequential", "resident")}
    half = (least["sequential"] + least["resident"]) // 2
    plenty = ring_and(3.0, directory)
    seen = set()
    for strategy, memory, host_memory, drive in (
        ("sequential", least["sequential"], plenty, Drive.LAZY),
        ("auto", half, plenty, Drive.LAZY),
        ("overlap", half, ring_and(0.3, directory), Drive.COPIES_FIRST),
        ("overlap", half, 64 << 20, Drive.RANDOM),
        ("auto", least["resident"] + (1 << 20), plenty, Drive.LAZY),
    ):
        device = FakeAccelerator(drive=drive)
        with on_accelerator(
            directory, device, memory=memory, host_memory=host_memory, strategy=strategy, dtype=dtype, poison=True
        ) as model:
            seen.add(model.headrace.plan.placements)
            for batch, logits in expected.items():
                for step, (wanted, got) in enumerate(zip(logits, passes(model, batch, DTYPES[dtype]), strict=True)):
                    assert torch.equal(wanted, got), (strategy, memory, host_memory, batch, step)
    found = {place for places in seen for place in places}
    assert {Placement.DEVICE, Placement.HOST, Placement.DISK} <= found, seen


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral", "falcon-alibi", "gpt_neox", "opt"])
def test_layers_of_the_processor_fit_in(checkpoints: dict[str, Path], name: str) -> None:
    directory = checkpoints[name]
    reference = resident_reference(directory, torch.float32)
    least = smallest(directory, dtype="float32")
    device = FakeAccelerator(drive=Drive.LAZY)
    options: dict[str, Any] = {"memory": least + 4096, "host_memory": PLENTY, "dtype": "float32"}
    with on_accelerator(directory, device, cpu_blocks=True, poison=True, **options) as model:
        assert model.headrace.plan.cpu_blocks > 0, "the made-up processor is faster than the made-up link"
        for batch in (1, 3):
            for wanted, got in zip(
                passes(reference, batch, torch.float32), passes(model, batch, torch.float32), strict=True
            ):
                assert torch.equal(wanted, got)
    with on_accelerator(directory, FakeAccelerator(), **options) as model:
        assert model.headrace.plan.cpu_blocks == 0, "not without being asked, since rounding may differ"


SPREAD_RULES: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.8, "top_k": 20},
    {"num_beams": 3, "do_sample": False},
    {"do_sample": True, "num_return_sequences": 2},
    {"do_sample": False, "prompt_lookup_num_tokens": 3},
    {"do_sample": False, "use_cache": False},
]


@pytest.mark.parametrize(
    ("name", "cache_on_host"),
    [
        *(("llama", False), ("gemma3", False), ("mistral", False), ("llama", True)),
        pytest.param("gemma3-many", True, marks=pytest.mark.versions),
    ],
)
def test_generate_behaves_as_on_a_resident_model(checkpoints: dict[str, Path], name: str, cache_on_host: bool) -> None:
    directory = checkpoints[name]
    reference = resident_reference(directory, torch.float32)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = (ids != 0).long()
    options: dict[str, Any] = {"dtype": "float32", "batch": 6, "prompt_tokens": 8, "host_memory": PLENTY}
    least = smallest(directory, cache_on_host=cache_on_host, **options)
    device = FakeAccelerator(drive=Drive.LAZY)
    with on_accelerator(directory, device, memory=least + 20_000, cache_on_host=cache_on_host, **options) as model:
        assert model.headrace.plan.cache_on_host is cache_on_host
        for way in SPREAD_RULES:
            inputs, attention = (ids[:1, 2:], mask[:1, 2:]) if "prompt_lookup_num_tokens" in way else (ids, mask)
            outputs = []
            for own in (reference, model):
                torch.manual_seed(11)
                outputs.append(
                    own.generate(inputs, attention_mask=attention, max_new_tokens=10, min_new_tokens=10, **way)
                )
            assert torch.equal(outputs[0], outputs[1]), way
    assert device.violations == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("vocab_size", [20_480, 20_001])
def test_a_head_is_one_block_and_one_product(tmp_path: Path, dtype: str, vocab_size: int) -> None:
    directory = save_tiny("llama", tmp_path / "wide", vocab_size=vocab_size, shard="1GB", num_hidden_layers=2)
    reference = resident_reference(directory, getattr(torch, dtype))
    options = {"dtype": dtype, "memory": PLENTY, "host_memory": PLENTY, "strategy": "overlap", "max_tokens": 60}
    with torch.inference_mode(), on_accelerator(directory, FakeAccelerator(), prompt_tokens=40, **options) as model:
        assert sum(block.head_rows is not None for block in model.headrace.checkpoint.model.blocks) == 1
        for batch, tokens in ((1, 1), (1, 33), (3, 1), (3, 11)):
            ids = torch.arange(batch * tokens).view(batch, tokens)
            for keep in (1, 2, 0):
                wanted = reference(input_ids=ids, logits_to_keep=keep).logits
                assert torch.equal(wanted, model(input_ids=ids, logits_to_keep=keep).logits), (batch, tokens, keep)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma"])
def test_the_embedding_is_taken_from_wherever_the_plan_keeps_it(checkpoints: dict[str, Path], name: str) -> None:
    directory = checkpoints[name]
    reference = resident_reference(directory, torch.bfloat16)
    expected = passes(reference, 3, torch.bfloat16)
    resident = smallest(directory, strategy="resident")
    seen = set()
    for memory, host_memory, strategy in (
        (resident + (1 << 20), PLENTY, "resident"),
        (smallest(directory, strategy="sequential"), PLENTY, "sequential"),
        (smallest(directory, strategy="sequential"), 64 << 20, "sequential"),
    ):
        with on_accelerator(
            directory, FakeAccelerator(), memory=memory, host_memory=host_memory, strategy=strategy
        ) as model:
            seen.add(model.headrace.plan.embedding)
            for wanted, got in zip(expected, passes(model, 3, torch.bfloat16), strict=True):
                assert torch.equal(wanted, got)
    first = EmbeddingPlacement.HEAD if name in ("llama-tied", "gemma") else EmbeddingPlacement.RESIDENT
    assert seen == {first, EmbeddingPlacement.HOST, EmbeddingPlacement.ROWS}
