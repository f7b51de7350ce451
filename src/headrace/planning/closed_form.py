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
from collections.abc import Callable, Mapping
from typing import NamedTuple

from headrace.machine.machine import Machine, Tier
from headrace.model.model import Layer, Model
from headrace.planning import collectives
from headrace.planning.described_rates import quantities, rates_of
from headrace.planning.memory import cache_parts
from headrace.planning.plan import Arrangement
from headrace.planning.rates import Rates
from headrace.planning.scenario import Scenario
from headrace.planning.workload import PassTokens, Speculation, Workload

_MOST_TOKENS = 2.0**40
_RESOURCES = (
    "arithmetic",
    "device memory",
    "attention",
    "communication",
    "overhead",
    "cpu",
    "link",
    "disk",
    "experts on demand",
)
_LOADS = ("link", "disk")


class _LayerSeconds(NamedTuple):
    """What one device spends on one layer in a pass; seconds. The sum is its time when the weights are there."""

    arithmetic_s: float
    """matrix products, where arithmetic takes longer than reading the weights"""
    memory_s: float
    """matrix products, where reading the weights takes longer"""
    attention_s: float
    communication_s: float
    overhead_s: float


class PassCost(NamedTuple):
    """What one pass takes in all, and what each resource is busy for; seconds."""

    total_s: float
    busy_s: float
    """what computing takes on the device and the CPU, with what nothing hides"""
    parts: Mapping[str, float]
    """by resource: `arithmetic` and `device memory` are products that the one or the other binds, per device;
    `experts on demand` are loads that nothing hides"""

    @property
    def load_s(self) -> float:
        """What the busier of link and disk takes."""
        return max(self.parts["link"], self.parts["disk"])

    def binds(self, *, overlap: bool) -> str:
        """Name what the pass waits for most."""
        loads_longer = self.load_s > self.busy_s
        names = [name for name in self.parts if not overlap or (name in _LOADS) is loads_longer]
        return max(names, key=self.parts.__getitem__)


class WorkCost(NamedTuple):
    """A whole workload: first pass, a mean later pass, everything; seconds. Tokens per second count all replicas."""

    prefill_s: float
    decode_s_per_pass: float
    total_s: float
    tokens_per_s: float
    prefill: PassCost
    decode: PassCost


