"""On a real GPU: bytes, exactness, memory by the device's own counter. Skipped, and so unproven, where there is none.

Everything that a processor can prove is proven by the other tests; these need the driver.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import headrace
from headrace.errors import BudgetError, InvalidRequestError
from headrace.planning.plan import Placement
from headrace.streaming.device import CopyPart
from headrace.streaming.fakes.source import FakeSource
from headrace.streaming.stream import Stream, StreamSettings
from inference.test_exactness import passes
from streaming.test_stream_accelerator import aligned_of, expected_of, layout_of
from tiny_models import CONFIGS, resident_reference, save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here; what this would show is unproven"),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HOST = 256 << 20
EXACT = ["llama", "llama-tied", "qwen3", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "mixtral", "qwen3_moe"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save_tiny(name, root / name) for name in CONFIGS}


def least(directory: Path, **options: Any) -> int:
    with pytest.raises(BudgetError) as refused:
        headrace.load(directory, device="cuda", memory=1 << 20, host_memory=HOST, **options)
    assert refused.value.required_bytes is not None
    return refused.value.required_bytes


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_kernels_see_the_right_bytes(slots: int, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.streaming import cuda_device

    device = cuda_device.open_cuda(0)
    if not pinned:
        monkeypatch.setattr(cuda_device, "REGISTERED_MAX_BYTES", 8 * 4096)  # the ring, and no store
    places = [
        Placement.HOST,
        Placement.DISK,
        Placement.DEVICE,
        Placement.HOST,
        Placement.DISK,
        Placement.HOST,
        Placement.HOST,
    ]
    count = range(len(places))
    wanted = [
        [(at, torch.frombuffer(bytearray(content), dtype=torch.uint8).cuda()) for at, content in expected_of(block)]
        for block in count
    ]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    stream = Stream(
        layouts=[layout_of(block) for block in count],
        aligned=[aligned_of(block) for block in count],
        places=places,
        source=FakeSource(),
        device=device,
        settings=StreamSettings(
            slots=slots,
            slot_bytes=max(aligned_of(block).size_bytes for block in count),
            reader_threads=2,
            chunk_bytes=4096,
            ring_chunks=2,
            poison=True,
        ),
    )
    busy = torch.randn(2048, 2048, device="cuda")
    try:
        for _ in range(30):
            for block in count:
                piece = stream.wait(block)
                busy = busy @ busy.clamp(-1, 1).softmax(-1)  # let the device lag behind
                for at, content in wanted[block]:
                    wrong += (piece.tensor[at : at + content.numel()] != content).sum()
                stream.release(block)
        assert stream.stores_pinned is pinned
        assert wrong.item() == 0
    finally:
        stream.close()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", EXACT)
def test_streamed_logits_equal_device_resident_logits(checkpoints: dict[str, Path], name: str, dtype: str) -> None:
    directory = checkpoints[name]
    reference = resident_reference(directory, DTYPES[dtype]).to("cuda")
    expected = {batch: passes(reference, batch, DTYPES[dtype]) for batch in (1, 3)}
    options: dict[str, Any] = {"dtype": dtype, "batch": 3, "prompt_tokens": 12, "max_tokens": 24}
    floor, everything = least(directory, **options), least(directory, strategy="resident", **options)
    for memory, host_memory, strategy in (
        (floor, HOST, "auto"),
        ((floor + everything) // 2, HOST, "overlap"),
        ((floor + everything) // 2, 64 << 20, "overlap"),
        (everything + (8 << 20), HOST, "resident"),
    ):
        with headrace.load(
            directory,
            device="cuda",
            memory=memory,
            host_memory=host_memory,
            strategy=strategy,
            poison=True,
            **options,
        ) as model:
            for batch, logits in expected.items():
                for step, (wanted, got) in enumerate(zip(logits, passes(model, batch, DTYPES[dtype]), strict=True)):
                    assert torch.equal(wanted, got), (strategy, memory, host_memory, batch, step)


@pytest.mark.parametrize("cache_on_host", [False, True])
def test_generate_and_the_memory_promise(checkpoints: dict[str, Path], cache_on_host: bool) -> None:
    directory = checkpoints["llama"]
    reference = resident_reference(directory, torch.bfloat16).to("cuda")
    ids = torch.arange(4, 20, device="cuda")[None].repeat(4, 1)
    options: dict[str, Any] = {"batch": 4, "prompt_tokens": 16, "max_tokens": 64, "cache_on_host": cache_on_host}
    memory = least(directory, **options) + 65_536
    with headrace.load(directory, device="cuda", memory=memory, host_memory=HOST, **options) as model:
        how: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **how), reference.generate(ids, **how))
        measured = model.headrace.measured()
        assert measured.peak_memory_bytes - measured.process_overhead_bytes <= memory
        assert measured.bytes_copied > 0


def test_copies_go_both_ways_and_moments_are_in_order() -> None:
    from headrace.streaming.cuda_device import open_cuda

    device = open_cuda(0)
    arena = device.allocate_host(64 << 20)
    assert arena.pinned
    up, down = arena.take(32 << 20).tensor, arena.take(32 << 20).tensor
    up.random_(0, 255)
    memory = device.allocate(32 << 20)
    there = memory.take(32 << 20).tensor
    first = device.copy([CopyPart(up, there)])
    second = device.copy([CopyPart(there, down)], after=[first.end], lane=1)
    second.end.wait()
    assert torch.equal(up, down)
    assert first.begin.moment_s() <= first.end.moment_s() <= second.begin.moment_s() <= second.end.moment_s()
    arena.close()
    memory.close()


def test_budgets_that_cannot_be_kept_are_refused(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["llama"]
    with pytest.raises(BudgetError, match="are free"):
        headrace.load(directory, device="cuda", memory="100TiB", host_memory=HOST)
    with pytest.raises(InvalidRequestError, match="there is no such GPU; found: cuda:0"):
        headrace.load(directory, device="cuda:99", memory="1GiB")


def test_running_out_of_memory_is_recovered_from(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["llama"]
    ids = torch.arange(4, 12, device="cuda")[None]
    with headrace.load(directory, device="cuda", memory="512MiB", host_memory=HOST, strategy="overlap") as model:
        wanted = model(input_ids=ids).logits
        taken: list[torch.Tensor] = []

        def take_all(*_: Any) -> None:
            hook.remove()
            while True:
                taken.append(torch.empty(1 << 30, dtype=torch.uint8, device="cuda"))

        hook = model.model.layers[2].mlp.register_forward_pre_hook(take_all)
        with pytest.raises(BudgetError, match="ran out of memory in a pass"):
            model(input_ids=ids)
        taken.clear()
        torch.cuda.empty_cache()
        assert torch.equal(model(input_ids=ids).logits, wanted)
