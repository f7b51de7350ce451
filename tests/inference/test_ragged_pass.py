"""Sequences that share passes get the logits that they get alone: every architecture, chunks, windows, prefixes."""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import headrace
from headrace.errors import UnsupportedModelError
from headrace.inference.batching.job_input import LengthSwitch
from headrace.inference.batching.packable import continues_prompts, padding_changes, why_not_packed
from headrace.inference.batching.ragged_pass import RaggedRunner
from headrace.inference.transformers_seam import computes_anew, length_switch
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


@pytest.mark.parametrize(
    "shared", [pytest.param(0, id="apart"), pytest.param(8, id="common-beginning", marks=pytest.mark.versions)]
)
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


TINY = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
    "short_factor": [1 + 0.1 * place for place in range(8)],
    "long_factor": [2 + 1.5 * place for place in range(8)],
}
BY_LENGTH: dict[str, Any] = {
    "phi3-longrope": transformers.Phi3Config(
        **TINY, **HEADS, original_max_position_embeddings=16, rope_parameters=LONGROPE
    ),
    "llama-longrope": transformers.LlamaConfig(**TINY, **HEADS, rope_parameters=LONGROPE),
    "llama-dynamic": transformers.LlamaConfig(
        **TINY,
        **{**HEADS, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0},
    ),
}


def resident(config: Any) -> Any:
    """A tiny model with weights that matter, which the runner takes for a streamed one."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15) if parameter.dim() > 1 else parameter.add_(0.1)
    model.headrace = SimpleNamespace(passes=[])
    return model


@pytest.mark.versions
@pytest.mark.parametrize("name", BY_LENGTH)
def test_positions_that_depend_on_the_length_are_each_sequences_own(name: str) -> None:
    """Sequences below the switch, above it, and growing beyond it, in one batch, with prompts in chunks."""
    config = BY_LENGTH[name]
    tokens = length_switch(config)
    assert tokens == 16
    model = resident(config)
    switch = LengthSwitch(tokens, computes_anew(model, tokens))
    assert switch.computes_anew == (name == "phi3-longrope")
    prompts: dict[Hashable, list[int]] = {}
    needs: dict[Hashable, Need] = {}
    expected: dict[Hashable, list[torch.Tensor]] = {}
    for number, (length, new) in enumerate([(5, 4), (25, 6), (13, 8), (16, 3), (17, 2)]):
        prompts[number] = [3 + (number + 7 * place) % 300 for place in range(length)]
        needs[number] = Need(length, new, anew_at=switch.anew_at(length, new))
        if switch.computes_anew:  # that is, as if each token were the end of a prompt
            expected[number] = alone(resident(config), prompts[number], new)
            continue
        ids = torch.tensor([prompts[number]])
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
        whole = resident(config).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)
        expected[number] = [logits[0] for logits in whole.logits]
    scheduler = PassScheduler(most_sequences=4, pass_tokens=9, pool=PositionPool(90))
    found = together(RaggedRunner(model, positions=90), scheduler, prompts, needs)
    for key, rows in expected.items():
        for step, (mine, theirs) in enumerate(zip(found[key], rows, strict=True)):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4), f"{key}, token {step}"


@pytest.mark.parametrize(
    "config",
    [
        transformers.GptOssConfig(**TINY, **HEADS, head_dim=16, num_local_experts=4, sliding_window=4),
        transformers.Llama4TextConfig(**TINY, **HEADS, head_dim=16, num_local_experts=2, attention_chunk_size=6),
        transformers.Olmo3Config(**TINY, **HEADS, sliding_window=4),
        transformers.Gemma3TextConfig(**TINY, **HEADS, head_dim=16, sliding_window=4),
    ],
    ids=["sinks", "chunks", "windows", "windows-and-scales"],
)
def test_what_the_model_says_of_its_attention_is_followed(config: Any) -> None:
    model = resident(config)
    prompts: dict[Hashable, list[int]] = {"short": [3 * place + 4 for place in range(9)], "long": list(range(30, 47))}
    expected = {number: alone(model, prompt, 3) for number, prompt in prompts.items()}
    needs: dict[Hashable, Need] = {number: Need(len(prompt), 3) for number, prompt in prompts.items()}
    scheduler = PassScheduler(most_sequences=2, pass_tokens=7, pool=PositionPool(40))
    found = together(RaggedRunner(model, positions=40), scheduler, prompts, needs)
    for number, rows in expected.items():
        for mine, theirs in zip(found[number], rows, strict=True):
            assert torch.allclose(mine, theirs, rtol=2e-4, atol=2e-4)
    assert why_not_packed(config) is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.Gemma3TextConfig(**TINY, **HEADS, head_dim=16, use_bidirectional_attention=True), "looks ahead"),
        (transformers.LlamaConfig(**TINY, **HEADS, is_causal=False), "looks ahead"),
        (transformers.BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4), "does not go through"),
        (
            transformers.RecurrentGemmaConfig(**TINY, num_attention_heads=4, lru_width=64),
            "several sequences|depends on the others",
        ),
        (
            transformers.DeepseekV3Config(
                **TINY, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1
            ),
            "keeps something else",
        ),
    ],
    ids=["bidirectional", "not-causal", "alibi", "recurrent", "latent"],
)
def test_why_a_model_cannot_be_packed_is_said(config: Any, reason: str) -> None:
    assert re.search(reason, str(why_not_packed(config)))
    assert continues_prompts(config) == ("looks ahead" not in reason)


def test_padding_that_reaches_the_model_is_found() -> None:
    assert not padding_changes(transformers.LlamaConfig(**TINY, **HEADS))
    assert not padding_changes(transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4))
    assert padding_changes(transformers.RecurrentGemmaConfig(**TINY, num_attention_heads=4, lru_width=64))
    assert padding_changes(transformers.BartConfig(vocab_size=320, d_model=64, decoder_layers=2, is_decoder=True))


@pytest.mark.parametrize("name", ["falcon", "falcon-alibi"])
def test_attention_that_cannot_be_exchanged_is_refused(name: str, checkpoints: dict[str, Path]) -> None:
    with (
        headrace.load(checkpoints[name], memory="64MiB", dtype="float32", max_tokens=32) as model,
        pytest.raises(UnsupportedModelError, match="falcon"),
    ):
        RaggedRunner(model, positions=10)
