"""Best of n, beams, revisions and drafts against greedy decoding: tokens, passes, time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from headrace.economics.sampling_cost import SAMPLING, sampled_cost, sampled_work
from headrace.errors import InvalidRequestError
from headrace.machine.engine import PRESENT
from headrace.machine.machine import Machine, Processor
from headrace.planning.closed_form import WorkCost, work_cost
from headrace.planning.described_rates import expected_rates, quantities
from headrace.planning.plan import arranged
from headrace.planning.workload import Speculation, Workload
from planning_cases import exact, made_up_model

WORK = Workload(sequences=1, prompt_tokens=512, generate_tokens=128)


def predictor(*, flops: float = 1e15) -> Callable[[Workload, Speculation | None], WorkCost]:
    """Seven billion parameters on one device with 2 TB/s."""
    model = made_up_model()
    machine = Machine(
        name="one device",
        processor=Processor(
            name="made up",
            kind="gpu",
            memory_bytes=80e9,
            memory_bytes_per_s=exact(2e12),
            flops={"bf16": exact(flops)},
            achievable=exact(0.8),
        ),
        devices=1,
    )
    resident = arranged(model.num_layers)
    constants = quantities(machine, PRESENT, resident, weight_format="bf16")
    rates = expected_rates(constants)
    return lambda work, drafts: work_cost(model, machine, resident, work, rates, speculation=drafts)


def test_best_of_eight_is_nearly_free_where_reading_weights_binds() -> None:
    cost = sampled_cost(WORK, "best-of:8", predictor())
    assert cost.token_multiplier == 8
    assert cost.passes_multiplier == 1
    assert 1.0 < cost.time_multiplier < 1.3
    assert cost.cache_multiplier == pytest.approx((512 + 8 * 128) / (512 + 128))


def test_best_of_eight_takes_eight_times_the_decoding_where_arithmetic_binds() -> None:
    work = Workload(sequences=512, prompt_tokens=16, generate_tokens=512)
    cost = sampled_cost(work, "best-of:8", predictor(flops=1e13))
    assert cost.time_multiplier == pytest.approx(8, rel=0.05)


def test_the_prompt_of_several_texts_is_read_once() -> None:
    work = Workload(sequences=64, prompt_tokens=4096, generate_tokens=1)
    assert sampled_cost(work, "samples:16", predictor()).time_multiplier == pytest.approx(1.0)


def test_revisions_and_reasoning_take_as_many_more_passes() -> None:
    revised = sampled_cost(WORK, "revise:2", predictor())
    assert revised.token_multiplier == revised.passes_multiplier == 5
    assert 4.5 < revised.time_multiplier < 6
    thought = sampled_cost(WORK, "think:9", predictor())
    assert thought.token_multiplier == 10
    assert thought.time_multiplier > 9


def test_drafts_save_passes_and_compute_more_tokens() -> None:
    cost = sampled_cost(WORK, "speculative:4:0.7", predictor())
    kept = 1 + 0.7 + 0.49 + 0.343 + 0.2401
    assert cost.token_multiplier == pytest.approx(5 / kept)
    assert cost.passes_multiplier == pytest.approx(1 / kept)
    assert 0.3 < cost.time_multiplier < 0.6
    wasted = sampled_cost(
        Workload(sequences=512, prompt_tokens=16, generate_tokens=128), "speculative:4:0.3", predictor(flops=1e13)
    )
    assert wasted.time_multiplier > 1


def test_greedy_is_the_measure() -> None:
    assert sampled_cost(WORK, "greedy", predictor()).time_multiplier == 1
    assert sampled_work(WORK, "greedy")[:2] == (WORK, 1.0)


@pytest.mark.parametrize("name", list(SAMPLING))
def test_every_method_with_its_least_number_is_greedy_or_dearer_and_explains_itself(name: str) -> None:
    work, multiplier, why = sampled_work(WORK, f"{name}:1")
    assert work.sequences * work.generate_tokens >= WORK.sequences * WORK.generate_tokens
    assert multiplier >= 1
    assert "{" not in why
    assert len(why) > 80


@pytest.mark.parametrize("name", list(SAMPLING))
def test_the_tokens_handed_over_are_what_was_asked_for(name: str) -> None:
    work, multiplier, _ = sampled_work(WORK, f"{name}:3")
    wanted = WORK.sequences * WORK.generate_tokens * (3 if name == "samples" else 1)
    assert work.sequences * work.generate_tokens / multiplier == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("bestof:4", "did you mean best-of"),
        ("best-of", "whole number"),
        ("best-of:0", "between 1"),
        ("best-of:-3", "whole number"),
        ("best-of:2.5", "whole number"),
        ("best-of:99999999", "between 1"),
        ("revise:2:3", "whole number"),
        ("speculative:4", "--draft-tokens 4"),
        ("", "known: greedy"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        sampled_work(WORK, text)


@pytest.mark.parametrize("text", ["speculative:4:1.5", "speculative:4:nan", "speculative:4:x", "speculative:0"])
def test_drafts_that_cannot_be_meant_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        sampled_cost(WORK, text, predictor())
