"""What `headrace plan` says of a described machine: the contract's JSON, the price, advice, and plans in few words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from headrace.cli.plan_report import how
from headrace.planning.answer import PlanAnswer
from headrace.planning.answer_json import answer_json
from headrace.planning.plan import Parallelism, Placement, arranged
from headrace.planning.planner import compare, described_plan
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from headrace.planning.workload import Workload
from planning_examples import dense_model, server

LARGE = dense_model(name="large", layers=80, hidden=8192, heads=64, inner=28672)
SCENARIO = Scenario.described(LARGE, server(devices=1), Workload(sequences=4, generate_tokens=100, prompt_tokens=16))


def answer(scenario: Scenario = SCENARIO, *, token_multiplier: float = 1.0, only: Strategy | None = None) -> PlanAnswer:
    return PlanAnswer(
        scenario=scenario, compared=compare(scenario, only), notes=("a note",), token_multiplier=token_multiplier
    )


OVERLAP = answer(only=Strategy.OVERLAP)


def test_the_json_holds_what_the_contract_names() -> None:
    made = answer_json(answer(), version="1")
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert set(made) >= {"model", "machine", "strategies", "recommended", "break_even"}
    assert set(made["break_even"]) >= {"tokens_per_pass", "kv_cache_bytes", "reachable_by"}
    assert [entry["name"] for entry in made["strategies"]] == [strategy.value for strategy in Strategy]
    for entry in made["strategies"]:
        assert set(entry) >= {
            "name",
            "fits",
            "prefill_s",
            "decode_s_per_pass",
            "tokens_per_s",
            "memory_bytes",
            "binds",
            "usd_per_750_words",
            "usd_per_million_tokens",
            "low",
            "high",
            "why_not",
        }
        if entry["fits"]:
            assert entry["low"]["decode_s_per_pass"] <= entry["decode_s_per_pass"] <= entry["high"]["decode_s_per_pass"]
            assert set(entry["memory_bytes"]) == {"device", "host", "disk"}
            assert entry["usd_per_750_words"] == pytest.approx(entry["usd_per_million_tokens"] / 1000)
            assert entry["why_not"] is None
        else:
            assert entry["why_not"]
    assert made["recommended"] in {entry["name"] for entry in made["strategies"] if entry["fits"]}
    assert made["advice"]
    assert made["notes"] == ["a note"]


def test_the_price_is_the_rent_for_the_whole_work_over_its_tokens() -> None:
    cost, total_s = OVERLAP.prices[Strategy.OVERLAP], OVERLAP.intervals[Strategy.OVERLAP].total_s
    assert cost.usd_per_million_tokens is not None
    assert cost.usd_per_million_tokens.expected == pytest.approx(2.0 / 3600 * total_s.expected / 400 * 1e6)
    twice = answer(only=Strategy.OVERLAP, token_multiplier=2).prices[Strategy.OVERLAP]
    assert twice.usd_per_million_tokens is not None
    assert twice.usd_per_million_tokens.expected == pytest.approx(2 * cost.usd_per_million_tokens.expected)
    assert cost.joules_per_token is not None
    assert cost.joules_per_token.expected == pytest.approx(400 * 0.43 * total_s.expected / 400)
    assert cost.joules_per_token.low < cost.joules_per_token.expected < cost.joules_per_token.high


def test_a_machine_without_rent_has_no_price() -> None:
    processor = replace(SCENARIO.described_machine.processor, rent_usd_per_h=None, power_w=None)
    free = answer(SCENARIO.on(replace(SCENARIO.described_machine, processor=processor)), only=Strategy.OVERLAP)
    cost = free.prices[Strategy.OVERLAP]
    assert cost.usd_per_750_words is None
    assert cost.joules_per_token is None
    (entry,) = answer_json(free, version="1")["strategies"]
    assert (entry["usd_per_750_words"], entry["joules_per_token"]) == (None, None)


def test_advice_names_what_binds_first() -> None:
    assert OVERLAP.candidates[Strategy.OVERLAP].prediction.binds == "link"
    sentences = OVERLAP.advice
    assert any("host link of twice the speed" in sentence for sentence in sentences[:2])
    assert not any("arithmetic" in sentence for sentence in sentences)
    assert any("4 bits" in sentence for sentence in sentences)


def test_a_plan_is_told_in_few_words() -> None:
    plan = OVERLAP.candidates[Strategy.OVERLAP].plan
    assert how(plan) == f"{plan.resident_blocks} on device, {plan.streamed_blocks} from host"
    resident = described_plan(SCENARIO, Strategy.RESIDENT, arranged(80))
    assert how(resident) == "all resident"
    divided = Parallelism(tensor=4, pipeline=2, micro_batches=3, replicas=2)
    eight = SCENARIO.on(server(devices=8, nodes=2))
    wide = described_plan(eight, Strategy.TENSOR_PIPELINE, arranged(80, parallelism=divided))
    assert how(wide) == "width 4, 2 stages, 3 micro-batches, 2 copies"
    mixed = arranged(80, resident=40, cpu=8, source=Placement.DISK, cache_on_host=True)
    assert how(described_plan(SCENARIO, Strategy.OVERLAP, mixed)) == (
        "41 on device, 32 from disk, 8 on CPU, KV on host"
    )
