"""Published figures of single operations: matrix products, one layer's parts, exchanges, disks, memory for the cache.

They are no decode of a model, but they rest on the same formulas and constants, so they are held against them too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from headrace.accuracy.published import Row
from headrace.machine.machine import Machine
from headrace.machine.quantity import Interval, Quantity, interval_of
from headrace.model.catalogue import named_model
from headrace.planning.collectives import Wire, all_reduce
from headrace.planning.memory import cache_parts

_WIDTH = 12288
"""of GPT-3, whose layer the published parts are of"""
_HEADS = 96
_LAUNCH_S = 15e-6
"""of one small kernel from PyTorch: estimate"""
_EXPOSED = Quantity(1.0, 0.6, 2.5, "launches and cache effects of single operations, which the formulas lack")
_UNMEASURED_SHARE = Quantity(0.75, 0.5, 0.92, "large products reach 50-90 % of the peak, before it is measured")
_DRIVES = {
    "4": Quantity(3.0e9, 1.6e9, 7.2e9, "one NVMe drive, PCIe 4"),
    "5": Quantity(6.5e9, 4.5e9, 14e9, "one NVMe drive, PCIe 5"),
}


def operation_of(row: Row, machine: Machine | None) -> Interval | None:
    """Predict a row of a single operation in its own unit; None where the row is none that is known."""
    if row.metric == "link_bandwidth" and "write" not in row.engine:
        return _drives(row)
    if machine is None:
        return None
    processor = machine.processor
    constants = {
        "flops": processor.flops["bf16"],
        "achievable": processor.achievable,
        "memory": processor.memory_bytes_per_s,
        "memory_share": Quantity(0.8, 0.6, 0.95, "formulas.md section 2"),
        "exposed": _EXPOSED,
    }
    if row.metric == "op_latency" and row.unit == "ms" and row.batch:
        part = _part(row, machine)
        if part is None:
            return None
        operations, moved, exchanged = part

        def milliseconds(values: Mapping[str, float]) -> float:
            seconds = max(
                operations / (values["flops"] * values["achievable"]),
                moved / (values["memory"] * values["memory_share"]),
            )
            return (seconds + exchanged) * values["exposed"] * 1e3

        return interval_of(constants, milliseconds)
    if row.metric == "achievable_flops" and row.unit == "TFLOP/s":
        unmeasured = {"flops": processor.flops["bf16"], "share": _UNMEASURED_SHARE}
        return interval_of(unmeasured, lambda values: values["flops"] * values["share"] / 1e12)
    if row.metric == "bus_bandwidth" and row.unit == "GB/s" and "scale_up" in machine.links:
        in_switch = {
            "link": machine.links["scale_up"].bytes_per_s,
            "exposed": Quantity(1.0, 0.75, 1.5, "additions inside the switch raise it"),
        }
        return interval_of(in_switch, lambda values: values["link"] * values["exposed"] / 1e9)
    if row.metric == "max_context_at_30pct_mem" and row.batch:
        return _context(row, machine)
    return None


def _part(row: Row, machine: Machine) -> tuple[float, float, float] | None:
    """Operations, bytes moved and seconds of exchange of one part on one device; None for parts that are not known."""
    batch, devices = row.batch or 1, row.num_devices or 1
    if product := re.match(r"matmul Mx(\d+)x(\d+)", row.model):
        inner, outer = int(product[1]), int(product[2])
        return 2.0 * batch * inner * outer, 2.0 * (batch * inner + inner * outer + batch * outer), 0.0
    if "layer" not in row.model or "GPT-3" not in row.model:
        return None
    decode = "decode" in row.engine
    context = row.prompt_tokens or 1
    tokens = batch * (1 if decode else context)
    columns = {"QKV": 3 * _WIDTH, "Wo": _WIDTH, "W1": 4 * _WIDTH, "W2": 4 * _WIDTH}
    for name, width in columns.items():
        if name in row.engine:
            weights = _WIDTH * width / devices
            return 2.0 * tokens * weights, 2.0 * (weights + tokens * (_WIDTH + width / devices)), 0.0
    heads = _HEADS / devices
    scores = tokens * context * heads
    if "QK" in row.engine or "AV" in row.engine:
        cached = batch * context * heads * _WIDTH / _HEADS
        # Written out as PyTorch did: every score goes through memory.
        return 2.0 * scores * _WIDTH / _HEADS, 2.0 * (cached + scores + tokens * _WIDTH / devices), 0.0
    if "softmax" in row.engine:
        return 0.0, 2.0 * 2 * scores, _LAUNCH_S
    if "layernorm" in row.engine:
        return 0.0, 2.0 * 2 * tokens * _WIDTH, 2 * _LAUNCH_S
    if "GeLU" in row.engine:
        return 0.0, 2.0 * 2 * tokens * 4 * _WIDTH / devices, _LAUNCH_S
    if "all-reduce" in row.engine and "scale_up" in machine.links:
        link = machine.links["scale_up"]
        wire = Wire(link.bytes_per_s.expected, link.latency_s.expected)
        return 0.0, 0.0, all_reduce(tokens * _WIDTH * 2.0, devices, wire)
    return None


def _drives(row: Row) -> Interval | None:
    found = re.search(r"(\d+)xGen([45])", row.hardware)
    if found is None or row.unit != "GB/s":
        return None
    count = int(found[1])
    constants = {"drive": _DRIVES[found[2]], "bounce": Quantity.of(0.75 if "bounce" in row.engine else 1.0, "copied")}
    return interval_of(constants, lambda values: count * values["drive"] * values["bounce"] / 1e9)


def _context(row: Row, machine: Machine) -> Interval | None:
    """Tokens of context whose cache takes 30 % of all devices' memory, by how the cache is divided."""
    model = named_model(row.model)
    layer = next(model.layers())
    devices, sequences = row.num_devices or 1, row.batch or 1
    per_token = model.kv_bytes_per_token()
    share = machine.processor.memory_bytes * 0.3
    if "multi-head" in row.parallelism:
        # As many key-value heads as query heads, of half the width, as the source compares them.
        per_token *= layer.query_heads / 2
        tokens = share * devices / (sequences * per_token)
    elif "batch-sharded" in row.parallelism:
        tokens = share * devices / (sequences * per_token)
    else:
        tokens = share * cache_parts(layer, devices) / (sequences * per_token)
    return Interval(tokens, tokens * 0.7, tokens * 1.4)
