"""What may be asked of a model, and what is refused with the numbers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from headrace.dtypes import STORED_BYTES
from headrace.errors import InvalidRequestError, MachineError
from headrace.inference.load_options import LoadKeywords, LoadOptions, Options
from headrace.inference.plan_api import PlanKeywords
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.model.safetensors_index import ShardFile, TensorEntry, TensorIndex
from headrace.model.stored_model import StoredModel, build_stored_model
from headrace.planning.budgets import reserve_bytes
from headrace.planning.scenarios import PlanRequest, compute_dtypes, work_seconds
from headrace.planning.strategies import Strategy
from headrace.planning.workload import Workload
from headrace.streaming import device_budget
from headrace.streaming.device import CpuDevice
from headrace.streaming.fakes.accelerator import FakeAccelerator


def small_model(*, context_tokens: int, dtype: str = "BF16") -> StoredModel:
    """One layer of one matrix, and a head."""
    shapes = {
        "model.embed_tokens.weight": (8, 4),
        "model.layers.0.mlp.up_proj.weight": (8, 4),
        "lm_head.weight": (8, 4),
    }
    entries = {
        name: TensorEntry(name, dtype, shape, 0, 128 * number, STORED_BYTES[dtype] * math.prod(shape))
        for number, (name, shape) in enumerate(shapes.items())
    }
    raw = {
        "model_type": "llama",
        "hidden_size": 4,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
        "max_position_embeddings": context_tokens,
    }
    files = (ShardFile(Path("model/0"), 4096, 0, 0, 0),)
    index = TensorIndex(directory=Path("model"), files=files, entries=MappingProxyType(entries))
    return build_stored_model("small", raw, index)


def made(model: StoredModel, **changes: Any) -> Options:
    return LoadOptions(**({"memory": 12345} | changes)).checked(model, CpuDevice())


def test_defaults() -> None:
    model = small_model(context_tokens=4096)
    options = made(model)
    assert options == Options(
        asked=LoadOptions(memory=12345),
        workload=Workload(sequences=1, prompt_tokens=512, generate_tokens=512),
        budget_bytes=12345,
        host_budget_bytes=0,
        strategy=None,
        dtype=None,
        read_limit_bytes_per_s=None,
    )
    assert made(small_model(context_tokens=100)).workload == Workload(
        sequences=1, prompt_tokens=50, generate_tokens=50
    ), "no longer than the model's own context"


def test_texts_become_numbers() -> None:
    asked = LoadOptions(
        memory="3MiB",
        strategy="overlap",
        dtype="float32",
        batch=3,
        prompt_tokens=5,
        max_tokens=7,
        read_limit="20MB/s",
    )
    assert asked.checked(small_model(context_tokens=64), CpuDevice()) == Options(
        asked=asked,
        budget_bytes=3 << 20,
        host_budget_bytes=0,
        workload=Workload(sequences=3, prompt_tokens=5, generate_tokens=2),
        strategy=Strategy.OVERLAP,
        dtype="float32",
        read_limit_bytes_per_s=20e6,
    )
    assert made(small_model(context_tokens=64), memory=77).budget_bytes == 77


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy": "magic"}, "cannot run with strategy 'magic'; choose auto, resident, sequential, overlap"),
        ({"dtype": "int8"}, "unsupported dtype 'int8'"),
        ({"max_tokens": 65}, "max_tokens 65 is out of range: .* takes 2 to 64, prompt"),
        ({"max_tokens": 1}, "max_tokens 1 is out of range"),
        ({"prompt_tokens": 9, "max_tokens": 9}, "a prompt of 9 tokens leaves nothing of 9"),
        ({"prompt_tokens": 0}, "a prompt of 0 tokens"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"draft_tokens": 65}, "draft tokens must lie between 0 and 64"),
        ({"draft_tokens": 1, "batch": 2}, "drafts work with one sequence"),
        ({"memory": "banana"}, "'banana' is not a size"),
        ({"read_limit": 0.0}, "read limit must be positive"),
        ({"read_limit": float("inf")}, "read limit must be positive"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        made(small_model(context_tokens=64), **changes)


def test_the_edges_are_allowed() -> None:
    model = small_model(context_tokens=64)
    assert made(model, max_tokens=64, prompt_tokens=63).workload.generate_tokens == 1
    assert made(model, max_tokens=2).workload.prompt_tokens == 1


def test_without_a_budget_it_is_what_is_free_less_a_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_budget, "default_budget_bytes", lambda: 777)
    monkeypatch.setattr(device_budget, "free_bytes", lambda: 20 << 30)
    model = small_model(context_tokens=64)
    assert LoadOptions().checked(model, CpuDevice())[2:4] == (777, 0)
    accelerator = FakeAccelerator(memory_bytes=20 << 30)
    assert LoadOptions().checked(model, accelerator)[2:4] == (19 << 30, 18 << 30)
    given = LoadOptions(memory="1GiB", host_memory=5 << 20).checked(model, accelerator)
    assert (given.budget_bytes, given.host_budget_bytes) == (1 << 30, 5 << 20)


@pytest.mark.parametrize("changes", [{"host_memory": 1 << 30}, {"cpu_blocks": True}, {"cache_on_host": True}])
def test_the_cpu_alone_refuses_options_of_an_accelerator(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"is for an accelerator .*--memory bounds"):
        made(small_model(context_tokens=64), **changes)


@pytest.mark.parametrize(("keywords", "options"), [(LoadKeywords, LoadOptions), (PlanKeywords, PlanRequest)])
def test_keywords_of_functions_are_the_options(keywords: Any, options: Any) -> None:
    assert list(keywords.__annotations__) == [field.name for field in dataclasses.fields(options)]


def test_drafts_that_cannot_be_are_refused_in_plans() -> None:
    with pytest.raises(InvalidRequestError, match="give --draft-tokens as well"):
        PlanRequest(acceptance=0.5)


def test_what_is_left_alone() -> None:
    assert reserve_bytes(0) == 160 << 20
    assert reserve_bytes(100 << 30) == 5 << 30


def test_dtypes_to_compare() -> None:
    model = small_model(context_tokens=64)
    assert compute_dtypes(model, None) == ("bfloat16", "float32")
    assert compute_dtypes(model, "float16") == ("float16",)
    assert compute_dtypes(small_model(context_tokens=64, dtype="F32"), None) == ("float32",)
    with pytest.raises(MachineError, match="stored as I8"):
        compute_dtypes(small_model(context_tokens=64, dtype="I8"), "float32")


def test_the_seconds_of_work() -> None:
    curve = ComputeCurve(
        compute_dtype="float32",
        stored_dtype="F32",
        points=(CurvePoint(1, 1.0), CurvePoint(2, 3.0), CurvePoint(10, 7.0)),
    )
    assert work_seconds(curve, Workload(sequences=2, prompt_tokens=5, generate_tokens=4)) == 7.0 + 3 * 3.0
