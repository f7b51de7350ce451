"""The break-even report: its number, its price, and who reaches it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings, target
from hypothesis import strategies as st

from headrace.errors import BudgetError
from headrace.machine.engine import PRESENT, Engine
from headrace.machine.machine import Machine, Tier
from headrace.model.model import Model
from headrace.planning.break_even import BreakEven, break_even, break_even_tokens, critical_batch
from headrace.planning.closed_form import ClosedForm
from headrace.planning.infeasible import minimum_bytes
from headrace.planning.plan import Parallelism, arranged
from headrace.planning.planner import compare, plan_strategy
from headrace.planning.prediction import Candidate
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from headrace.planning.workload import PassTokens, Speculation, Workload
from planning_examples import PERFECT_ENGINE, dense_model, moe_model, server
from planning_scenarios import scenarios

LARGE = dense_model(name="large", layers=80, hidden=8192, heads=64, inner=28672)
STREAMED = arranged(80, resident=0)


def ask(machine: Machine | None = None, *, engine: Engine = PERFECT_ENGINE, **work: int) -> Scenario:
    asked = Workload(**{"prompt_tokens": 1, "generate_tokens": 2, **work})
    return Scenario.described(LARGE, machine or server(devices=1), asked, engine=engine)


def report_on(scenario: Scenario) -> BreakEven:
    """Of streaming everything."""
    report = break_even(scenario, None)
    assert report is not None
    return report


HEAD_SHARE = LARGE.head_bytes / sum(group.count * group.layer.size_bytes for group in LARGE.groups)
"""of the head, which is computed as well but does not travel"""


def test_sixteen_bit_weights_break_even_at_flops_over_link_rate() -> None:
    """A little earlier: the head computes too, and attention reads its cache."""
    assert break_even_tokens(ask(), STREAMED).expected == pytest.approx(300e12 / 25e9 / (1 + HEAD_SHARE), rel=2e-3)


def test_a_mixture_needs_as_many_times_more_as_it_has_experts_for_each_used() -> None:
    dense = break_even_tokens(ask(), STREAMED).expected
    mixture = dataclasses.replace(ask(), model=moe_model())
    mixed = break_even_tokens(mixture, arranged(32, resident=0)).expected
    assert mixed / dense == pytest.approx(8 / 2, rel=0.15), "attention is used whole, so a little less than 4"


@pytest.mark.parametrize("context", [1, 400])
def test_at_break_even_a_streamed_pass_takes_as_long_as_its_load(context: int) -> None:
    scenario = ask(engine=PRESENT, prompt_tokens=context)
    tokens = break_even_tokens(scenario, STREAMED).expected
    for factor, binds_link in ((0.999, True), (1.001, False)):
        carried = PassTokens(sequences=tokens * factor, new_tokens=1, context_tokens=context + 1)
        cost = ClosedForm.of(scenario, STREAMED).one_pass(carried)
        assert (cost.load_s > cost.busy_s) is binds_link
        assert (cost.binds(overlap=True) == "link") is binds_link


def test_keys_and_values_lower_it_and_those_that_travel_make_it_unreachable() -> None:
    short, long = ask(), ask(prompt_tokens=4000)
    tokens = break_even_tokens(long, STREAMED).expected
    assert tokens < 0.5 * break_even_tokens(short, STREAMED).expected
    travelling = STREAMED._replace(cache_on_host=True)
    assert break_even_tokens(long, travelling).expected == math.inf
    report = report_on(long)
    ways = {way.name: way for way in report.ways}
    assert report.tokens_per_pass.expected == tokens
    assert not ways["batch"].reached


def test_where_more_tokens_load_longer_in_the_end_the_batch_at_hand_decides() -> None:
    """Few weights travel, so that one sequence computes longer; but each brings a cache that travels as well."""
    way = arranged(80, resident=79)._replace(cache_on_host=True)
    one, many = ask(prompt_tokens=45), ask(sequences=1000, prompt_tokens=45)
    assert break_even_tokens(one, way).expected == 1.0
    assert break_even_tokens(many, way).expected == math.inf


def test_copies_fill_a_pass_together() -> None:
    """Of eight copies, each with a part of the sequences, the tokens of a pass are those of all eight."""
    eight = STREAMED._replace(parallelism=Parallelism(replicas=8))
    one, all_eight = (break_even_tokens(ask(server(devices=8)), way).expected for way in (STREAMED, eight))
    assert all_eight == pytest.approx(8 * one, rel=1e-3)


def test_drafts_fill_a_pass_too() -> None:
    """Each sequence's cache is read once for all of them, so drafts fill a pass less quickly than sequences."""
    scenario = ask(sequences=100, prompt_tokens=2000)
    drafted = dataclasses.replace(scenario, speculation=Speculation(draft_tokens=3, acceptance=0.7))
    plain, checked = (break_even_tokens(each, STREAMED).expected for each in (scenario, drafted))
    assert plain < checked < break_even_tokens(ask(), STREAMED).expected
    assert report_on(drafted).tokens_now == 400
    assert report_on(drafted).kv_cache_bytes == pytest.approx(
        LARGE.kv_cache_bytes(sequences=math.ceil(checked / 4), context_tokens=2002)
    )


