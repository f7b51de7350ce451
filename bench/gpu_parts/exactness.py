"""Streamed logits against resident ones, and both against transformers' own, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from gpu_parts.outcome import Goal, Measured, Table, holds
from gpu_parts.stage import Stage, places_text
from gpu_parts.timing import FIRST_TOKEN
from headrace.inference.transformers_seam import cache_argument, cache_in

BATCHES = (1, 3)
PROMPT_TOKENS = 33
STEPS = (1, 1, 3)
"""new tokens of the passes after the prompt's"""
WORK: dict[str, Any] = {"batch": max(BATCHES), "prompt_tokens": PROMPT_TOKENS, "max_tokens": 64}


class Comparison(NamedTuple):
    """One model's logits against the reference's."""

    dtype: str
    reference: str
    compared: str
    blocks: str
    passes: int
    different: int
    largest_difference: float


def measure_exactness(stage: Stage) -> Measured:
    """The small shape in each dtype: transformers' own, everything resident, from host memory, from the disk."""
    name, found = stage.case.small, []
    for dtype in stage.case.dtypes:
        expected = _transformers_logits(stage, dtype)
        stage.settle()
        for what, options in _plans(stage, dtype).items():
            with stage.load(name, what=f"{what}, {dtype}", dtype=dtype, **options, **WORK) as model:
                found.append(compare(expected, model, dtype=dtype, reference="transformers", compared=what))
    return Measured(
        tables=[comparison_table(found)],
        goals=[exactness_goal(f"logits of the {name} shape equal transformers' own, bit for bit", found)],
        notes=[
            "Each is compared with `from_pretrained(...).to(device)` in the same dtype: the logits of a prompt and of "
            "three further passes over a cache, at batch 1 and 3, padded on the left."
        ],
        record={"comparisons": [one._asdict() for one in found]},
    )


def _plans(stage: Stage, dtype: str) -> dict[str, dict[str, Any]]:
    """What is loaded, and with how much memory; the first dtype sees more of it than the others."""
    name, work = stage.case.small, {"dtype": dtype, **WORK}
    least = stage.least_bytes(name, "overlap", **work)
    plans: dict[str, dict[str, Any]] = {
        "resident": {"strategy": "resident", "memory": stage.resident_bytes(name, **work)},
        "from host memory": {"strategy": "overlap", "memory": least},
    }
    if dtype == stage.case.dtypes[0]:
        plans["half resident"] = {"strategy": "overlap", "memory": stage.share_bytes(name, 0.5, **work)}
        plans["from the disk"] = {"strategy": "overlap", "memory": least, "host_memory": stage.case.ring_bytes}
    return plans


def compare(expected: Sequence[torch.Tensor], model: Any, *, dtype: str, reference: str, compared: str) -> Comparison:
    """Hold a loaded model's logits against these."""
    plan = model.headrace.plan
    differences = [
        (wanted.float() - got.float()).abs().max().item()
        for wanted, got in zip(expected, logits_of(model), strict=True)
        if not torch.equal(wanted, got)
    ]
    largest = max(differences, default=0.0)
    return Comparison(dtype, reference, compared, places_text(plan), len(expected), len(differences), largest)


def logits_of(model: Any) -> list[torch.Tensor]:
    """Logits of a prompt and of some passes after it, at every batch, in host memory."""
    collected = []
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(FIRST_TOKEN, model.config.vocab_size, (batch, PROMPT_TOKENS), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, : 2 * row] = 0
        step, mask, cache = ids.to(model.device), mask.to(model.device), None
        with torch.inference_mode():
            for new_tokens in (*STEPS, 0):
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
                known = {"position_ids": positions, cache_argument(model): cache}
                out = model(input_ids=step, attention_mask=mask, use_cache=True, **known)
                cache = cache_in(out)
                collected.append(out.logits.cpu())
                step = out.logits[:, -1:].argmax(-1).repeat(1, new_tokens)
                mask = torch.cat([mask, mask.new_ones(batch, new_tokens)], dim=-1)
    return collected


def comparison_table(found: Sequence[Comparison]) -> Table:
    """One row for each."""
    return Table(
        ("dtype", "reference", "compared", "blocks", "passes", "different", "largest difference"),
        [
            [
                one.dtype,
                one.reference,
                one.compared,
                one.blocks,
                str(one.passes),
                str(one.different),
                f"{one.largest_difference:.3g}",
            ]
            for one in found
        ],
    )


def exactness_goal(what: str, found: Sequence[Comparison]) -> Goal:
    """No pass of any comparison differs."""
    different, passes = sum(one.different for one in found), sum(one.passes for one in found)
    return holds(what, found=f"{passes - different} of {passes} passes equal", reached=passes > 0 and not different)


def _transformers_logits(stage: Stage, dtype: str) -> list[torch.Tensor]:
    path = stage.rack.path(stage.case.small)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    return logits_of(model.to(stage.device.torch_device).eval())