class ClosedForm(NamedTuple):
    """A model arranged on a machine that reaches these rates: the seconds of its passes."""

    model: Model
    machine: Machine
    arrangement: Arrangement
    rates: Rates

    @classmethod
    def of(cls, scenario: Scenario, arrangement: Arrangement, values: Mapping[str, float] | None = None) -> ClosedForm:
        """Of an arrangement on a described machine, at the expected values of its constants or at these."""
        if values is None:
            values = {name: constant.expected for name, constant in quantities(scenario, arrangement).items()}
        return cls(scenario.model, scenario.described_machine, arrangement, rates_of(values))

    def layer_seconds(self, layer: Layer, carried: PassTokens) -> _LayerSeconds:
        """Time of one layer whose weights are on the device (each of `tensor` devices has its part)."""
        width, rates = self.arrangement.parallelism.tensor, self.rates
        arithmetic_s = 2.0 * layer.active_parameters * carried.tokens / width / rates.peaks.flops
        reading_s = layer.bytes_read(carried.tokens) / width / rates.peaks.memory_bytes_per_s
        scores_s = self._attention_flops(layer, carried) / width / rates.peaks.attention_flops
        # Wherever keys and values wait, attention reads them in the device's memory.
        cache_s = self._cache_bytes(layer, carried) / cache_parts(layer, width) / rates.peaks.cache_bytes_per_s
        communication_s, overhead_s = 0.0, rates.block_overhead_s
        if width > 1:
            communication_s = 2.0 * self.exchange_s(self._activation_bytes(carried))
            overhead_s += rates.exchange.split_overhead_s
        if width > self.machine.devices:
            overhead_s += rates.exchange.across_overhead_s
        return _LayerSeconds(
            arithmetic_s if arithmetic_s > reading_s else 0.0,
            0.0 if arithmetic_s > reading_s else reading_s,
            max(scores_s, cache_s),
            communication_s,
            overhead_s,
        )

    def exchange_s(self, size_bytes: float) -> float:
        """Add up partial results of `size_bytes` over the devices of one copy: one of two exchanges per layer."""
        width, exchange = self.arrangement.parallelism.tensor, self.rates.exchange
        if self.arrangement.parallelism.two_dimensional:
            # Pope et al., 2D weight-stationary: 8 x tokens x width / (sqrt(n) x rate) per half layer (section 4)
            side = math.sqrt(width)
            return 4.0 * side * exchange.peer.latency_s + 8.0 * size_bytes / side / exchange.peer.bytes_per_s / 2.0
        return collectives.hierarchical_all_reduce(
            size_bytes,
            min(width, self.machine.devices),
            -(-width // self.machine.devices),
            within=exchange.peer,
            between=exchange.network,  # each device sends its part over a port of its own
            excess_share=exchange.excess,
        )

    def one_pass(self, carried: PassTokens, *, first: bool = False) -> PassCost:
        """Seconds of one pass of one copy; `carried` is what that copy works on. `first`: nothing is loaded yet.

        With a pipeline `carried` is one micro-batch, and the result is what all stages together spend on it.
        """
        arrangement, rates, divided = self.arrangement, self.rates, self.arrangement.parallelism
        on_cpu = arrangement.cpu_share
        spent, host_s, link_s, disk_s, cold_s = [0.0] * len(_LayerSeconds._fields), 0.0, 0.0, 0.0, 0.0
        for group in self.model.groups:
            layer, count = group.layer, group.count
            on_device = count * (1.0 - on_cpu)
            own = self.layer_seconds(layer, carried)
            spent = [before + on_device * seconds for before, seconds in zip(spent, own, strict=True)]
            host_s += count * on_cpu * self.host_layer_s(layer, carried)
            over_link_s, from_disk_s, on_demand_s = self.load_seconds(layer, carried)
            link_s += count * over_link_s
            disk_s += count * from_disk_s
            cold_s += count * on_demand_s
        compute_s, memory_s, attention_s, communication_s, overhead_s = spent
        memory_s += self._head_s(carried)
        overhead_s += rates.pass_overhead_s + carried.sequences * rates.token_overhead_s
        if divided.pipeline > 1:
            communication_s += divided.pipeline * self.hop_s(carried)
        busy_s = compute_s + memory_s + attention_s + communication_s + overhead_s + host_s + cold_s
        load_s = max(link_s, disk_s)
        if not rates.overlaps_hops:
            # One after the other for each device; while one copies, others have the disk to themselves.
            load_s = max(disk_s, link_s + disk_s / (divided.replicas if divided.sharded else 1))
        if not arrangement.overlap:
            total_s = busy_s + link_s + disk_s
        elif not rates.overlaps_copies:
            total_s = busy_s + load_s
        elif first and arrangement.streamed_share > 0:
            total_s = self._first_pass_s(busy_s, link_s + disk_s, load_s, ends_s=self.ends_s(carried))
        else:
            total_s = max(busy_s, load_s)
        parts = (compute_s, memory_s, attention_s, communication_s, overhead_s, host_s, link_s, disk_s, cold_s)
        return PassCost(total_s, busy_s, dict(zip(_RESOURCES, parts, strict=True)))

    def _first_pass_s(self, device_s: float, hops_s: float, load_s: float, *, ends_s: float) -> float:
        """Seconds of a pass that finds nothing loaded, the layers that travel spread evenly.

        Computing waits for the first of them to pass every hop, as far as the layers that stay before it do not cover
        that. Where loading is longer, its other hop comes before it, and its last layer and the head come after it.
        """
        layers = self.model.num_layers
        travelling = max(1.0, layers * self.arrangement.streamed_share)
        per_layer_s = (device_s - ends_s) / layers
        before_s = (layers / travelling - 1.0) * per_layer_s
        waiting_s = max(0.0, hops_s / travelling - before_s)
        other_hop_s = max(0.0, hops_s - load_s) / travelling
        return max(device_s + waiting_s, load_s + other_hop_s + per_layer_s + ends_s)

    def _head_s(self, carried: PassTokens) -> float:
        """Seconds of the output projection, of one position of each sequence."""
        model, peaks, width = self.model, self.rates.peaks, self.arrangement.parallelism.tensor
        return max(
            2.0 * model.head_parameters * carried.sequences / width / peaks.flops,
            model.head_bytes / width / peaks.memory_bytes_per_s,
        )

    def ends_s(self, carried: PassTokens) -> float:
        """Seconds of a pass beside its layers: head, sampling, scheduling."""
        fixed_s = self.rates.pass_overhead_s + carried.sequences * self.rates.token_overhead_s
        return self._head_s(carried) + fixed_s

    def hop_s(self, carried: PassTokens) -> float:
        """One handing over of activations from a pipeline stage to the next."""
        across = self.arrangement.parallelism.devices_per_copy > self.machine.devices
        wire = self.rates.exchange.network if across else self.rates.exchange.peer
        return wire.message_s(self._activation_bytes(carried))

    def host_layer_s(self, layer: Layer, carried: PassTokens) -> float:
        """Time of one layer computed by the host's processor from its own memory."""
        peaks = self.rates.peaks
        if peaks.cpu_flops <= 0:
            return 0.0
        operations = 2.0 * layer.active_parameters * carried.tokens + self._attention_flops(layer, carried)
        read_bytes = layer.bytes_read(carried.tokens) + self._cache_bytes(layer, carried)
        return max(operations / peaks.cpu_flops, read_bytes / peaks.cpu_memory_bytes_per_s)

    def load_seconds(self, layer: Layer, carried: PassTokens) -> tuple[float, float, float]:
        """Seconds that a layer occupies the host link and the disk per pass, and those of experts fetched on demand.

        Averaged over the layers, of which only `streamed_share` travel. Each device of a split width pulls its own
        part; sharded replicas pull a part each and gather the others'.
        """
        arrangement, rates, divided = self.arrangement, self.rates, self.arrangement.parallelism
        share = arrangement.streamed_share
        parts = divided.replicas if divided.sharded else divided.tensor
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
            cache_bytes = on_device * self._cache_bytes(layer, carried) / cache_parts(layer, divided.tensor)
        link_s = (link_bytes / parts + cache_bytes) / rates.link_bytes_per_s
        if divided.sharded and parts > 1:
            link_s += self.gather_s(link_bytes)
        if share > 0:
            link_s += rates.copy_latency_s * share
        from_disk = arrangement.source is Tier.DISK
        disk_s = link_bytes / rates.read_bytes_per_s if from_disk else 0.0
        cold_s = cold_bytes / parts / rates.link_bytes_per_s
        if from_disk:
            cold_s += cold_bytes / rates.read_bytes_per_s
        return link_s, disk_s, cold_s

    def gather_s(self, size_bytes: float) -> float:
        """Seconds in which sharded devices gather one another's parts of a layer."""
        return collectives.ring_all_gather(size_bytes, self.arrangement.parallelism.replicas, self.rates.exchange.peer)

    def passes_of(self, work: Workload, drafts: int = 0) -> tuple[int, PassTokens, PassTokens]:
        """Micro-batches of a copy's part of the sequences, and what one carries in the first and a mean later pass."""
        sequences = math.ceil(work.sequences / self.arrangement.parallelism.replicas)
        batches = min(self.arrangement.parallelism.micro_batches, sequences)
        each = sequences / batches
        first = PassTokens(sequences=each, new_tokens=work.prompt_tokens, context_tokens=work.prompt_tokens)
        context_tokens = mean_context_tokens(work) + drafts
        return batches, first, PassTokens(sequences=each, new_tokens=1 + drafts, context_tokens=context_tokens)

    def work(self, work: Workload, speculation: Speculation | None = None) -> WorkCost:
        """Prefill all prompts in one pass each, then decode; `work.sequences` are divided among the replicas."""
        batches, first, later = self.passes_of(work, 0 if speculation is None else speculation.draft_tokens)
        prefill, decode = self.one_pass(first, first=True), self.one_pass(later)
        prefill_s, decode_s = prefill.total_s, decode.total_s
        if self.arrangement.parallelism.pipeline > 1 and batches > 1:
            # The first micro-batch passes all stages, the others follow at the pace of the slowest.
            prefill_s += (batches - 1) * self._slowest_stage_s(first, prefill_s)
            # A micro-batch's next token waits for its own last one, and each stage for all micro-batches.
            decode_s = max(decode_s, batches * self._slowest_stage_s(later, decode_s))
        tokens_per_pass = 1.0
        if speculation is not None:
            plain = PassTokens(sequences=later.sequences, new_tokens=1, context_tokens=later.context_tokens)
            decode_s += self.one_pass(plain).total_s * speculation.draft_s_share
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

    def _slowest_stage_s(self, carried: PassTokens, total_s: float) -> float:
        """Seconds of the stage that holds most layers and the head, of a pass that takes `total_s` through all."""
        stages, layers, ends_s = self.arrangement.parallelism.pipeline, self.model.num_layers, self.ends_s(carried)
        per_layer_s = (total_s - ends_s - stages * self.hop_s(carried)) / layers
        most_layers = math.ceil(layers / stages)
        left = layers - (stages - 1) * most_layers
        return max(most_layers * per_layer_s, left * per_layer_s + ends_s)

    def tokens_s(self, tokens: float, work: Workload) -> float:
        """Seconds of a pass over so many tokens, each of a sequence of its own with this work's context before it."""
        context_tokens = 1 if self.arrangement.cache_on_host else mean_context_tokens(work)
        return self.one_pass(PassTokens(sequences=tokens, new_tokens=1, context_tokens=context_tokens)).total_s

    def even_tokens(self, work: Workload, *, checked: int = 1) -> float:
        """Tokens of all copies' decode pass at which computing takes as long as loading: below it a pass waits.

        `checked` of them are each sequence's: its own and its drafts.
        """
        replicas = self.arrangement.parallelism.replicas
        context_tokens = mean_context_tokens(work) + checked - 1

        def computes_longer(tokens: float) -> bool:
            sequences = tokens / checked
            if replicas > 1:
                sequences = math.ceil(sequences / replicas)
            cost = self.one_pass(PassTokens(sequences=sequences, new_tokens=checked, context_tokens=context_tokens))
            return cost.busy_s >= cost.load_s

        return least_tokens(computes_longer, near=work.sequences * checked)

    def _activation_bytes(self, carried: PassTokens) -> float:
        return carried.tokens * self.model.hidden_size * self.model.activation_bytes

    def _attention_flops(self, layer: Layer, carried: PassTokens) -> float:
        return carried.sequences * layer.attention_flops(
            new_tokens=carried.new_tokens, context_tokens=carried.context_tokens
        )

    def _cache_bytes(self, layer: Layer, carried: PassTokens) -> float:
        """Bytes of keys and values that attention reads in this layer in a pass: each sequence's cache once."""
        kept = layer.cached_tokens(carried.context_tokens) * layer.kv_elements_per_token
        return carried.sequences * kept * self.model.kv_element_bytes


def mean_context_tokens(work: Workload) -> float:
    """Positions that a decode pass sees on the average."""
    return work.prompt_tokens + max(1.0, work.generate_tokens / 2)


def least_tokens(holds_from: Callable[[float], bool], *, near: float = 1.0, tolerance: float = 1e-9) -> float:
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
    while high - low > tolerance * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds_from(middle) else (middle, high)
    return high
