"""Compiled layers compute the same, with weights that come and go, and are compiled once for all layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import headrace
from accelerator_machine import make_up
from headrace.errors import InvalidRequestError
from headrace.inference import compiling
from headrace.streaming.fakes.accelerator import FakeAccelerator
from tiny_models import resident_reference, save_tiny

IDS = torch.arange(3, 14)[None]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace as torch.compile does, and run what was traced as it is: quick, and exact."""
    make_up(monkeypatch)
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("strategy", ["overlap", "resident"])
def test_compiled_layers_compute_the_same(tmp_path: Path, name: str, strategy: str) -> None:
    directory = save_tiny(name, tmp_path / "m")
    reference = resident_reference(directory, torch.bfloat16)
    with headrace.load(
        directory,
        device=FakeAccelerator(),
        memory=1 << 30,
        host_memory=1 << 30,
        strategy=strategy,
        max_tokens=32,
        compile_layers=True,
        poison=True,
    ) as model:
        with torch.inference_mode():
            for ids in (IDS, IDS.repeat(2, 1), IDS):
                assert torch.equal(model(ids).logits, reference(ids).logits)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(IDS, **options), reference.generate(IDS, **options))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 8, "one for each kind of module and shape, not for each layer"


def test_weights_that_are_converted_cannot_be_compiled(tmp_path: Path) -> None:
    directory = save_tiny("llama", tmp_path / "m")
    with pytest.raises(InvalidRequestError, match=r"--compile needs weights .*give --dtype bfloat16"):
        headrace.load(directory, memory=1 << 30, dtype="float32", max_tokens=32, compile_layers=True)
