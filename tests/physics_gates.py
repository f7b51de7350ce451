"""What no prediction may break, whatever the formulas: bytes over bandwidth, operations over peak, known anchors.

Each gate is a function without arguments that raises AssertionError. `test_physics_gates.py` runs them on the code as
it is; `test_gates_catch_mutants.py` runs them on code with wrong formulas put in, and wants them to fail.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

from headrace.machine.catalogue import find_machine
from headrace.machine.engine import PRESENT
from headrace.machine.machine import Machine, Tier
from headrace.model.catalogue import find_model
from headrace.model.formats import requantised
from headrace.model.model import Model
from headrace.planning.arrangement import Arrangement
from headrace.planning.break_even import break_even_report
from headrace.planning.comparison import Answer, Question, compare, evaluate, fastest
from headrace.planning.memory_need import memory_need
from headrace.planning.price import price
from headrace.planning.workload import Workload
from headrace.units import parse_rate, parse_size

MODELS = ("llama-3-8b", "llama-3.1-70b", "mixtral-8x7b", "deepseek-v3", "gpt-oss-120b", "gpt-3")
PLACES = ("rtx-4090", "8xa100-80", "8xh200", "dgx-2", "m2-ultra", "laptop")
WORK = Workload(sequences=8, prompt_tokens=200, generate_tokens=100)


@functools.cache
def _answers() -> list[tuple[Question, Answer]]:
    found = []
    for model in MODELS:
        for place in PLACES:
            question = Question(model=find_model(model), machine=find_machine(place), work=WORK)
            for item in compare(question).values():
                if isinstance(item, Answer):
                    found.append((question, item))
    assert len(found) > 100
    return found


def nothing_is_faster_than_bytes_and_operations_allow() -> None:
    """Weights that must be read over the bandwidth of all devices used; operations over their peak; links likewise."""
    for question, item in _answers():
        model, machine, used = question.model, question.machine, item.arrangement
        work, devices = question.work, used.devices
        seconds = item.decode_s_per_pass.low
        best = max(rate.high for rate in machine.processor.flops.values())
        on_device = 1.0 - used.cpu_share
        operations = model.linear_flops(tokens=work.sequences, head_tokens=work.sequences) * on_device
        assert seconds >= operations / (best * devices) * 0.999
        if not used.cpu_share:
            # a copy's weights are read once per pass by each copy; what one token needs is the least
            least_bytes = sum(g.count * g.layer.bytes_read(1) for g in model.groups)
            bandwidth = machine.processor.memory_bytes_per_s.high * used.tensor
            assert seconds >= least_bytes / bandwidth * 0.999 / used.pipeline
        layers_bytes = sum(group.count * group.layer.size_bytes for group in model.groups)
        if used.expert_hit_rate is None and used.streamed_share:
            streamed = layers_bytes * used.streamed_share
            if machine.host is not None:
                links = used.replicas if used.sharded else used.tensor
                assert seconds >= streamed / (machine.links["host"].bytes_per_s.high * links) * 0.999
            if used.source is Tier.DISK:
                assert seconds >= streamed / machine.require_disk().bytes_per_s.high * 0.999


def overlapping_lies_between_the_longest_and_the_sum() -> None:
    """A pass with overlap takes at least the longest of its parts and at most all of them together."""
    for _, item in _answers():
        for cost in (item.prefill, item.decode):
            parts = (cost.device_s + cost.host_compute_s + cost.cold_s, cost.link_s, cost.disk_s)
            assert max(parts) * 0.999999 <= cost.total_s <= sum(parts) * 1.000001
        if not item.arrangement.overlap:
            assert math.isclose(cost.total_s, sum(parts), rel_tol=1e-9)
        elif item.strategy == "overlap":
            assert math.isclose(cost.total_s, max(parts), rel_tol=1e-9)


def what_is_loaded_takes_its_time_on_each_hop() -> None:
    """The seconds of host link and disk are the streamed bytes over their rates."""
    for question, item in _answers():
        used, machine = item.arrangement, question.machine
        if item.strategy != "overlap" or used.kv_tier is Tier.HOST:
            continue
        layers_bytes = sum(group.count * group.layer.size_bytes for group in question.model.groups)
        streamed = layers_bytes * used.streamed_share
        share = PRESENT.link_share.expected
        if machine.host is not None:
            rate = machine.rate("host", sharers=min(used.devices, machine.devices)).expected * share
            assert math.isclose(item.decode.link_s, streamed / rate, rel_tol=0.01)
        if used.source is Tier.DISK:
            assert math.isclose(
                item.decode.disk_s, streamed / (machine.require_disk().bytes_per_s.expected * share), rel_tol=0.01
            )


def faster_parts_are_never_slower() -> None:
    """Twice the memory, bandwidth, arithmetic or link never makes the best plan slower."""
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
                assert _best(find_model(model), other) <= before * 1.0001


def more_tokens_never_shorten_a_pass() -> None:
    """A pass over more sequences, or longer ones, takes at least as long."""
    machine = find_machine("8xh100")
    for arrangement in (Arrangement(strategy="resident"), Arrangement(strategy="tensor", tensor=8)):
        times = []
        for sequences in (1, 2, 8, 32, 128, 512):
            work = Workload(sequences=sequences, prompt_tokens=200, generate_tokens=100)
            question = Question(model=find_model("mixtral-8x7b"), machine=machine, work=work)
            times.append(evaluate(question, arrangement).decode_s_per_pass.expected)
        assert times == sorted(times)
        assert times[-1] > 1.5 * times[0]


def a_longer_context_is_read_every_pass() -> None:
    """The cache's bytes over the memory rate come on top: keys and values, of key-value heads only."""
    model, machine = find_model("llama-3.1-70b@fp8"), find_machine("h200")
    times = []
    for prompt in (1000, 65000):
        work = Workload(sequences=1, prompt_tokens=prompt, generate_tokens=2)
        question = Question(model=model, machine=machine, work=work)
        times.append(evaluate(question, Arrangement(strategy="resident")).decode_s_per_pass.expected)
    cache_s = 64000 * 327_680 / (4.8e12 * PRESENT.attention_share.expected)
    assert math.isclose(times[1] - times[0], cache_s, rel_tol=0.02)


