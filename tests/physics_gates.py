"""What no prediction may break, whatever the formulas: bytes over bandwidth, operations over peak, known anchors.

Each gate is a function without arguments that raises AssertionError. `test_physics_gates.py` runs them on the code as
it is; `test_gates_catch_mutants.py` runs them on code with wrong formulas put in, and wants them to fail.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from headrace.machine.catalogue import find_machine
from headrace.machine.engine import PRESENT
from headrace.machine.machine import Machine, Tier
from headrace.model.catalogue import find_model
from headrace.model.formats import requantised
from headrace.model.model import Model
from headrace.planning.break_even import break_even
from headrace.planning.closed_form import ClosedForm, WorkCost
from headrace.planning.infeasible import lack_of
from headrace.planning.memory import described_memory
from headrace.planning.plan import Arrangement, Parallelism, Placement, arranged
from headrace.planning.planner import MARGIN, compare, described_plan, moving_parts, plan_strategy, recommended
from headrace.planning.prediction import Candidate, predict, prediction_interval
from headrace.planning.price import price
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from headrace.planning.workload import Workload
from headrace.units import parse_rate, parse_size

MODELS = ("llama-3-8b", "llama-3.1-70b", "mixtral-8x7b", "deepseek-v3", "gpt-oss-120b", "gpt-3")
PLACES = ("rtx-4090", "8xa100-80", "8xh200", "dgx-2", "m2-ultra", "laptop")
WORK = Workload(sequences=8, prompt_tokens=200, generate_tokens=100)


class _Found(NamedTuple):
    """A strategy's plan for a model on a machine, and what its passes spend."""

    scenario: Scenario
    candidate: Candidate
    cost: WorkCost


@functools.cache
def _answers() -> list[_Found]:
    found = []
    for model in MODELS:
        for place in PLACES:
            scenario = Scenario.described(find_model(model), find_machine(place), WORK)
            for item in compare(scenario).values():
                if isinstance(item, Candidate):
                    found.append(_Found(scenario, item, _cost(scenario, item.plan.arrangement)))
    assert len(found) > 100
    return found


def _asked(model: str, place: str, **work: int) -> Scenario:
    return Scenario.described(
        find_model(model), find_machine(place), Workload(**{"prompt_tokens": 16, "generate_tokens": 32, **work})
    )


def _cost(scenario: Scenario, arrangement: Arrangement) -> WorkCost:
    """What the passes of this arrangement spend, also where its memory does not fit."""
    return ClosedForm.of(scenario, arrangement).work(scenario.workload)


def _held(scenario: Scenario, *, tensor: int = 1, pipeline: int = 1, micro_batches: int = 1) -> Arrangement:
    """All layers on the devices, divided in this way."""
    divided = Parallelism(tensor=tensor, pipeline=pipeline, micro_batches=micro_batches)
    return arranged(scenario.model.num_layers, parallelism=divided)


def _streamed(scenario: Scenario, source: Placement = Placement.HOST) -> Arrangement:
    return arranged(scenario.model.num_layers, resident=0, source=source)


def _sharded(scenario: Scenario, devices: int) -> Arrangement:
    return _streamed(scenario)._replace(parallelism=Parallelism(replicas=devices, sharded=devices > 1))


def nothing_is_faster_than_bytes_and_operations_allow() -> None:
    """Weights that must be read over the bandwidth of all devices used; operations over their peak; links likewise."""
    for scenario, candidate, _ in _answers():
        model, machine, used = scenario.model, scenario.described_machine, candidate.plan.arrangement
        work, divided = scenario.workload, used.parallelism
        seconds = prediction_interval(candidate, scenario).decode_s_per_pass.low
        best = max(rate.high for rate in machine.processor.flops.values())
        on_device = 1.0 - used.cpu_share
        operations = model.linear_flops(tokens=work.sequences, head_tokens=work.sequences) * on_device
        assert seconds >= operations / (best * divided.devices) * 0.999
        if not used.cpu_share:
            # a copy's weights are read once per pass by each copy; what one token needs is the least
            least_bytes = sum(g.count * g.layer.bytes_read(1) for g in model.groups)
            bandwidth = machine.processor.memory_bytes_per_s.high * divided.tensor
            assert seconds >= least_bytes / bandwidth * 0.999 / divided.pipeline
        layers_bytes = sum(group.count * group.layer.size_bytes for group in model.groups)
        if used.expert_hit_rate is None and used.streamed_share:
            streamed = layers_bytes * used.streamed_share
            if machine.host is not None:
                links = divided.replicas if divided.sharded else divided.tensor
                assert seconds >= streamed / (machine.links["host"].bytes_per_s.high * links) * 0.999
            if used.source is Tier.DISK:
                assert seconds >= streamed / machine.require_disk().bytes_per_s.high * 0.999


