"""Claims about time per token: streaming, overlap, pipelines, split widths, and size itself."""

from __future__ import annotations

from dataclasses import replace

from headrace.economics.claims.facts import (
    DEVICES,
    closed_form,
    larger_fact,
    machine,
    machine_fact,
    memory_name,
    memory_rate,
    memory_rate_name,
    model,
    model_fact,
)
from headrace.economics.claims.ledger import Default, Ledger, Outcome, checks
from headrace.model.model import Layer, LayerGroup, Model
from headrace.planning.plan import Parallelism, arranged
from headrace.planning.workload import PassTokens
from headrace.units import format_bytes, format_count, format_number, format_seconds

_FLOORS = ("V100-32", "A100-80", "H100", "B200", "GB300")
_STREAMER = "v100-32"
_PARALLEL = "8xa100-80"


ASSUMPTIONS: dict[str, Default] = {
    "gpt3_kv_bytes_per_token": model_fact("gpt-3", "kv_bytes_per_token"),
    "gpt3_layers": model_fact("gpt-3", "num_layers"),
    "larger_layers": larger_fact("num_layers"),
    "break_even_flops": machine_fact(
        _STREAMER, "peak 16-bit arithmetic", lambda found: max(rate.expected for rate in found.processor.flops.values())
    ),
    **{memory_rate_name(device): memory_rate(DEVICES[device]) for device in _FLOORS},
}


@checks("streaming-latency")
def _streaming(given: Ledger) -> Outcome:
    gpt3, place = model("gpt-3"), machine(_STREAMER)
    arrangement = arranged(gpt3.num_layers, resident=0)
    form, carried = closed_form(place, arrangement, gpt3), _carried(given, "latency_batch")
    weights = given("gpt3_weights_bytes")
    factor = weights / gpt3.weights_bytes

    def token_s(link: float) -> float:
        linked = replace(form.rates, link_bytes_per_s=link / factor)
        return form._replace(rates=linked).one_pass(carried).total_s

    one, four = token_s(given("stream_bytes_per_s")), token_s(given("stream_4_bytes_per_s"))
    floor = given(memory_name("V100-32")) / given(memory_rate_name("V100-32"))
    roomy = closed_form(place, arranged(gpt3.num_layers), gpt3).one_pass(carried).total_s
    return Outcome(
        f"{'holds' if one > 10 * roomy else 'false'}: {one / roomy:.3g} times that of weights that stay",
        f"{format_bytes(weights)} / {given('stream_bytes_per_s') / 1e9:g} GB/s: {one:.3g} s per token on one V100; "
        "over "
        f"{given('stream_4_bytes_per_s') / 1e9:g} GB/s {four:.3g} s on four. Were there room, one would take "
        f"{format_seconds(roomy)}; spread over as many devices as hold it, it is read in {format_seconds(floor)}",
        {"s_per_token_1": one, "s_per_token_4": four, "resident_s": roomy, "resident_floor_s": floor},
    )


@checks("overlap")
def _overlap(given: Ledger) -> Outcome:
    link, flops = given("break_even_link_bytes_per_s"), given("break_even_flops")
    tokens = flops * given("weight_element_bytes") / 2 / link
    context = given("break_even_context_tokens")
    cache = tokens * context * given("gpt3_kv_bytes_per_token")
    prompts = tokens / context
    reached = cache <= given("reachable_kv_bytes")
    where = "in decoding and prefill" if reached else "in prefill; a batch of decoding sequences has no room"
    return Outcome(
        f"holds from {format_count(tokens)} tokens per pass on: {where}",
        f"arithmetic / link = {format_number(flops)} x {given('weight_element_bytes'):g} / 2 / {link / 1e9:g} GB/s = "
        f"{format_count(tokens)} tokens per pass. As many sequences of {format_count(context)} tokens: "
        f"{format_bytes(cache)} of cache, {cache / given('gpt3_weights_bytes'):.3g} times the weights; or "
        f"{prompts:.2g} prompts of that length at once. Below that, prefetching was measured to gain nothing from host "
        "memory at batches of 64 to 256, and "
        f"{given('prefetch_gain_disk'):.0%} from NVMe",
        {"tokens_per_pass": tokens, "kv_cache_bytes": cache, "kv_over_weights": cache / given("gpt3_weights_bytes")},
    )


@checks("pipeline-latency")
def _pipeline(given: Ledger) -> Outcome:
    stages = max(1, round(given("pipeline_devices")))
    one = _decode_s(given, Parallelism())
    many = _decode_s(given, Parallelism(pipeline=stages))
    return Outcome(
        "holds" if many >= 0.99 * one else f"false: {one / many:.3g} times faster",
        f"GPT-3 at batch {given('latency_batch'):g}: {format_seconds(one)} per token on one device (had it the room), "
        f"{format_seconds(many)} on a pipeline of {stages}: each token still passes every layer, and {stages} hops",
        {"one_device_s": one, "pipeline_s": many},
    )