def splitting_by_width_costs_an_exchange() -> None:
    """Eight devices are faster than one, and slower than an eighth: partial results are added up twice per layer."""
    question = Question(model=find_model("llama-3-8b"), machine=find_machine("8xa100-80"), work=Workload())
    one = evaluate(question, Arrangement(strategy="resident"))
    eight = evaluate(question, Arrangement(strategy="tensor", tensor=8))
    assert eight.decode_s_per_pass.expected < one.decode_s_per_pass.expected
    assert eight.decode_s_per_pass.expected > 1.5 * one.decode.device_s / 8
    long = Question(
        model=find_model("llama-3-8b"),
        machine=find_machine("8xa100-80"),
        work=Workload(sequences=1, prompt_tokens=8000, generate_tokens=2),
    )
    carried = 8000 * 4096 * 2
    volume_s = 2 * 32 * 2 * carried * 7 / 8 / find_machine("8xa100-80").links["scale_up"].bytes_per_s.expected
    found = evaluate(long, Arrangement(strategy="tensor", tensor=8)).prefill.communication_s
    assert volume_s * 0.99 < found < volume_s * 3
    alone = evaluate(long, Arrangement(strategy="resident")).prefill_s.expected
    split = evaluate(long, Arrangement(strategy="tensor", tensor=8)).prefill
    assert alone / 8 * 0.9 < split.total_s - split.communication_s < alone / 8 * 1.3


def stages_do_not_cut_the_latency_of_one_token() -> None:
    """One token passes all stages: never less than one big device, and a hand-over more per stage."""
    question = Question(model=find_model("llama-3-8b"), machine=find_machine("8xa100-80"), work=Workload())
    one = evaluate(question, Arrangement(strategy="resident")).decode_s_per_pass.expected
    eight = evaluate(question, Arrangement(strategy="pipeline", pipeline=8)).decode_s_per_pass.expected
    assert one < eight < 1.2 * one
    work = Workload(sequences=64, prompt_tokens=1000, generate_tokens=10)
    many = Question(model=find_model("llama-3-8b"), machine=find_machine("8xa100-80"), work=work)
    alone = evaluate(many, Arrangement(strategy="pipeline", pipeline=8)).prefill_s.expected
    filled = evaluate(many, Arrangement(strategy="pipeline", pipeline=8, micro_batches=8)).prefill_s.expected
    assert 0.2 < filled / alone < 0.35, "8 micro-batches through 8 stages: 15 steps of a 64th"
    handed_over_s = 64 * 1000 * 4096 * 2 / many.machine.links["scale_up"].bytes_per_s.expected
    spent_s = evaluate(many, Arrangement(strategy="pipeline", pipeline=8)).prefill.communication_s
    assert 8 * handed_over_s < spent_s < 8 * handed_over_s * 1.2