def test_the_report_names_the_cache_that_it_would_take() -> None:
    report = report_on(ask(prompt_tokens=2000, generate_tokens=48))
    assert report.source is Tier.HOST
    assert report.tokens_now == 1
    per_token = 2 * 80 * 8 * 128 * 2
    tokens = math.ceil(report.tokens_per_pass.expected)
    assert 5000 < tokens < 12000
    assert report.kv_cache_bytes == pytest.approx(tokens * 2048 * per_token, rel=1e-9)
    ways = {way.name: way for way in report.ways}
    assert not ways["batch"].reached
    assert "times the weights" in ways["batch"].how
    assert ways["prefill"].reached
    assert not ways["speculation"].reached
    assert not ways["quantisation"].reached


def test_a_batch_that_large_has_reached_it() -> None:
    report = report_on(ask(sequences=12001, prompt_tokens=1, generate_tokens=2))
    assert {way.name for way in report.ways if way.reached} >= {"decode", "prefill", "speculation"}


def test_without_a_host_the_disk_is_the_source_and_without_either_there_is_no_report() -> None:
    laptop = server(devices=1, with_host=False)
    report = report_on(ask(laptop))
    assert report.source is Tier.DISK
    assert report.tokens_per_pass.expected == pytest.approx(300e12 / 5e9 / (1 + HEAD_SHARE), rel=2e-3)
    assert break_even(ask(dataclasses.replace(laptop, disk=None, links={})), None) is None


def test_a_host_too_small_for_the_weights_leaves_the_disk() -> None:
    assert report_on(ask(server(devices=1, host_memory_gb=64))).source is Tier.DISK


def test_the_report_is_on_the_recommended_plan_where_that_streams() -> None:
    """A plan that keeps half of its layers reaches break-even with half of the tokens."""
    scenario = ask()
    found = plan_strategy(scenario, Strategy.OVERLAP)
    report = break_even(scenario, found)
    assert report is not None
    assert report.tokens_per_pass == break_even_tokens(scenario, found.plan.arrangement)
    share = found.plan.arrangement.streamed_share
    assert report.tokens_per_pass.expected == pytest.approx(
        share * report_on(scenario).tokens_per_pass.expected, rel=0.01
    )


def test_the_critical_batch_of_resident_weights_is_flops_over_memory_rate() -> None:
    assert critical_batch(ask()) == pytest.approx(300e12 / 2e12, rel=1e-3)


def test_fewer_bits_lower_it() -> None:
    narrow = dataclasses.replace(LARGE.groups[0].layer, attention_bytes=0.25 * LARGE.groups[0].layer.attention_bytes)
    narrow = dataclasses.replace(narrow, feed_forward_bytes=0.25 * narrow.feed_forward_bytes)
    model = dataclasses.replace(LARGE, groups=(dataclasses.replace(LARGE.groups[0], layer=narrow),))
    tokens = break_even_tokens(dataclasses.replace(ask(), model=model), STREAMED).expected
    assert tokens == pytest.approx(break_even_tokens(ask(), STREAMED).expected / 4, rel=1e-6)