@checks("width-exchange")
def _width(given: Ledger) -> Outcome:
    devices, growth = max(2, round(given("width_devices"))), given("width_growth")
    gpt3, wide = model("gpt-3"), _widened(model("gpt-3"), growth)
    few = _exchange_share(given, gpt3, 2)
    many = _exchange_share(given, gpt3, devices)
    wider = _exchange_share(given, wide, devices)
    by_devices, by_width = many > few, wider > many
    slower = given("eight_small_computers_s") / given("four_small_computers_s")
    verdict = "holds" if by_devices and by_width else "half right" if by_devices or by_width else "false"
    if verdict == "half right":
        part = "fewer neurons per device" if by_devices else "width"
        other = "width" if by_devices else "fewer neurons per device"
        verdict += f": its share grows with {part} and falls with {other}"
    return Outcome(
        verdict,
        f"seconds of exchange per second of a layer's products: {few:.3g} on 2 devices, {many:.3g} on {devices}; with "
        f"{growth:g} times the width {wider:.3g}. Volume grows with width, a device's products with its square over "
        "the devices. What limits in practice is the time of each exchange, not its volume: eight small computers take "
        f"{slower:.3g} times as long as four, eight H200 are {given('width_8_speedup'):g} times as fast as one",
        {"share_2_devices": few, "share_many_devices": many, "share_wider": wider, "eight_over_four": slower},
    )


@checks("larger-is-slower")
def _larger(given: Ledger) -> Outcome:
    floors = {device: given(memory_name(device)) / given(memory_rate_name(device)) for device in _FLOORS}
    layers, more = given("gpt3_layers"), given("larger_layers")
    low, high = given("layer_overhead_low_s"), given("layer_overhead_high_s")
    floor = floors["H100"]
    growths = [(floor + more * each) / (floor + layers * each) for each in (low, high)]
    parameters = given("growth")
    mild = max(growths) < parameters / 10
    verdict = "false" if max(growths) <= 1 else "holds, mildly" if mild else "holds"
    slower = f"{min(growths):.3g} to {max(growths):.3g} times the latency"
    return Outcome(
        f"{verdict}: {slower} for {format_number(parameters)} times the parameters",
        "reading a full memory once: "
        + ", ".join(f"{device} {format_seconds(seconds)}" for device, seconds in floors.items())
        + ", however many devices hold the model; what grows is layers x overhead: "
        + f"{layers:,.0f} x {low * 1e6:g} to {high * 1e6:g} us = {format_seconds(layers * low)} to "
        + f"{format_seconds(layers * high)}, and {more:,.0f} x the same = {format_seconds(more * low)} to "
        + format_seconds(more * high),
        {
            **{f"floor_s {device}": seconds for device, seconds in floors.items()},
            "overhead_low_s": layers * low,
            "overhead_high_s": layers * high,
            "overhead_1000x_low_s": more * low,
            "overhead_1000x_high_s": more * high,
        },
    )


def _carried(given: Ledger, batch: str) -> PassTokens:
    return PassTokens(sequences=given(batch), new_tokens=1, context_tokens=given("latency_context_tokens"))


def _decode_s(given: Ledger, parallelism: Parallelism) -> float:
    gpt3 = model("gpt-3")
    form = closed_form(machine(_PARALLEL), arranged(gpt3.num_layers, parallelism=parallelism), gpt3)
    return form.one_pass(_carried(given, "latency_batch")).total_s


def _exchange_share(given: Ledger, model: Model, devices: int) -> float:
    """Exchange over products, per pass."""
    split = arranged(model.num_layers, parallelism=Parallelism(tensor=devices))
    parts = closed_form(machine(_PARALLEL), split, model).one_pass(_carried(given, "width_batch")).parts
    return parts["communication"] / (parts["arithmetic"] + parts["device memory"])


def _widened(model: Model, times: float) -> Model:
    """The same depth, `times` the hidden size: matrices grow with the square."""

    def wide(layer: Layer) -> Layer:
        return replace(
            layer,
            attention_parameters=round(layer.attention_parameters * times**2),
            attention_bytes=layer.attention_bytes * times**2,
            feed_forward_parameters=round(layer.feed_forward_parameters * times**2),
            feed_forward_bytes=layer.feed_forward_bytes * times**2,
        )

    return replace(
        model,
        hidden_size=round(model.hidden_size * times),
        head_parameters=round(model.head_parameters * times),
        head_bytes=model.head_bytes * times,
        groups=tuple(LayerGroup(layer=wide(group.layer), count=group.count) for group in model.groups),
    )
