"""Closed forms: seconds of a pass for every arrangement, by what they are spent on (docs/formulas.md).

Each form agrees with the simulation of the same arrangement (`headrace.planning.simulation`) to the tolerance that
its test states. A pass of T tokens over a layer takes

    max(2 x active parameters x T / flops, weight bytes / memory rate)      the matrix products
  + max(attention operations / flops, cache bytes / memory rate)            attention
  + overhead

and a layer that does not stay takes its bytes over each link besides: added to the above in sequence, hidden behind it
with overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from headrace.machine.machine import Machine, Tier
from headrace.model.model import Layer, Model
from headrace.planning import collectives
from headrace.planning.memory import cache_parts
from headrace.planning.plan import Arrangement
from headrace.planning.rates import Rates
from headrace.planning.workload import PassTokens, Speculation, Workload

_MOST_TOKENS = 2.0**40


class LayerSeconds(NamedTuple):
    """What one device spends on one layer in a pass; seconds. The sum is its time when the weights are there."""

    product_s: float
    """matrix products: arithmetic or reading the weights, whichever takes longer"""
    product_is_arithmetic: bool
    attention_s: float
    communication_s: float
    overhead_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.product_s + self.attention_s + self.communication_s + self.overhead_s


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Seconds of one pass: what each resource is busy for, and what the pass takes in all."""

    total_s: float
    compute_s: float
    """arithmetic-bound products, per device"""
    memory_s: float
    """products bound by reading the weights, per device"""
    attention_s: float
    communication_s: float
    overhead_s: float
    host_compute_s: float = 0.0
    link_s: float = 0.0
    disk_s: float = 0.0
    cold_s: float = 0.0
    """on-demand loads that nothing hides"""

    @property
    def device_s(self) -> float:
        """What the device is busy for."""
        return self.compute_s + self.memory_s + self.attention_s + self.communication_s + self.overhead_s

    @property
    def busy_s(self) -> float:
        """What computing takes on the device and the CPU, with what nothing hides."""
        return self.device_s + self.host_compute_s + self.cold_s

    def parts(self) -> dict[str, float]:
        """Seconds by resource, for reports."""
        return {
            "arithmetic": self.compute_s,
            "device memory": self.memory_s,
            "attention": self.attention_s,
            "communication": self.communication_s,
            "overhead": self.overhead_s,
            "cpu": self.host_compute_s,
            "link": self.link_s,
            "disk": self.disk_s,
            "experts on demand": self.cold_s,
        }

    def binds(self, *, overlap: bool) -> str:
        """Name what the pass waits for most."""
        parts = self.parts()
        if overlap and max(self.link_s, self.disk_s) <= self.busy_s:
            parts.pop("link")
            parts.pop("disk")
        elif overlap:
            parts = {"link": self.link_s, "disk": self.disk_s}
        return max(parts, key=lambda name: parts[name])


def layer_seconds(
    layer: Layer,
    model: Model,
    carried: PassTokens,
    *,
    rates: Rates,
    arrangement: Arrangement,
    machine: Machine,
) -> LayerSeconds:
    """Time of one layer whose weights are on the device (each of `tensor` devices has its part)."""
    width = arrangement.parallelism.tensor
    arithmetic_s = 2.0 * layer.active_parameters * carried.tokens / width / rates.peaks.flops
    reading_s = layer.bytes_read(carried.tokens) / width / rates.peaks.memory_bytes_per_s
    scores_s = (
        carried.sequences
        * layer.attention_flops(new_tokens=carried.new_tokens, context_tokens=carried.context_tokens)
        / width
        / rates.peaks.attention_flops
    )
    # Wherever keys and values wait, attention reads them in the device's memory.
    cache_s = layer_cache_bytes(layer, model, carried) / cache_parts(layer, width) / rates.peaks.cache_bytes_per_s
    communication_s = 0.0
    if width > 1:
        communication_s = 2.0 * exchange_s(
            carried.tokens * model.hidden_size * model.activation_bytes,
            rates=rates,
            arrangement=arrangement,
            machine=machine,
        )
    overhead_s = rates.block_overhead_s + (rates.exchange.split_overhead_s if width > 1 else 0.0)
    if width > machine.devices:
        overhead_s += rates.exchange.across_overhead_s
    return LayerSeconds(
        max(arithmetic_s, reading_s),
        arithmetic_s > reading_s,
        max(scores_s, cache_s),
        communication_s,
        overhead_s,
    )


def layer_cache_bytes(layer: Layer, model: Model, carried: PassTokens) -> float:
    """Bytes of keys and values that attention reads in this layer in a pass: each sequence's cache once."""
    return (
        carried.sequences
        * layer.cached_tokens(carried.context_tokens)
        * layer.kv_elements_per_token
        * (model.kv_element_bytes)
    )