def overlapping_lies_between_the_longest_and_the_sum() -> None:
    """A pass with overlap takes at least the longest of its parts and at most all of them together."""
    for _, candidate, spent in _answers():
        for cost in (spent.prefill, spent.decode):
            parts = (cost.busy_s, cost.parts["link"], cost.parts["disk"])
            assert max(parts) * 0.999999 <= cost.total_s <= sum(parts) * 1.000001
        if not candidate.plan.arrangement.overlap:
            assert math.isclose(cost.total_s, sum(parts), rel_tol=1e-9)
        elif candidate.plan.strategy is Strategy.OVERLAP:
            assert math.isclose(cost.total_s, max(parts), rel_tol=1e-9)


def what_is_loaded_takes_its_time_on_each_hop() -> None:
    """The seconds of host link and disk are the streamed bytes over their rates."""
    for scenario, candidate, spent in _answers():
        used, machine = candidate.plan.arrangement, scenario.described_machine
        if candidate.plan.strategy is not Strategy.OVERLAP or used.cache_on_host:
            continue
        layers_bytes = sum(group.count * group.layer.size_bytes for group in scenario.model.groups)
        streamed = layers_bytes * used.streamed_share
        share = PRESENT.link_share.expected
        if machine.host is not None:
            rate = machine.rate("host", sharers=min(used.parallelism.devices, machine.devices)).expected * share
            assert math.isclose(spent.decode.parts["link"], streamed / rate, rel_tol=0.01)
        if used.source is Tier.DISK:
            assert math.isclose(
                spent.decode.parts["disk"],
                streamed / (machine.require_disk().bytes_per_s.expected * share),
                rel_tol=0.01,
            )


def faster_parts_are_never_slower() -> None:
    """Twice the memory, bandwidth, arithmetic or link makes the best plan slower only for fewer moving parts."""
    for model in ("llama-3.1-70b", "mixtral-8x7b"):
        for place in ("rtx-4090", "4xa100-80"):
            machine = find_machine(place)
            before = _best(find_model(model), machine)
            processor, disk = machine.processor, machine.require_disk()
            changed = [
                replace(machine, processor=replace(processor, memory_bytes=2 * processor.memory_bytes)),
                replace(
                    machine, processor=replace(processor, memory_bytes_per_s=processor.memory_bytes_per_s.times(2))
                ),
                replace(
                    machine,
                    processor=replace(processor, flops={k: rate.times(2) for k, rate in processor.flops.items()}),
                ),
                replace(
                    machine,
                    disk=replace(disk, bytes_per_s=disk.bytes_per_s.times(2)),
                    links={
                        k: replace(link, bytes_per_s=link.bytes_per_s.times(2)) for k, link in machine.links.items()
                    },
                ),
            ]
            for other in changed:
                assert _best(find_model(model), other) <= before / (1 - MARGIN) * 1.0001


def more_tokens_never_shorten_a_pass() -> None:
    """A pass over more sequences, or longer ones, takes at least as long."""
    for width in (1, 8):
        times = []
        for sequences in (1, 2, 8, 32, 128, 512):
            scenario = _asked("mixtral-8x7b", "8xh100", sequences=sequences, prompt_tokens=200, generate_tokens=100)
            times.append(_cost(scenario, _held(scenario, tensor=width)).decode_s_per_pass)
        assert times == sorted(times)
        assert times[-1] > 1.5 * times[0]


def a_longer_context_is_read_every_pass() -> None:
    """The cache's bytes over the memory rate come on top: keys and values, of key-value heads only."""
    times = []
    for prompt in (1000, 65000):
        scenario = _asked("llama-3.1-70b@fp8", "h200", sequences=1, prompt_tokens=prompt, generate_tokens=2)
        times.append(_cost(scenario, _held(scenario)).decode_s_per_pass)
    cache_s = 64000 * 327_680 / (4.8e12 * PRESENT.attention_share.expected)
    assert math.isclose(times[1] - times[0], cache_s, rel_tol=0.02)


