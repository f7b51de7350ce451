"""What `headrace plan` prints for a model's shape on a described machine: the contract's JSON, and the price."""

from __future__ import annotations

import json

import pytest

from headrace.cli.machine_plan import how, machine_plan_json
from headrace.planning.advice import remedies
from headrace.planning.break_even import break_even_report
from headrace.planning.comparison import Answer, Question, compare, fastest
from headrace.planning.price import price
from headrace.planning.workload import Workload
from planning_examples import dense_model, server

LARGE = dense_model(name="large", layers=80, hidden=8192, heads=64, inner=28672)
QUESTION = Question(model=LARGE, machine=server(devices=1), work=Workload(sequences=4, generate_tokens=100))


def test_the_json_holds_what_the_contract_names() -> None:
    compared = compare(QUESTION)
    best = fastest(compared)
    prices = {
        name: price(QUESTION.machine, item, QUESTION.work)
        for name, item in compared.items()
        if isinstance(item, Answer)
    }
    made = machine_plan_json(QUESTION, compared, best, break_even_report(QUESTION), prices, ["a note"])
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert set(made) >= {"model", "machine", "strategies", "recommended", "break_even"}
    assert set(made["break_even"]) >= {"tokens_per_pass", "kv_cache_bytes", "reachable_by"}
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


def test_the_price_is_the_rent_for_the_whole_work_over_its_tokens() -> None:
    item = compare(QUESTION, only="overlap")["overlap"]
    assert isinstance(item, Answer)
    cost = price(QUESTION.machine, item, QUESTION.work)
    assert cost.usd_per_million_tokens is not None
    assert cost.usd_per_million_tokens.expected == pytest.approx(2.0 / 3600 * item.total_s.expected / 400 * 1e6)
    twice = price(QUESTION.machine, item, QUESTION.work, token_multiplier=2)
    assert twice.usd_per_million_tokens is not None
    assert twice.usd_per_million_tokens.expected == pytest.approx(2 * cost.usd_per_million_tokens.expected)
    assert cost.joules_per_token is not None
    assert cost.joules_per_token.expected == pytest.approx(400 * 0.43 * item.total_s.expected / 400)
    assert cost.joules_per_token.low < cost.joules_per_token.expected < cost.joules_per_token.high


def test_a_machine_without_rent_has_no_price() -> None:
    from dataclasses import replace

    machine = replace(
        QUESTION.machine, processor=replace(QUESTION.machine.processor, rent_usd_per_h=None, power_w=None)
    )
    item = compare(QUESTION, only="overlap")["overlap"]
    assert isinstance(item, Answer)
    assert price(machine, item, QUESTION.work) == price(machine, item, QUESTION.work)
    assert price(machine, item, QUESTION.work).usd_per_750_words is None
    assert price(machine, item, QUESTION.work).joules_per_token is None


def test_the_remedies_name_what_binds_first() -> None:
    item = compare(QUESTION, only="overlap")["overlap"]
    assert isinstance(item, Answer)
    assert item.binds == "host link"
    sentences = remedies(QUESTION, item)
    assert any("host link of twice the speed" in sentence for sentence in sentences[:2])
    assert not any("arithmetic" in sentence for sentence in sentences)
    assert any("4 bits" in sentence for sentence in sentences)


def test_an_arrangement_is_told_in_few_words() -> None:
    item = compare(QUESTION, only="overlap")["overlap"]
    assert isinstance(item, Answer)
    assert how(item).endswith("% from host")