def devices_that_share_an_uplink_get_less_each() -> None:
    """Sixteen devices of one computer pull together no more than its uplink gives."""
    machine = find_machine("dgx-2")
    assert machine.rate("host", sharers=16).expected * 16 <= machine.links["bridge"].bytes_per_s.expected * 1.0001
    work = Workload(sequences=64, generate_tokens=10)
    question = Question(model=find_model("opt-175b"), machine=machine, work=work)
    seconds = {}
    for devices in (1, 4, 16):
        arrangement = Arrangement(
            strategy="sharded", source=Tier.HOST, slots=2, resident_share=0.0, replicas=devices, sharded=devices > 1
        )
        seconds[devices] = evaluate(question, arrangement).decode.link_s
    assert seconds[1] / seconds[4] < 4
    assert 349e9 / 48e9 * 0.99 < seconds[16] < 349e9 / 25e9


def memory_of_all_devices_is_the_whole() -> None:
    """Split by width, the devices together hold the weights once, and each its own work space."""
    model, machine = find_model("llama-3.1-70b"), find_machine("8xa100-80")
    whole = memory_need(model, machine, Arrangement(strategy="resident"), WORK)
    part = memory_need(model, machine, Arrangement(strategy="tensor", tensor=8), WORK)
    assert math.isclose(part.weights_bytes * 8, whole.weights_bytes, rel_tol=1e-6)
    assert math.isclose(whole.weights_bytes, model.weights_bytes, rel_tol=1e-6)
    assert math.isclose(part.kv_cache_bytes * 8, whole.kv_cache_bytes, rel_tol=1e-6)
    assert math.isclose(whole.kv_cache_bytes, 8 * 300 * 327_680, rel_tol=1e-6)
    sixteen = memory_need(model, find_machine("2x8xa100-80"), Arrangement(strategy="tensor", tensor=16), WORK)
    assert math.isclose(sixteen.kv_cache_bytes, part.kv_cache_bytes, rel_tol=1e-6), "8 key-value heads: no further"
    streamed = Arrangement(strategy="overlap", source=Tier.HOST, slots=2, resident_share=0.5)
    need = memory_need(model, machine, streamed, WORK)
    assert math.isclose(need.weights_bytes + need.host_bytes, model.weights_bytes, rel_tol=0.01)
    assert need.slots_bytes > 2 * 1.5e9


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
        ("llama-3.1-70b@fp8", "h200", "resident", 15, 27),
        ("llama-3-8b", "h100", "resident", 5, 9),
        ("llama-3.1-405b@fp8", "8xh200", "tensor", 14, 40),
        ("mixtral-8x7b", "2xa100-80", "tensor", 5, 16),
        ("llama-3-8b@q4_k_m", "rtx-4090", "resident", 4, 11),
    ):
        work = Workload(sequences=1, prompt_tokens=100, generate_tokens=100)
        question = Question(model=find_model(model), machine=find_machine(place), work=work)
        item = compare(question, only=strategy)[strategy]
        assert isinstance(item, Answer), (model, place)
        assert low_ms < item.decode_s_per_pass.expected * 1e3 < high_ms, (model, item.decode_s_per_pass)


def known_prefill() -> None:
    """Two operations per parameter and token at 50 to 100 % of the matrix rate: 8,000 tokens of 8B on an H100."""
    work = Workload(sequences=1, prompt_tokens=8000, generate_tokens=2)
    question = Question(model=find_model("llama-3-8b"), machine=find_machine("h100"), work=work)
    seconds = evaluate(question, Arrangement(strategy="resident")).prefill_s.expected
    least_s = 2 * 7.5e9 * 8000 / 989e12
    assert least_s * 1.2 < seconds < least_s * 2.5


def known_streaming() -> None:
    """GPT-3's size over PCI Express 3: half a minute per token; break-even near 10,000 tokens for 16-bit weights."""
    machine = find_machine("1xv100-32@dgx-2")
    work = Workload(sequences=64, prompt_tokens=4, generate_tokens=10)
    question = Question(model=find_model("opt-175b"), machine=machine, work=work)
    item = compare(question, only="overlap")["overlap"]
    assert isinstance(item, Answer)
    assert 25 < item.decode_s_per_pass.expected < 36
    report = break_even_report(question)
    assert report is not None
    assert 4_000 < report.tokens_per_pass.expected < 11_000
    mixture = Question(model=find_model("mixtral-8x7b"), machine=machine, work=work)
    mixed = break_even_report(mixture)
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
    question = Question(model=find_model("llama-3-8b"), machine=find_machine("h100"), work=WORK)
    item = evaluate(question, Arrangement(strategy="resident"))
    found = price(question.machine, item, WORK).usd_per_million_tokens
    rent = question.machine.processor.rent_usd_per_h
    assert found is not None
    assert rent is not None
    assert math.isclose(found.expected, rent.expected / 3600 * item.total_s.expected / 800 * 1e6, rel_tol=1e-9)