def test_beyond_it_a_faster_link_does_not_help() -> None:
    model = dataclasses.replace(LARGE, context_tokens=40000)
    work = Workload(prompt_tokens=30000, generate_tokens=2)
    scenario = dataclasses.replace(ask(), model=model, workload=work)
    machine = scenario.described_machine
    links = {
        name: dataclasses.replace(link, bytes_per_s=link.bytes_per_s.times(2)) for name, link in machine.links.items()
    }
    faster = dataclasses.replace(machine, links=links)
    slow_s, fast_s = (ClosedForm.of(scenario.on(each), STREAMED).work(work).prefill_s for each in (machine, faster))
    assert fast_s == pytest.approx(slow_s, rel=0.01)


# -- what binds and break-even never contradict each other --------------------------------------------------------


@given(
    model=st.sampled_from([LARGE, moe_model(), dense_model()]),
    machine=st.sampled_from(
        [
            server(devices=1, memory_gb=20),
            server(devices=8, memory_gb=20),
            server(devices=8, host_memory_gb=100),
            server(devices=1, with_host=False, memory_gb=24),
        ]
    ),
    engine=st.sampled_from([PRESENT, PERFECT_ENGINE, dataclasses.replace(PRESENT, overlaps_hops=False)]),
    work=st.builds(
        Workload,
        sequences=st.one_of(st.integers(1, 100), st.integers(100, 40_000)),
        prompt_tokens=st.sampled_from([1, 30, 1000, 6000]),
        generate_tokens=st.sampled_from([2, 50, 2000]),
    ),
    drafts=st.sampled_from([None, Speculation(draft_tokens=4, acceptance=0.6, draft_s_share=0.1)]),
)
@settings(deadline=None, max_examples=150)
def test_a_described_machine_loads_longer_exactly_below_break_even(
    model: Model, machine: Machine, engine: Engine, work: Workload, drafts: Speculation | None
) -> None:
    scenario = Scenario.described(model, machine, work, engine=engine, speculation=drafts)
    now = work.sequences * scenario.tokens_checked
    for item in compare(scenario).values():
        if not isinstance(item, Candidate) or not item.plan.streamed_blocks:
            continue
        tokens = break_even_tokens(scenario, item.plan.arrangement).expected
        predicted = item.prediction
        assert (predicted.load_s_per_pass > predicted.compute_s_per_pass) is (now < tokens), item.plan.strategy
        if item.plan.arrangement.overlap:
            assert (predicted.binds in ("link", "disk")) is (now < tokens), item.plan.strategy
        report = break_even(scenario, item)
        assert report is not None
        assert report.tokens_now == now
        assert (report.ways[0].name == "decode") is (now >= tokens)


@given(scenarios(), st.sampled_from([1, 3, 50, 2000]))
@settings(deadline=None, max_examples=80)
def test_a_measured_machine_loads_longer_exactly_below_break_even(drawn: Scenario, sequences: int) -> None:
    more = drawn.batch(sequences)
    extra_bytes = max(0, minimum_bytes(more) - minimum_bytes(drawn)) if _has_room(more) else 0
    scenario = dataclasses.replace(more, budget_bytes=drawn.budget_bytes + extra_bytes)
    streamed = 0
    for item in compare(scenario).values():
        if not isinstance(item, Candidate) or not item.plan.streamed_blocks:
            continue
        streamed += 1
        tokens, predicted = item.prediction.break_even_tokens_per_pass, item.prediction
        loads = predicted.load_s_per_pass > predicted.compute_s_per_pass
        assert loads is (sequences < tokens * (1 - 1e-6)) or sequences == pytest.approx(tokens, rel=1e-6)
        if item.plan.strategy is Strategy.OVERLAP:
            assert (predicted.binds in ("link", "disk")) is loads
        report = break_even(scenario, item)
        assert report is not None
        assert report.tokens_per_pass.expected == tokens
    target(streamed)


def _has_room(scenario: Scenario) -> bool:
    try:
        minimum_bytes(scenario)
    except BudgetError:
        return False
    return True