def splitting_by_width_costs_an_exchange() -> None:
    """Eight devices are faster than one, and slower than an eighth: partial results are added up twice per layer."""
    scenario = _asked("llama-3-8b", "8xa100-80")
    one = _cost(scenario, _held(scenario))
    eight = _cost(scenario, _held(scenario, tensor=8))
    assert eight.decode_s_per_pass < one.decode_s_per_pass
    assert eight.decode_s_per_pass > 1.5 * one.decode.busy_s / 8
    long = _asked("llama-3-8b", "8xa100-80", sequences=1, prompt_tokens=8000, generate_tokens=2)
    carried = 8000 * 4096 * 2
    volume_s = 2 * 32 * 2 * carried * 7 / 8 / find_machine("8xa100-80").links["scale_up"].bytes_per_s.expected
    split = _cost(long, _held(long, tensor=8)).prefill
    assert volume_s * 0.99 < split.parts["communication"] < volume_s * 3
    alone_s = _cost(long, _held(long)).prefill_s
    assert alone_s / 8 * 0.9 < split.total_s - split.parts["communication"] < alone_s / 8 * 1.3


def stages_do_not_cut_the_latency_of_one_token() -> None:
    """One token passes all stages: never less than one big device, and a hand-over more per stage."""
    scenario = _asked("llama-3-8b", "8xa100-80")
    one_s = _cost(scenario, _held(scenario)).decode_s_per_pass
    eight_s = _cost(scenario, _held(scenario, pipeline=8)).decode_s_per_pass
    assert one_s < eight_s < 1.2 * one_s
    many = _asked("llama-3-8b", "8xa100-80", sequences=64, prompt_tokens=1000, generate_tokens=10)
    whole = _cost(many, _held(many, pipeline=8))
    filled_s = _cost(many, _held(many, pipeline=8, micro_batches=8)).prefill_s
    assert 0.2 < filled_s / whole.prefill_s < 0.35, "8 micro-batches through 8 stages: 15 steps of a 64th"
    handed_over_s = 64 * 1000 * 4096 * 2 / many.described_machine.links["scale_up"].bytes_per_s.expected
    assert 8 * handed_over_s < whole.prefill.parts["communication"] < 8 * handed_over_s * 1.2


def devices_that_share_an_uplink_get_less_each() -> None:
    """Sixteen devices of one computer pull together no more than its uplink gives."""
    machine = find_machine("dgx-2")
    assert machine.rate("host", sharers=16).expected * 16 <= machine.links["bridge"].bytes_per_s.expected * 1.0001
    scenario = _asked("opt-175b", "dgx-2", sequences=64, generate_tokens=10)
    seconds = {devices: _cost(scenario, _sharded(scenario, devices)).decode.parts["link"] for devices in (1, 4, 16)}
    assert seconds[1] / seconds[4] < 4
    assert 349e9 / 48e9 * 0.99 < seconds[16] < 349e9 / 25e9


