"""Bytes that an arrangement takes in each tier: per device, per node's host memory, per node's disk."""

from __future__ import annotations

import math
from dataclasses import dataclass

from headrace.machine.machine import Machine, Tier
from headrace.model.model import Model
from headrace.planning.arrangement import Arrangement
from headrace.planning.cost import cache_parts
from headrace.planning.workload import Workload

DEVICE_RESERVE_SHARE = 0.06
"""of a device's memory, kept by its driver, the libraries' own buffers and fragmentation"""
HOST_RESERVE_SHARE = 0.1
_PREFILL_CHUNK_TOKENS = 4096
"""longer prompts are prefilled in chunks, so the activations of no more tokens are held at once"""


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes by purpose on one device, and what a node's host memory and disk hold."""

    weights_bytes: float
    slots_bytes: float
    kv_cache_bytes: float
    work_space_bytes: float
    host_bytes: float
    disk_bytes: float

    @property
    def device_bytes(self) -> float:
        """Everything on one device."""
        return self.weights_bytes + self.slots_bytes + self.kv_cache_bytes + self.work_space_bytes

    def by_tier(self) -> dict[str, int]:
        """Whole bytes, for reports."""
        return {
            Tier.DEVICE.value: math.ceil(self.device_bytes),
            Tier.HOST.value: math.ceil(self.host_bytes),
            Tier.DISK.value: math.ceil(self.disk_bytes),
        }


def usable_bytes(machine: Machine, tier: Tier) -> float:
    """What a tier offers: memory less a reserve; a disk without a stated size holds anything."""
    if tier is Tier.DEVICE:
        return machine.processor.memory_bytes * (1 - DEVICE_RESERVE_SHARE)
    if tier is Tier.HOST:
        return 0.0 if machine.host is None else machine.host.memory_bytes * (1 - HOST_RESERVE_SHARE)
    if machine.disk is None:
        return 0.0
    return math.inf if machine.disk.size_bytes is None else machine.disk.size_bytes


def memory_need(model: Model, machine: Machine, arrangement: Arrangement, work: Workload) -> MemoryNeed:
    """Add up weights that stay, slots, cache and work space."""
    layers_bytes = sum(group.count * group.layer.size_bytes for group in model.groups)
    largest_bytes = max(group.layer.size_bytes for group in model.groups)
    ends_bytes = model.weights_bytes - layers_bytes
    table_bytes = model.embedding_bytes if not model.tied else 0.0
    width, stages = arrangement.tensor, arrangement.pipeline
    held_share = arrangement.resident_share
    held_bytes = layers_bytes * held_share
    if arrangement.expert_hit_rate is not None:
        experts_bytes = sum(g.count * g.layer.num_experts * g.layer.expert_bytes for g in model.groups)
        held_bytes = (layers_bytes - experts_bytes) * held_share + experts_bytes * arrangement.expert_hit_rate
    streams = arrangement.streamed_share > 0 or arrangement.expert_hit_rate is not None
    # Where layers travel, the input table stays where they come from: a pass needs only some of its rows.
    kept_ends = ends_bytes - (table_bytes if streams or arrangement.cpu_share else 0.0)
    whole_layers = math.ceil(model.num_layers / stages) * stages / model.num_layers
    weights = held_bytes * whole_layers / (width * stages) + kept_ends / width
    slots = arrangement.slots * largest_bytes / width if streams else 0.0

    sequences = math.ceil(work.sequences / arrangement.replicas)
    cache = _cache_bytes(model, sequences, work.context_tokens, width) / stages * (1.0 - arrangement.cpu_share)
    tokens = min(sequences * work.prompt_tokens / arrangement.micro_batches, _PREFILL_CHUNK_TOKENS)
    tokens = max(tokens, sequences / arrangement.micro_batches)
    space = tokens * (model.hidden_size * 8 + _inner_width(model) * 2 / width) * model.activation_bytes
    space += sequences / arrangement.micro_batches * model.vocab_size * 4.0 / width

    copies = max(1, min(arrangement.devices, machine.devices) // arrangement.devices_per_copy)
    away = model.weights_bytes - held_bytes - kept_ends
    host = disk = 0.0
    if arrangement.source is Tier.HOST:
        host = max(0.0, away)
    elif arrangement.source is Tier.DISK:
        disk = model.weights_bytes
        ring = arrangement.slots * largest_bytes if machine.host is not None else 0.0
        host = ring + layers_bytes * arrangement.cpu_share
    if arrangement.kv_tier is Tier.HOST:
        host += cache * width * stages * copies
        cache = 2.0 * cache / model.num_layers * stages  # two layers' worth in flight
    elif arrangement.cpu_share:
        host += model.kv_cache_bytes(sequences=sequences, context_tokens=work.context_tokens) * arrangement.cpu_share
    return MemoryNeed(
        weights_bytes=weights,
        slots_bytes=slots,
        kv_cache_bytes=cache,
        work_space_bytes=space,
        host_bytes=host,
        disk_bytes=disk,
    )


def _cache_bytes(model: Model, sequences: float, context_tokens: float, width: int) -> float:
    """Return the cache on one of `width` devices: key-value heads are not split further than they go."""
    return sum(
        group.count
        * sequences
        * group.layer.cached_tokens(context_tokens)
        * group.layer.kv_elements_per_token
        * model.kv_element_bytes
        / cache_parts(group.layer, width)
        for group in model.groups
    )


def _inner_width(model: Model) -> float:
    """Return the widest row that a layer's feed-forward holds for a token."""
    widest = 4.0 * model.hidden_size
    for group in model.groups:
        layer = group.layer
        active = layer.feed_forward_parameters + layer.experts_per_token * layer.expert_parameters
        widest = max(widest, active / max(1, model.hidden_size))
    return widest
