"""Every strategy on a machine: what is recommended, what is refused and with which change."""

from __future__ import annotations

import dataclasses
import time

import pytest

from headrace.errors import InvalidRequestError
from headrace.machine.engine import PRESENT
from headrace.model.model import Model
from headrace.planning.comparison import Answer, Question, Refusal, compare, fastest
from headrace.planning.strategies import STRATEGIES
from headrace.planning.workload import Workload
from planning_examples import dense_model, moe_model, server, sure_engine

SMALL = dense_model()
LARGE = dense_model(name="large", layers=80, hidden=8192, heads=64, inner=28672)


def ask(model: Model, *, devices: int = 8, memory_gb: float = 80, **work: int) -> Question:
    return Question(model=model, machine=server(devices=devices, memory_gb=memory_gb), work=Workload(**work))


def answered(question: Question, strategy: str) -> Answer:
    item = compare(question, only=strategy)[strategy]
    assert isinstance(item, Answer), item
    return item


def refused(question: Question, strategy: str) -> Refusal:
    item = compare(question, only=strategy)[strategy]
    assert isinstance(item, Refusal), item
    return item


def test_every_strategy_is_answered_or_refused_with_a_reason() -> None:
    compared = compare(ask(SMALL))
    assert list(compared) == list(STRATEGIES)
    for item in compared.values():
        if isinstance(item, Refusal):
            assert len(item.why_not) > 10
        else:
            assert 0 < item.decode_s_per_pass.low <= item.decode_s_per_pass.expected <= item.decode_s_per_pass.high


def test_a_model_that_fits_is_not_streamed() -> None:
    best = fastest(compare(ask(SMALL, devices=1)))
    assert best is not None
    assert best.strategy == "resident"
    assert best.binds == "device memory"


def test_several_devices_lower_the_latency_by_width_and_not_by_stages() -> None:
    compared = compare(ask(SMALL, generate_tokens=200))
    best = fastest(compared)
    assert best is not None
    assert best.strategy == "tensor"
    stages = compared["pipeline"]
    resident = compared["resident"]
    assert isinstance(stages, Answer)
    assert isinstance(resident, Answer)
    assert stages.decode_s_per_pass.expected >= resident.decode_s_per_pass.expected


def test_one_device_that_is_too_small_streams_and_holds_what_it_can() -> None:
    best = answered(ask(LARGE, devices=1), "overlap")
    held = best.arrangement.resident_share
    assert 0.3 < held < 0.55
    assert best.binds == "host link"
    layers_bytes = sum(group.count * group.layer.size_bytes for group in LARGE.groups)
    streamed_s = (1 - held) * layers_bytes / (25e9 * PRESENT.link_share.expected)
    assert best.decode_s_per_pass.expected == pytest.approx(streamed_s, rel=1e-6)
    assert best.memory.device_bytes <= 80e9 * 0.94
    sequential = answered(ask(LARGE, devices=1), "sequential")
    assert sequential.decode_s_per_pass.expected > best.decode_s_per_pass.expected


def test_host_and_device_together_beat_streaming_at_one_token() -> None:
    question = ask(LARGE, devices=1)
    assert (
        answered(question, "hybrid").decode_s_per_pass.expected
        < answered(question, "overlap").decode_s_per_pass.expected
    )


def test_what_does_not_fit_is_refused_with_the_smallest_change() -> None:
    refusal = refused(ask(LARGE, devices=1), "resident")
    assert refusal.required_bytes is not None
    assert refusal.required_bytes == pytest.approx(LARGE.weights_bytes, rel=0.1)
    assert "weights in int8 would fit" in refusal.why_not.lower()
    work = Workload(sequences=4000, prompt_tokens=1000, generate_tokens=100)
    small_host = server(devices=1, host_memory_gb=20)
    many = refused(Question(model=SMALL, machine=small_host, work=work), "resident")
    assert "a batch of" in many.why_not.lower()
    batch = int(many.why_not.lower().split("a batch of ")[1].split()[0])
    work = dataclasses.replace(work, sequences=batch)
    fits = Question(model=SMALL, machine=small_host, work=work)
    assert isinstance(compare(fits, only="resident")["resident"], Answer)
    more = dataclasses.replace(fits, work=dataclasses.replace(work, sequences=batch + 1))
    assert isinstance(compare(more, only="resident")["resident"], Refusal)


def test_more_devices_are_named_where_they_would_do() -> None:
    huge = dense_model(name="huge", layers=200, hidden=16384, heads=128, kv_heads=128, inner=53248)
    refusal = refused(ask(huge, devices=8, memory_gb=40), "tensor")
    assert "devices would do" in refusal.why_not


def test_a_mixture_keeps_the_experts_that_fit() -> None:
    question = ask(moe_model(), devices=1, memory_gb=40)
    item = answered(question, "experts")
    assert item.arrangement.expert_hit_rate is not None
    assert 0.1 < item.arrangement.expert_hit_rate < 0.9
    asked = dataclasses.replace(question, expert_hit_rate=0.0)
    assert answered(asked, "experts").decode_s_per_pass.expected > item.decode_s_per_pass.expected


def test_more_memory_is_never_slower() -> None:
    times = []
    for memory_gb in (10, 20, 40, 80, 160, 320):
        best = fastest(compare(ask(LARGE, devices=1, memory_gb=memory_gb)))
        assert best is not None
        times.append(best.total_s.expected)
    assert times == sorted(times, reverse=True)


def test_a_budget_below_the_device_s_memory_is_kept() -> None:
    question = dataclasses.replace(ask(LARGE, devices=1), device_memory_bytes=20e9)
    best = answered(question, "overlap")
    assert best.memory.device_bytes <= 20e9
    assert best.decode_s_per_pass.expected > answered(ask(LARGE, devices=1), "overlap").decode_s_per_pass.expected


def test_uncertain_constants_widen_the_interval_and_exact_ones_do_not() -> None:
    question = ask(SMALL, devices=1)
    item = answered(dataclasses.replace(question, engine=sure_engine(PRESENT)), "resident")
    assert item.decode_s_per_pass.low == pytest.approx(item.decode_s_per_pass.high, rel=1e-9)
    unsure = answered(question, "resident").decode_s_per_pass
    assert unsure.high > 1.1 * unsure.expected > 1.1 * unsure.low


def test_the_whole_comparison_takes_less_than_two_seconds() -> None:
    question = Question(
        model=LARGE,
        machine=server(devices=8, nodes=9),
        work=Workload(sequences=64, prompt_tokens=1000, generate_tokens=200),
    )
    start = time.process_time()
    compare(question)
    assert time.process_time() - start < 10, "the goal is 2 s; five times that is a fault on any machine"


def test_bad_questions_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="can do 8192"):
        ask(SMALL, prompt_tokens=9000)
    with pytest.raises(InvalidRequestError, match="did you mean tensor"):
        compare(ask(SMALL), only="tensors")
    with pytest.raises(InvalidRequestError, match="between 0 and 1"):
        dataclasses.replace(ask(SMALL), expert_hit_rate=1.5)
