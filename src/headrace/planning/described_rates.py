"""Rates of a described machine, and the quantities that they come from.

`quantities` lists every uncertain constant of a machine, an engine and an arrangement by name; `rates_of` turns
one choice of values into effective rates. The interval of a prediction is found by moving each constant to its ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from headrace.dtypes import DTYPES
from headrace.errors import MachineError
from headrace.machine.machine import Machine, Tier
from headrace.machine.quantity import Quantity
from headrace.model.formats import known_format
from headrace.planning.collectives import Wire
from headrace.planning.plan import Arrangement
from headrace.planning.rates import Exchange, Peaks, Rates
from headrace.planning.scenario import Scenario

_ATTENTION_FLOPS_SHARE = 0.5
"""of the matrix rate, in the products of attention proper; estimate"""
_HOST_MEMORY_SHARE = Quantity(0.7, 0.5, 0.85, "hardware facts: 60-85 % of the channels' rate is achieved")
_HOST_FLOPS_SHARE = Quantity(0.5, 0.25, 0.8, "estimate")


def rates_of(values: Mapping[str, float]) -> Rates:
    """Multiply peaks by the shares of them that the engine reaches; `engine.spread` slows everything alike."""
    get = values.get
    slower = values["engine.spread"]
    matrix = values["processor.flops"] * values["processor.achievable"] * values["engine.compute_share"] / slower
    memory = values["processor.memory_bytes_per_s"] / slower
    link_share = get("engine.link_share", 1.0) / slower

    def wire(role: str) -> Wire:
        return Wire(get(f"link.{role}", math.inf) / slower, get(f"link.{role}.latency", 0.0) * slower)

    return Rates(
        read_bytes_per_s=get("link.storage", math.inf) * link_share,
        link_bytes_per_s=get("link.host", math.inf) * link_share,
        copy_latency_s=get("link.host.latency", 0.0) * slower,
        block_overhead_s=values["engine.layer_overhead_s"] * slower,
        pass_overhead_s=values["engine.pass_overhead_s"] * slower,
        token_overhead_s=get("engine.token_overhead_s", 0.0) * slower,
        overlaps_hops=get("engine.overlaps_hops", 1.0) > 0,
        overlaps_copies=get("engine.overlaps_copies", 1.0) > 0,
        peaks=Peaks(
            flops=matrix,
            attention_flops=min(get("processor.attention_flops", math.inf) / slower, matrix) * _ATTENTION_FLOPS_SHARE,
            memory_bytes_per_s=memory * values["engine.memory_share"] * get("engine.quantised_share", 1.0),
            cache_bytes_per_s=memory * values["engine.attention_share"],
            cpu_flops=get("host.flops", 0.0) * get("host.flops_share", 1.0) / slower,
            cpu_memory_bytes_per_s=get("host.memory_bytes_per_s", 0.0) * get("host.memory_share", 1.0) / slower,
        ),
        exchange=Exchange(
            peer=wire("scale_up"),
            network=wire("network"),
            split_overhead_s=get("engine.split_overhead_s", 0.0) * slower,
            across_overhead_s=get("engine.across_overhead_s", 0.0) * slower,
            excess=get("engine.exchange_excess", 1.0),
        ),
    )


def fastest_values(constants: Mapping[str, Quantity]) -> dict[str, float]:
    """The machine at the better end of every range, under software that adds nothing: no prediction is faster."""
    found = {}
    for name, constant in constants.items():
        if name.startswith("engine."):  # seconds and the excess of exchanges vanish, shares are whole
            found[name] = 0.0 if name.endswith(("_s", "excess")) else 1.0
        else:
            found[name] = constant.low if name.endswith("latency") else constant.high
    return found


def arithmetic_format(weight_format: str, processor_flops: Mapping[str, Quantity]) -> str:
    """The format that products are computed in: the weights' own where the processor has units for it, else 16 bit."""
    name = known_format(weight_format).arithmetic
    if name in processor_flops:
        return name
    if name == "fp4" and "fp8" in processor_flops and weight_format == "nvfp4":
        return "fp8"
    for fallback in sorted(DTYPES.values(), key=lambda dtype: dtype.size_bytes):
        if fallback.short_name in processor_flops:
            return fallback.short_name
    raise MachineError(f"the processor lists no arithmetic in 16 or 32 bits: {', '.join(processor_flops)}")


def quantities(scenario: Scenario, arrangement: Arrangement) -> dict[str, Quantity]:
    """Every constant that this arrangement depends on, by name."""
    machine, engine, weight_format = scenario.described_machine, scenario.engine, scenario.model.weight_format
    processor, divided = machine.processor, arrangement.parallelism
    found = {
        "processor.flops": processor.flops[arithmetic_format(weight_format, processor.flops)],
        "processor.achievable": processor.achievable,
        "processor.memory_bytes_per_s": processor.memory_bytes_per_s,
        "engine.memory_share": engine.memory_share,
        "engine.compute_share": engine.compute_share,
        "engine.attention_share": engine.attention_share,
        "engine.layer_overhead_s": engine.layer_overhead_s,
        "engine.pass_overhead_s": engine.pass_overhead_s,
        "engine.token_overhead_s": engine.token_overhead_s,
        "engine.spread": engine.spread,
    }
    if known_format(weight_format).packed:
        found["engine.quantised_share"] = engine.quantised_share
    if machine.host is not None and (arrangement.cpu_share or arrangement.cache_on_host):
        found["host.flops"] = machine.host.flops
        found["host.flops_share"] = _HOST_FLOPS_SHARE
        found["host.memory_bytes_per_s"] = machine.host.memory_bytes_per_s
        found["host.memory_share"] = _HOST_MEMORY_SHARE
    streams = arrangement.streamed_share > 0 or arrangement.expert_hit_rate is not None
    if streams or arrangement.cache_on_host:
        found["engine.link_share"] = engine.link_share
        found["engine.overlaps_copies"] = Quantity.of(float(engine.overlaps_copies), "how the engine is written")
        if arrangement.source is Tier.DISK:
            found["link.storage"] = machine.require_disk().bytes_per_s
            found["engine.overlaps_hops"] = Quantity.of(float(engine.overlaps_hops), "how the engine is written")
        if machine.host is not None:
            found |= _link(machine, "host", sharers=min(divided.devices, machine.devices))
    split = divided.replicas if divided.sharded else divided.tensor
    if max(split, divided.pipeline) > 1:
        if machine.devices > 1:
            found |= _link(machine, "scale_up")
        if max(split, divided.devices_per_copy) > machine.devices:
            found |= _link(machine, "network")
        if divided.tensor > 1:
            found["engine.split_overhead_s"] = engine.split_overhead_s
            found["engine.exchange_excess"] = engine.exchange_excess
            if divided.tensor > machine.devices:
                found["engine.across_overhead_s"] = engine.across_overhead_s
    return found


def _link(machine: Machine, role: str, *, sharers: int = 1) -> dict[str, Quantity]:
    if role not in machine.links:
        raise MachineError(
            f"{machine.name} describes no {role!r} link, which this strategy needs; it has: "
            + (", ".join(machine.links) or "none")
        )
    rate, latency_s = machine.rate(role, sharers=sharers), machine.links[role].latency_s
    return {f"link.{role}": rate, f"link.{role}.latency": latency_s}