def loads_are_hidden_or_added() -> None:
    """70B on one device from host and disk: in sequence the sum of all, overlapped the longest, at the links' rates."""
    model, machine = find_model("llama-3.1-70b"), find_machine("rtx-4090")
    layers_bytes = sum(group.count * group.layer.size_bytes for group in model.groups)
    share = PRESENT.link_share.expected
    link_s = layers_bytes / (machine.links["host"].bytes_per_s.expected * share)
    for source in (Tier.HOST, Tier.DISK):
        disk_s = layers_bytes / (machine.require_disk().bytes_per_s.expected * share) * (source is Tier.DISK)
        for sequences in (1, 16384):
            work = Workload(sequences=sequences, prompt_tokens=64, generate_tokens=8)
            question = Question(model=model, machine=machine, work=work)
            stay = evaluate(question, Arrangement(strategy="resident")).decode.device_s
            way = Arrangement(strategy="overlap", source=source, slots=2, resident_share=0.0)
            hidden = evaluate(question, way).decode.total_s
            added = evaluate(question, replace(way, strategy="sequential", overlap=False)).decode.total_s
            assert math.isclose(hidden, max(stay, link_s, disk_s), rel_tol=0.01)
            first = evaluate(question, way).prefill
            ends_s = first.total_s - max(first.device_s, first.link_s, first.disk_s)
            layer_s = (first.device_s + first.link_s + first.disk_s) / model.num_layers
            assert 0 < ends_s < layer_s * 1.5, "the first layer's loading, or the last one's computing and the head"
            if first.device_s > first.link_s + first.disk_s:
                assert math.isclose(ends_s, (first.link_s + first.disk_s) / model.num_layers, rel_tol=1e-6)
            assert math.isclose(added, stay + link_s + disk_s, rel_tol=0.01)


def what_travels_besides_weights_is_counted() -> None:
    """Missed experts over the host link; a cache that the host keeps; what sharded devices gather from one another."""
    machine = find_machine("8xa100-80")
    link = machine.links["host"].bytes_per_s.expected * PRESENT.link_share.expected
    mixture = find_model("mixtral-8x7b")
    question = Question(model=mixture, machine=machine, work=Workload())
    missed = evaluate(question, Arrangement(strategy="experts", source=Tier.HOST, expert_hit_rate=0.5)).decode
    used_bytes = sum(group.count * 2 * group.layer.expert_bytes for group in mixture.groups)
    assert math.isclose(missed.cold_s, used_bytes / 2 / link, rel_tol=0.01), "2 experts a layer, every other one missed"
    model = find_model("llama-3.1-70b")
    work = Workload(sequences=8, prompt_tokens=4000, generate_tokens=2)
    question = Question(model=model, machine=machine, work=work)
    away = evaluate(question, Arrangement(strategy="resident", kv_tier=Tier.HOST)).decode
    assert math.isclose(away.link_s, 8 * 4001 * 327_680 / link, rel_tol=0.01)
    way = Arrangement(strategy="sharded", source=Tier.HOST, slots=2, resident_share=0.0, replicas=8, sharded=True)
    layers_bytes = sum(group.count * group.layer.size_bytes for group in model.groups)
    pulled_s = layers_bytes / 8 / (machine.rate("host", sharers=8).expected * PRESENT.link_share.expected)
    gathered_s = layers_bytes * 7 / 8 / machine.links["scale_up"].bytes_per_s.expected
    assert math.isclose(evaluate(question, way).decode.link_s, pulled_s + gathered_s, rel_tol=0.02)


def a_window_keeps_no_more_than_its_tokens() -> None:
    """gpt-oss: 36 layers of 8 key-value heads of 64, every other one with a window of 128 tokens."""
    per_layer = 2 * 8 * 64 * 2
    found = find_model("gpt-oss-120b").kv_cache_bytes(sequences=3, context_tokens=10_000)
    assert found == 3 * per_layer * (18 * 128 + 18 * 10_000)


def _best(model: Model, machine: Machine) -> float:
    best = fastest(compare(Question(model=model, machine=machine, work=WORK)))
    assert best is not None
    return best.total_s.expected


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
    faster_parts_are_never_slower,
)
