"""Everything streamed from page-locked host memory at batch 1: the link's speed while streaming against alone."""

from __future__ import annotations

import statistics
from typing import Any

from bench_report import spread
from gpu_parts.outcome import Measured, SkippedError, Table, at_least
from gpu_parts.raw_link import RawLink, raw_link
from gpu_parts.stage import Stage
from gpu_parts.timing import decode_cycles_s, generate, pass_cycles_s, some_tokens
from headrace.planning.plan import Placement
from headrace.streaming.system_memory import free_bytes

WANTED_EFFICIENCY = 0.97
WANTED_ROUNDS = 5
LARGE_SHARE_OF_TIME = 0.4
"""of the seconds that are left, for writing and reading the large checkpoint"""
SHARE_OF_HOST = 0.8
"""of the host's free memory, for its blocks"""
COLUMNS = (
    "shape", "blocks: device / host / disk", "GB per pass", "link alone GB/s", "streaming GB/s", "efficiency",
    "tokens/s predicted", "tokens/s measured",
)  # fmt: skip


def measure_link(stage: Stage) -> Measured:
    """The main shape."""
    return _measure(stage, stage.case.main, [])


def measure_large(stage: Stage) -> Measured:
    """The large shape, with as many of its layers as there is room and time for."""
    name = stage.case.large
    if name is None:
        raise SkippedError(f"the {stage.case.name} run has no large model")
    whole = stage.rack.shape(name).layers
    rates = stage.rack.write_bytes_per_s, stage.rack.read_bytes_per_s
    affordable = LARGE_SHARE_OF_TIME * stage.deadline.left_s / sum(1 / rate for rate in rates)
    in_memory = SHARE_OF_HOST * free_bytes()
    layers = stage.rack.cut(name, most_bytes=min(stage.case.large_most_bytes, affordable, in_memory))
    notes = []
    if layers < whole:
        notes.append(
            f"{name}: {layers} of the shape's {whole} layers, every byte of them distinct, on the disk and in host "
            "memory; no layer stands for another one. Ends (embedding, head) are whole."
        )
    return _measure(stage, name, notes, whole_layers=whole)


def _measure(stage: Stage, name: str, notes: list[str], *, whole_layers: int | None = None) -> Measured:
    layer_bytes, memory = stage.layer_bytes(name), stage.least_bytes(name, "overlap")
    with (
        raw_link(stage.device, layer_bytes) as raw,  # first, so that the model's promise does not count it
        stage.load(name, what="from host memory", memory=memory, strategy="overlap") as model,
    ):
        return _take_turns(stage, name, raw, model, notes, layer_bytes=layer_bytes, whole_layers=whole_layers)


def _take_turns(
    stage: Stage,
    name: str,
    raw: RawLink,
    model: Any,
    notes: list[str],
    *,
    layer_bytes: int,
    whole_layers: int | None,
) -> Measured:
    case, handle = stage.case, model.headrace
    places, bytes_per_pass = handle.plan.placements, handle.plan.streamed_bytes_per_pass
    ids, prompt = some_tokens(model, 1, 1), some_tokens(model, 1, 16)
    generate(model, prompt, 2)  # fills the stores
    raw.bytes_per_s(case.raw_copies)
    alone, streaming, ratios, decode = [], [], [], []
    for _ in stage.deadline.rounds(max(case.rounds, WANTED_ROUNDS)):
        before = raw.bytes_per_s(case.raw_copies)
        rate = bytes_per_pass / statistics.median(pass_cycles_s(model, ids, case.passes))
        after = raw.bytes_per_s(case.raw_copies)
        alone += [before, after]
        streaming.append(rate)
        ratios.append(2 * rate / (before + after))
    for _ in stage.deadline.rounds(2):
        decode += decode_cycles_s(model, prompt, case.new_tokens)
    efficiency, decode_s = statistics.median(ratios), statistics.median(decode)
    numbers = [sum(place is own for place in places) for own in (Placement.DEVICE, Placement.HOST, Placement.DISK)]
    row = [
        name,
        " / ".join(map(str, numbers)),
        f"{bytes_per_pass / 1e9:.3g}",
        f"{statistics.median(alone) / 1e9:.4g}",
        f"{statistics.median(streaming) / 1e9:.4g}",
        f"**{efficiency:.3f}** ({min(ratios):.3f}-{max(ratios):.3f})",
        f"{handle.prediction.tokens_per_s:.3g}",
        f"{1 / decode_s:.3g}",
    ]
    notes = [
        *notes,
        f"Link alone: {case.raw_copies} copies of {layer_bytes / 1e6:.4g} MB (a layer) in a row, before and after the "
        f"passes of each of {len(ratios)} rounds; memory page-locked: {'yes' if raw.pinned else 'NO'}; of the model's "
        f"stores: {'yes' if handle.stream.stores_pinned else 'NO'}. The least memory that streams keeps "
        f"{numbers[0]} of {len(places)} blocks on the device ({memory_text(handle)}).",
    ]
    record = {
        "shape": name,
        "blocks": dict(zip(("device", "host", "disk"), numbers, strict=True)),
        "bytes_per_pass": bytes_per_pass,
        "link_alone_bytes_per_s": spread(alone),
        "streaming_bytes_per_s": spread(streaming),
        "efficiency": spread(ratios),
        "predicted_tokens_per_s": handle.prediction.tokens_per_s,
        "measured_decode_s": spread(decode),
    }
    if whole_layers is not None and whole_layers > len(handle.layers):
        layers_s = decode_s * layer_bytes / bytes_per_pass
        scaled_s = decode_s + layers_s * (whole_layers - len(handle.layers))
        record["scaled_decode_s"] = scaled_s
        notes.append(
            f"All {whole_layers} layers at that rate would take {scaled_s:.3g} s per token ({1 / scaled_s:.3g} "
            "tokens/s): scaled by bytes, not measured."
        )
    return Measured(
        tables=[Table(COLUMNS, [row])],
        goals=[at_least(f"link efficiency, {name} from host memory, batch 1", WANTED_EFFICIENCY, efficiency)],
        notes=notes,
        record=record,
    )


def memory_text(handle: Any) -> str:
    """Both budgets."""
    plan = handle.plan
    return f"{plan.budget_bytes / 1e9:.3g} GB there, {plan.host_memory.total_bytes / 1e9:.3g} GB of host memory"
