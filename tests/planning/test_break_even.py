"""The break-even report: its number, its price, and who reaches it."""

from __future__ import annotations

import dataclasses

import pytest

from headrace.machine.engine import PRESENT, Engine
from headrace.machine.machine import Machine, Tier
from headrace.planning.arrangement import Arrangement
from headrace.planning.break_even import break_even_report, break_even_tokens, critical_batch
from headrace.planning.comparison import Question, evaluate
from headrace.planning.cost import pass_cost
from headrace.planning.machine_rates import MachineRates, quantities
from headrace.planning.workload import PassTokens, Workload
from planning_examples import PERFECT_ENGINE, dense_model, moe_model, server

STREAMED = Arrangement(strategy="overlap", source=Tier.HOST, slots=2, resident_share=0.0)
LARGE = dense_model(name="large", layers=80, hidden=8192, heads=64, inner=28672)


def ask(machine: Machine | None = None, *, engine: Engine = PERFECT_ENGINE, **work: int) -> Question:
    return Question(model=LARGE, machine=machine or server(devices=1), work=Workload(**work), engine=engine)


def test_sixteen_bit_weights_break_even_at_flops_over_link_rate() -> None:
    assert break_even_tokens(ask(), STREAMED).expected == pytest.approx(300e12 / 25e9, rel=1e-6)


def test_a_mixture_needs_as_many_times_more_as_it_has_experts_for_each_used() -> None:
    dense = break_even_tokens(ask(), STREAMED).expected
    mixed = break_even_tokens(dataclasses.replace(ask(), model=moe_model()), STREAMED).expected
    assert mixed / dense == pytest.approx(8 / 2, rel=0.15), "attention is used whole, so a little less than 4"


def test_at_break_even_a_streamed_pass_takes_as_long_as_its_load() -> None:
    question = ask(engine=PRESENT)
    tokens = break_even_tokens(question, STREAMED).expected
    constants = quantities(question.machine, PRESENT, STREAMED, weight_format="bf16")
    rates = MachineRates.of({name: constant.expected for name, constant in constants.items()})
    for factor, binds_link in ((0.9, True), (1.1, False)):
        carried = PassTokens(sequences=1, new_tokens=tokens * factor, context_tokens=1)
        cost = pass_cost(LARGE, question.machine, STREAMED, carried, rates)
        products_s = cost.compute_s + cost.memory_s
        assert (cost.link_s > products_s) is binds_link


def test_the_report_names_the_cache_that_it_would_take() -> None:
    report = break_even_report(ask(prompt_tokens=2000, generate_tokens=48))
    assert report is not None
    assert report.source is Tier.HOST
    per_token = 2 * 80 * 8 * 128 * 2
    assert report.kv_cache_bytes == pytest.approx(12000 * 2048 * per_token, rel=1e-3)
    ways = {way.name: way for way in report.ways}
    assert not ways["batch"].reached
    assert "times the weights" in ways["batch"].how
    assert ways["prefill"].reached
    assert not ways["speculation"].reached
    assert not ways["quantisation"].reached


def test_a_batch_that_large_has_reached_it() -> None:
    report = break_even_report(ask(sequences=12001, prompt_tokens=1, generate_tokens=2))
    assert report is not None
    assert {way.name for way in report.ways if way.reached} >= {"decode", "prefill", "speculation"}


def test_without_a_host_the_disk_is_the_source_and_without_either_there_is_no_report() -> None:
    laptop = server(devices=1, with_host=False)
    report = break_even_report(ask(laptop))
    assert report is not None
    assert report.source is Tier.DISK
    assert report.tokens_per_pass.expected == pytest.approx(300e12 / 5e9, rel=1e-6)
    assert break_even_report(ask(dataclasses.replace(laptop, disk=None, links={}))) is None


def test_a_host_too_small_for_the_weights_leaves_the_disk() -> None:
    report = break_even_report(ask(server(devices=1, host_memory_gb=64)))
    assert report is not None
    assert report.source is Tier.DISK


def test_the_critical_batch_of_resident_weights_is_flops_over_memory_rate() -> None:
    assert critical_batch(ask()) == pytest.approx(300e12 / 2e12, rel=1e-3)


def test_fewer_bits_lower_it() -> None:
    narrow = dataclasses.replace(LARGE.groups[0].layer, attention_bytes=0.25 * LARGE.groups[0].layer.attention_bytes)
    narrow = dataclasses.replace(narrow, feed_forward_bytes=0.25 * narrow.feed_forward_bytes)
    model = dataclasses.replace(LARGE, groups=(dataclasses.replace(LARGE.groups[0], layer=narrow),))
    tokens = break_even_tokens(dataclasses.replace(ask(), model=model), STREAMED).expected
    assert tokens == pytest.approx(300e12 / 25e9 / 4, rel=1e-6)


def test_beyond_it_a_faster_link_does_not_help() -> None:
    model = dataclasses.replace(LARGE, context_tokens=40000)
    question = dataclasses.replace(ask(), model=model, work=Workload(prompt_tokens=30000, generate_tokens=2))
    faster_links = {
        name: dataclasses.replace(link, bytes_per_s=link.bytes_per_s.times(2))
        for name, link in question.machine.links.items()
    }
    faster = dataclasses.replace(question, machine=dataclasses.replace(question.machine, links=faster_links))
    slow_s = evaluate(question, STREAMED).prefill_s.expected
    fast_s = evaluate(faster, STREAMED).prefill_s.expected
    assert fast_s == pytest.approx(slow_s, rel=0.01)