def exchange_s(size_bytes: float, *, rates: Rates, arrangement: Arrangement, machine: Machine) -> float:
    """Add up partial results of `size_bytes` over the devices of one copy's width: one of two exchanges per layer."""
    width = arrangement.parallelism.tensor
    if arrangement.parallelism.two_dimensional:
        # Pope et al., 2D weight-stationary: 8 x tokens x width / (sqrt(n) x rate) per half layer (section 4)
        side = math.sqrt(width)
        return (
            4.0 * side * rates.exchange.peer_latency_s + 8.0 * size_bytes / side / rates.exchange.peer_bytes_per_s / 2.0
        )
    within = min(width, machine.devices)
    return collectives.hierarchical_all_reduce(
        size_bytes,
        devices_per_node=within,
        nodes=-(-width // machine.devices),
        scale_up_bytes_per_s=rates.exchange.peer_bytes_per_s,
        scale_up_latency_s=rates.exchange.peer_latency_s,
        network_bytes_per_s=rates.exchange.network_bytes_per_s,  # each device sends its part over a port of its own
        network_latency_s=rates.exchange.network_latency_s,
        excess_share=rates.exchange.excess,
    )


def pass_cost(
    model: Model,
    machine: Machine,
    arrangement: Arrangement,
    carried: PassTokens,
    rates: Rates,
    *,
    first: bool = False,
) -> PassCost:
    """Seconds of one pass of one copy; `carried` is what that copy works on. `first`: nothing is loaded yet.

    With a pipeline `carried` is one micro-batch, and the result is what all stages together spend on it.
    """
    layers, divided = model.num_layers, arrangement.parallelism
    device_share = 1.0 - arrangement.cpu_share
    compute_s = memory_s = attention_s = communication_s = overhead_s = host_s = link_s = disk_s = cold_s = 0.0
    for group in model.groups:
        seconds = layer_seconds(group.layer, model, carried, rates=rates, arrangement=arrangement, machine=machine)
        on_device = group.count * device_share
        if seconds.product_is_arithmetic:
            compute_s += on_device * seconds.product_s
        else:
            memory_s += on_device * seconds.product_s
        attention_s += on_device * seconds.attention_s
        communication_s += on_device * seconds.communication_s
        overhead_s += on_device * seconds.overhead_s
        host_s += group.count * arrangement.cpu_share * host_layer_s(group.layer, model, carried, rates)
        over_link_s, from_disk_s, on_demand_s = load_seconds(
            group.layer, model, carried, rates=rates, arrangement=arrangement
        )
        link_s += group.count * over_link_s
        disk_s += group.count * from_disk_s
        cold_s += group.count * on_demand_s
    memory_s += head_seconds(model, carried, rates, arrangement)
    overhead_s += rates.pass_overhead_s + carried.sequences * rates.token_overhead_s
    if arrangement.parallelism.pipeline > 1:
        communication_s += arrangement.parallelism.pipeline * hop_s(model, machine, arrangement, carried, rates)
    device_s = compute_s + memory_s + attention_s + communication_s + overhead_s + host_s + cold_s
    load_s = max(link_s, disk_s)
    if not rates.overlaps_hops:
        # One after the other for each device; while one copies, others have the disk to themselves.
        load_s = max(disk_s, link_s + disk_s / (divided.replicas if divided.sharded else 1))
    if not arrangement.overlap:
        total_s = device_s + link_s + disk_s
    elif not rates.overlaps_copies:
        total_s = device_s + load_s
    else:
        total_s = max(device_s, load_s)
        if first and arrangement.streamed_share > 0:
            total_s = _first_pass_s(
                device_s,
                link_s,
                disk_s,
                load_s,
                ends_s=pass_ends_s(model, carried, rates, arrangement),
                layers=layers,
                travelling=max(1.0, layers * arrangement.streamed_share),
            )
    return PassCost(
        total_s=total_s,
        compute_s=compute_s,
        memory_s=memory_s,
        attention_s=attention_s,
        communication_s=communication_s,
        overhead_s=overhead_s,
        host_compute_s=host_s,
        link_s=link_s,
        disk_s=disk_s,
        cold_s=cold_s,
    )


def _first_pass_s(
    device_s: float,
    link_s: float,
    disk_s: float,
    load_s: float,
    *,
    ends_s: float,
    layers: int,
    travelling: float,
) -> float:
    """Seconds of a pass that finds nothing loaded, `travelling` of its layers spread evenly.

    Computing waits for the first of them to pass every hop, as far as the layers that stay before it do not cover
    that. Where loading is longer, its other hop comes before it, and its last layer and the head come after it.
    """
    per_layer_s = (device_s - ends_s) / layers
    before_s = (layers / travelling - 1.0) * per_layer_s
    waiting_s = max(0.0, (link_s + disk_s) / travelling - before_s)
    other_hop_s = max(0.0, link_s + disk_s - load_s) / travelling
    return max(device_s + waiting_s, load_s + other_hop_s + per_layer_s + ends_s)


def head_seconds(model: Model, carried: PassTokens, rates: Rates, arrangement: Arrangement) -> float:
    """Seconds of the output projection, of one position of each sequence."""
    return max(
        2.0 * model.head_parameters * carried.sequences / arrangement.parallelism.tensor / rates.peaks.flops,
        model.head_bytes / arrangement.parallelism.tensor / rates.peaks.memory_bytes_per_s,
    )


def pass_ends_s(model: Model, carried: PassTokens, rates: Rates, arrangement: Arrangement) -> float:
    """Seconds of a pass beside its layers: head, sampling, scheduling."""
    fixed_s = rates.pass_overhead_s + carried.sequences * rates.token_overhead_s
    return head_seconds(model, carried, rates, arrangement) + fixed_s


def hop_s(model: Model, machine: Machine, arrangement: Arrangement, carried: PassTokens, rates: Rates) -> float:
    """One handing over of activations from a pipeline stage to the next."""
    exchange = rates.exchange
    size_bytes = carried.tokens * model.hidden_size * model.activation_bytes
    if arrangement.parallelism.devices_per_copy > machine.devices:
        return collectives.point_to_point(
            size_bytes, bytes_per_s=exchange.network_bytes_per_s, latency_s=exchange.network_latency_s
        )
    return collectives.point_to_point(
        size_bytes, bytes_per_s=exchange.peer_bytes_per_s, latency_s=exchange.peer_latency_s
    )


def host_layer_s(layer: Layer, model: Model, carried: PassTokens, rates: Rates) -> float:
    """Time of one layer computed by the host's processor from its own memory."""
    if rates.peaks.cpu_flops <= 0:
        return 0.0
    cache_bytes = layer_cache_bytes(layer, model, carried)
    operations = 2.0 * layer.active_parameters * carried.tokens
    attention = carried.sequences * layer.attention_flops(
        new_tokens=carried.new_tokens, context_tokens=carried.context_tokens
    )
    return max(
        (operations + attention) / rates.peaks.cpu_flops,
        (layer.bytes_read(carried.tokens) + cache_bytes) / rates.peaks.cpu_memory_bytes_per_s,
    )


def load_seconds(
    layer: Layer, model: Model, carried: PassTokens, *, rates: Rates, arrangement: Arrangement
) -> tuple[float, float, float]:
    """Seconds that a layer occupies the host link and the disk per pass, and those of experts fetched on demand.

    Averaged over the layers, of which only `streamed_share` travel. Each device of a split width pulls its own part;
    sharded replicas pull a part each and gather the others'.
    """
    share = arrangement.streamed_share
    parts = arrangement.parallelism.replicas if arrangement.parallelism.sharded else arrangement.parallelism.tensor
    link_bytes = layer.size_bytes * share
    cold_bytes = 0.0
    if arrangement.expert_hit_rate is not None:
        experts_bytes = layer.num_experts * layer.expert_bytes
        link_bytes = (layer.size_bytes - experts_bytes) * share
        missed = 1.0 - arrangement.expert_hit_rate
        cold_bytes = layer.experts_touched(carried.tokens) * layer.expert_bytes * missed
    cache_bytes = 0.0
    if arrangement.cache_on_host:
        # The host keeps what its own layers need where they are computed.
        on_device = 1.0 - arrangement.cpu_share
        split = cache_parts(layer, arrangement.parallelism.tensor)
        cache_bytes = on_device * layer_cache_bytes(layer, model, carried) / split
    link_s = (link_bytes / parts + cache_bytes) / rates.link_bytes_per_s
    if arrangement.parallelism.sharded and parts > 1:
        link_s += collectives.ring_all_gather(
            link_bytes, parts, bytes_per_s=rates.exchange.peer_bytes_per_s, latency_s=rates.exchange.peer_latency_s
        )
    if share > 0:
        link_s += rates.copy_latency_s * share
    from_disk = arrangement.source is Tier.DISK
    disk_s = link_bytes / rates.read_bytes_per_s if from_disk else 0.0
    cold_s = cold_bytes / parts / rates.link_bytes_per_s
    if from_disk:
        cold_s += cold_bytes / rates.read_bytes_per_s
    return link_s, disk_s, cold_s


def _slowest_stage_s(
    model: Model,
    machine: Machine,
    arrangement: Arrangement,
    carried: PassTokens,
    rates: Rates,
    total_s: float,
) -> float:
    """Seconds of the stage that holds most layers and the head, of a pass that takes `total_s` through all stages."""
    stages = arrangement.parallelism.pipeline
    ends_s = pass_ends_s(model, carried, rates, arrangement)
    layers_s = total_s - ends_s - stages * hop_s(model, machine, arrangement, carried, rates)
    most_layers = math.ceil(model.num_layers / stages)
    left = model.num_layers - (stages - 1) * most_layers
    per_layer_s = layers_s / model.num_layers
    return max(most_layers * per_layer_s, left * per_layer_s + ends_s)


def mean_context_tokens(work: Workload) -> float:
    """Positions that a decode pass sees on the average."""
    return work.prompt_tokens + max(1.0, work.generate_tokens / 2)


@dataclass(frozen=True, kw_only=True)
class WorkCost:
    """A whole workload: first pass, a mean later pass, everything; seconds. Tokens per second count all replicas."""

    prefill_s: float
    decode_s_per_pass: float
    total_s: float
    tokens_per_s: float
    prefill: PassCost
    decode: PassCost


def work_cost(
    model: Model,
    machine: Machine,
    arrangement: Arrangement,
    work: Workload,
    rates: Rates,
    *,
    speculation: Speculation | None = None,
) -> WorkCost:
    """Prefill all prompts in one pass each, then decode; `work.sequences` are divided among the replicas."""
    sequences = math.ceil(work.sequences / arrangement.parallelism.replicas)
    batches = min(arrangement.parallelism.micro_batches, sequences)
    per_batch = sequences / batches
    first = PassTokens(sequences=per_batch, new_tokens=work.prompt_tokens, context_tokens=work.prompt_tokens)
    drafts = 0 if speculation is None else speculation.draft_tokens
    later = PassTokens(sequences=per_batch, new_tokens=1 + drafts, context_tokens=mean_context_tokens(work) + drafts)
    prefill = pass_cost(model, machine, arrangement, first, rates, first=True)
    decode = pass_cost(model, machine, arrangement, later, rates)
    prefill_s, decode_s = prefill.total_s, decode.total_s
    if arrangement.parallelism.pipeline > 1 and batches > 1:
        # The first micro-batch passes all stages, the others follow at the pace of the slowest.
        prefill_s += (batches - 1) * _slowest_stage_s(model, machine, arrangement, first, rates, prefill_s)
        # A micro-batch's next token waits for its own last one, and each stage for all micro-batches.
        decode_s = max(decode_s, batches * _slowest_stage_s(model, machine, arrangement, later, rates, decode_s))
    tokens_per_pass = 1.0
    if speculation is not None:
        plain = pass_cost(
            model,
            machine,
            arrangement,
            PassTokens(sequences=per_batch, new_tokens=1, context_tokens=later.context_tokens),
            rates,
        )
        decode_s += plain.total_s * speculation.draft_s_share
        tokens_per_pass = speculation.tokens_per_pass
    passes = (work.generate_tokens - 1) / tokens_per_pass
    return WorkCost(
        prefill_s=prefill_s,
        decode_s_per_pass=decode_s,
        total_s=prefill_s + passes * decode_s,
        tokens_per_s=work.sequences * tokens_per_pass / decode_s,
        prefill=prefill,
        decode=decode,
    )


def even_tokens(
    model: Model, machine: Machine, arrangement: Arrangement, work: Workload, rates: Rates, *, checked: int = 1
) -> float:
    """Tokens of all copies' decode pass at which computing takes as long as loading: below it a pass waits for loads.

    `checked` of them are each sequence's: its own and its drafts.
    """
    replicas, context_tokens = arrangement.parallelism.replicas, mean_context_tokens(work) + checked - 1

    def computes_longer(tokens: float) -> bool:
        sequences = tokens / checked
        if replicas > 1:
            sequences = math.ceil(sequences / replicas)
        carried = PassTokens(sequences=sequences, new_tokens=checked, context_tokens=context_tokens)
        cost = pass_cost(model, machine, arrangement, carried, rates)
        return cost.busy_s >= max(cost.link_s, cost.disk_s)

    return least_tokens(computes_longer, near=work.sequences * checked)


def least_tokens(holds_from: Callable[[float], bool], *, near: float = 1.0) -> float:
    """Return the least number of tokens from which a condition holds, by bisection; 1 where it always does.

    Where it holds for a stretch only (caches that travel outweigh computing in the end), what it is at `near` decides.
    """
    if holds_from(near):
        if near == 1.0 or holds_from(1.0):
            return 1.0
        low, high = 1.0, near
    else:
        low, high = near, near * 2
    while not holds_from(high):
        low, high = high, high * 2
        if high > _MOST_TOKENS:
            return math.inf
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds_from(middle) else (middle, high)
    return high