def memory_of_all_devices_is_the_whole() -> None:
    """Split by width, the devices together hold the weights once, and each its own work space."""
    scenario = Scenario.described(find_model("llama-3.1-70b"), find_machine("8xa100-80"), WORK)
    model = scenario.model
    whole = described_memory(scenario, _held(scenario)).device
    part = described_memory(scenario, _held(scenario, tensor=8)).device
    assert math.isclose(part.weights_bytes * 8, whole.weights_bytes, rel_tol=1e-6)
    assert math.isclose(whole.weights_bytes, model.weights_bytes, rel_tol=1e-6)
    assert math.isclose(part.kv_cache_bytes * 8, whole.kv_cache_bytes, rel_tol=1e-6)
    assert math.isclose(whole.kv_cache_bytes, 8 * 300 * 327_680, rel_tol=1e-6)
    two_nodes = scenario.on(find_machine("2x8xa100-80"))
    sixteen = described_memory(two_nodes, _held(scenario, tensor=16)).device
    assert math.isclose(sixteen.kv_cache_bytes, part.kv_cache_bytes, rel_tol=1e-6), "8 key-value heads: no further"
    need = described_memory(scenario, arranged(model.num_layers, resident=model.num_layers // 2))
    assert math.isclose(need.device.weights_bytes + need.host.weights_bytes, model.weights_bytes, rel_tol=0.01)
    assert need.device.slots_bytes > 2 * 1.5e9


def known_sizes() -> None:
    """Figures that sources state: GPT-3, its cache, DeepSeek-V3's cache, Llama's; published totals."""
    gpt = find_model("gpt-3")
    assert round(gpt.weights_bytes / 1e9, -1) == 350
    assert math.ceil(gpt.weights_bytes / find_machine("v100-32").processor.memory_bytes) == 11
    assert gpt.kv_bytes_per_token() == 4_718_592
    assert find_model("deepseek-v3").kv_bytes_per_token() == 70_272
    assert find_model("llama-3-8b").kv_bytes_per_token() == 131_072
    assert find_model("llama-3.1-70b").kv_bytes_per_token() == 327_680
    assert find_model("palm-540b").kv_bytes_per_token() == 2 * 118 * 256 * 2
    assert find_model("llama-3.1-405b").parameters == 405_853_388_800
    assert find_model("deepseek-v3").parameters == 671_026_419_200
    assert find_model("mixtral-8x7b").parameters == 46_702_792_704
    assert find_model("gpt-2").weights_bytes == 124_439_808 * 2, "its head is its embedding"
    assert math.isclose(find_model("gpt-oss-120b").weights_bytes, 65.2e9, rel_tol=0.005)
    assert requantised(gpt, "int8").weights_bytes < 0.55 * gpt.weights_bytes
    window = find_model("gpt-oss-120b")
    assert window.kv_cache_bytes(sequences=1, context_tokens=10**5) < 0.51 * 10**5 * window.kv_bytes_per_token()


def units_mean_what_they_say() -> None:
    """GB is 10^9, GiB 2^30; rates are bytes."""
    assert parse_size("1GB") == 10**9
    assert parse_size("1GiB") == parse_size("1G") == 2**30
    assert parse_rate("1GB/s") == 1e9
    h100 = find_machine("h100").processor
    assert h100.memory_bytes == 80e9
    assert h100.memory_bytes_per_s.expected == 3.35e12
    assert h100.flops["bf16"].expected == 989e12
    assert find_machine("8xh100").links["network"].bytes_per_s.expected < 50e9, "400 Gbit/s are 50 GB/s"


def known_times() -> None:
    """Decodes that everybody measures: 70B in 8 bits on an H200, 8B on an H100, 405B on eight H200, Mixtral."""
    for model, place, strategy, low_ms, high_ms in (
        ("llama-3.1-70b@fp8", "h200", Strategy.RESIDENT, 15, 27),
        ("llama-3-8b", "h100", Strategy.RESIDENT, 5, 9),
        ("llama-3.1-405b@fp8", "8xh200", Strategy.TENSOR, 14, 40),
        ("mixtral-8x7b", "2xa100-80", Strategy.TENSOR, 5, 16),
        ("llama-3-8b@q4_k_m", "rtx-4090", Strategy.RESIDENT, 4, 11),
    ):
        scenario = _asked(model, place, sequences=1, prompt_tokens=100, generate_tokens=100)
        seconds = plan_strategy(scenario, strategy).prediction.decode_s_per_pass
        assert low_ms < seconds * 1e3 < high_ms, (model, seconds)


def known_prefill() -> None:
    """Two operations per parameter and token at 50 to 100 % of the matrix rate: 8,000 tokens of 8B on an H100."""
    scenario = _asked("llama-3-8b", "h100", sequences=1, prompt_tokens=8000, generate_tokens=2)
    seconds = _cost(scenario, _held(scenario)).prefill_s
    least_s = 2 * 7.5e9 * 8000 / 989e12
    assert least_s * 1.2 < seconds < least_s * 2.5


def known_streaming() -> None:
    """GPT-3's size over PCI Express 3: half a minute per token; break-even near 10,000 tokens for 16-bit weights."""
    scenario = _asked("opt-175b", "1xv100-32@dgx-2", sequences=64, prompt_tokens=4, generate_tokens=10)
    assert 25 < plan_strategy(scenario, Strategy.OVERLAP).prediction.decode_s_per_pass < 36
    report = break_even(scenario, None)
    assert report is not None
    assert 4_000 < report.tokens_per_pass.expected < 11_000
    mixed = break_even(replace(scenario, model=find_model("mixtral-8x7b")), None)
    assert mixed is not None
    assert 3.2 < mixed.tokens_per_pass.expected / report.tokens_per_pass.expected < 4.1


def few_tokens_use_few_experts() -> None:
    """One token of DeepSeek-V3 reads about 37 billion parameters' worth, 256 tokens nearly all."""
    model = find_model("deepseek-v3")
    assert 36e9 < model.bytes_read(1) / 2 < 40e9
    assert model.bytes_read(256) > 0.99 * (model.weights_bytes - model.embedding_bytes)
    assert math.isclose(next(find_model("mixtral-8x7b").layers()).experts_touched(1), 2.0)


def the_price_is_the_rent_of_the_time() -> None:
    """Dollars per million tokens: devices x rent x seconds over tokens."""
    scenario = Scenario.described(find_model("llama-3-8b"), find_machine("h100"), WORK)
    machine, candidate = scenario.described_machine, plan_strategy(scenario, Strategy.RESIDENT)
    total_s = prediction_interval(candidate, scenario).total_s
    found = price(machine, candidate.plan, total_s, binds=candidate.prediction.binds).usd_per_million_tokens
    rent = machine.processor.rent_usd_per_h
    assert found is not None
    assert rent is not None
    cost = _cost(scenario, candidate.plan.arrangement)
    seconds = cost.prefill.total_s + 99 * cost.decode.total_s
    assert math.isclose(found.expected, rent.expected / 3600 * seconds / 800 * 1e6, rel_tol=1e-9)


def loads_are_hidden_or_added() -> None:
    """70B on one device from host and disk: in sequence the sum of all, overlapped the longest, at the links' rates."""
    model, machine = find_model("llama-3.1-70b"), find_machine("rtx-4090")
    layers_bytes = sum(group.count * group.layer.size_bytes for group in model.groups)
    share = PRESENT.link_share.expected
    link_s = layers_bytes / (machine.links["host"].bytes_per_s.expected * share)
    for source in (Placement.HOST, Placement.DISK):
        disk_s = layers_bytes / (machine.require_disk().bytes_per_s.expected * share) * (source is Placement.DISK)
        for sequences in (1, 16384):
            work = Workload(sequences=sequences, prompt_tokens=64, generate_tokens=8)
            scenario = Scenario.described(model, machine, work)
            stay = _cost(scenario, _held(scenario)).decode.busy_s
            way = _streamed(scenario, source)
            hidden = _cost(scenario, way).decode.total_s
            added = _cost(scenario, way._replace(slots=1)).decode.total_s
            assert math.isclose(hidden, max(stay, link_s, disk_s), rel_tol=0.01)
            first = _cost(scenario, way).prefill
            ends_s = first.total_s - max(first.busy_s, first.parts["link"], first.parts["disk"])
            layer_s = (first.busy_s + first.parts["link"] + first.parts["disk"]) / model.num_layers
            assert 0 < ends_s < layer_s * 1.5, "the first layer's loading, or the last one's computing and the head"
            if first.busy_s > first.parts["link"] + first.parts["disk"]:
                assert math.isclose(
                    ends_s, (first.parts["link"] + first.parts["disk"]) / model.num_layers, rel_tol=1e-6
                )
            assert math.isclose(added, stay + link_s + disk_s, rel_tol=0.01)


def what_travels_besides_weights_is_counted() -> None:
    """Missed experts over the host link; a cache that the host keeps; what sharded devices gather from one another."""
    machine = find_machine("8xa100-80")
    link = machine.links["host"].bytes_per_s.expected * PRESENT.link_share.expected
    mixture = find_model("mixtral-8x7b")
    scenario = Scenario.described(mixture, machine, Workload(prompt_tokens=16, generate_tokens=32))
    missed = _cost(scenario, _held(scenario)._replace(expert_hit_rate=0.5)).decode
    used_bytes = sum(group.count * 2 * group.layer.expert_bytes for group in mixture.groups)
    assert math.isclose(missed.parts["experts on demand"], used_bytes / 2 / link, rel_tol=0.01), (
        "2 experts a layer, every other one missed"
    )
    model = find_model("llama-3.1-70b")
    scenario = Scenario.described(model, machine, Workload(sequences=8, prompt_tokens=4000, generate_tokens=2))
    away = _cost(scenario, _held(scenario)._replace(cache_on_host=True)).decode
    here = _cost(scenario, _held(scenario)).decode
    assert math.isclose(away.parts["link"], 8 * 4001 * 327_680 / link, rel_tol=0.01)
    assert away.parts["attention"] == here.parts["attention"] > 0, (
        "wherever it waits, it is read from the device's memory"
    )
    layers_bytes = sum(group.count * group.layer.size_bytes for group in model.groups)
    pulled_s = layers_bytes / 8 / (machine.rate("host", sharers=8).expected * PRESENT.link_share.expected)
    gathered_s = layers_bytes * 7 / 8 / machine.links["scale_up"].bytes_per_s.expected
    assert math.isclose(
        _cost(scenario, _sharded(scenario, 8)).decode.parts["link"], pulled_s + gathered_s, rel_tol=0.02
    )


def a_cache_on_the_host_never_wins_where_it_fits_on_the_device() -> None:
    """Wherever it waits, it is read from the device's memory, and the way there is not shorter than none."""
    found = [(scenario, candidate) for scenario, candidate, _ in _answers()]
    # A link a tenth as fast as the device's memory carries a cache within a pass: only its reading could be forgotten.
    for prompt_tokens in (1000, 4000, 16000):
        near = _asked("llama-3.1-70b@fp8", "gh200", sequences=2, prompt_tokens=prompt_tokens, generate_tokens=100)
        found += [(near, item) for item in compare(near).values() if isinstance(item, Candidate)]
    kept = 0
    for scenario, candidate in found:
        used = candidate.plan.arrangement
        other = used._replace(cache_on_host=not used.cache_on_host)
        if used.cache_on_host:
            assert lack_of(scenario, other) is not None, (scenario.model.name, candidate.plan.strategy)
        elif scenario.described_machine.host is not None and not used.cpu_share and used.parallelism.pipeline == 1:
            kept += 1
            there_s = predict(described_plan(scenario, candidate.plan.strategy, other), scenario).total_s
            assert there_s >= candidate.prediction.total_s * (1 - 1e-9)
    assert kept > 80


def more_moving_parts_must_pay() -> None:
    """What is recommended is 2 % faster than anything simpler, and nothing is faster by more than 2 %."""
    scenarios = {id(scenario): scenario for scenario, _, _ in _answers()}
    close = _asked("mixtral-8x7b", "dgx-2", sequences=64, prompt_tokens=1000, generate_tokens=200)
    for scenario in (*scenarios.values(), close):
        compared = [item for item in compare(scenario).values() if isinstance(item, Candidate)]
        best = recommended({item.plan.strategy: item for item in compared})
        assert best is not None
        for item in compared:
            assert best.prediction.total_s * 0.98 <= item.prediction.total_s * (1 + 1e-9)
            if moving_parts(item.plan) < moving_parts(best.plan):
                assert best.prediction.total_s < 0.98 * item.prediction.total_s
    best = recommended(compare(close))
    assert best is not None
    assert best.plan.strategy is Strategy.TENSOR
    in_two_directions = plan_strategy(close, Strategy.TENSOR_2D)
    one_way = plan_strategy(close, Strategy.TENSOR)
    assert 0.98 < in_two_directions.prediction.total_s / one_way.prediction.total_s < 1, "else this shows nothing"


def a_window_keeps_no_more_than_its_tokens() -> None:
    """gpt-oss: 36 layers of 8 key-value heads of 64, every other one with a window of 128 tokens."""
    per_layer = 2 * 8 * 64 * 2
    found = find_model("gpt-oss-120b").kv_cache_bytes(sequences=3, context_tokens=10_000)
    assert found == 3 * per_layer * (18 * 128 + 18 * 10_000)


def _best(model: Model, machine: Machine) -> float:
    best = recommended(compare(Scenario.described(model, machine, WORK)))
    assert best is not None
    return best.prediction.total_s


GATES: tuple[Callable[[], None], ...] = (
    known_sizes,
    units_mean_what_they_say,
    known_times,
    known_prefill,
    known_streaming,
    few_tokens_use_few_experts,
    a_longer_context_is_read_every_pass,
    splitting_by_width_costs_an_exchange,
    stages_do_not_cut_the_latency_of_one_token,
    devices_that_share_an_uplink_get_less_each,
    memory_of_all_devices_is_the_whole,
    loads_are_hidden_or_added,
    what_travels_besides_weights_is_counted,
    a_window_keeps_no_more_than_its_tokens,
    the_price_is_the_rent_of_the_time,
    more_tokens_never_shorten_a_pass,
    what_is_loaded_takes_its_time_on_each_hop,
    overlapping_lies_between_the_longest_and_the_sum,
    nothing_is_faster_than_bytes_and_operations_allow,
    a_cache_on_the_host_never_wins_where_it_fits_on_the_device,
    more_moving_parts_must_pay,
    faster_parts_are_never_slower,
)
