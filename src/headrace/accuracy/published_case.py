"""From a published row to what the planner understands: shape, machine, arrangement, engine, work; or why not.

Texts are read generously, since sources write as they please, but nothing is made up: a batch that is not stated, a
model that is not named, a computer that is not described leave the row out, with the reason.
"""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from headrace.accuracy.published import Row
from headrace.errors import HeadraceError
from headrace.machine.catalogue import LATENCIES, find_machine
from headrace.machine.engine import engine_named, engines
from headrace.machine.machine import Disk, Link, Machine
from headrace.machine.quantity import Quantity
from headrace.model.catalogue import named_model
from headrace.model.formats import find_format, requantised
from headrace.model.model import Model
from headrace.planning.plan import Arrangement, Parallelism, Placement, arranged
from headrace.planning.scenario import Scenario
from headrace.planning.splits import device_fits, largest_share
from headrace.planning.workload import Speculation, Workload

_ON_HOSTS = Quantity(1.0, 0.5, 5.0, "how much of a host's memory rate its processors reach is known of few computers")
_WORDS = tomllib.loads(resources.files("headrace.accuracy").joinpath("words.toml").read_text(encoding="utf-8"))
FAMILIES = ("stream", "resident", "tensor", "pipeline", "cpu", "moe", "other")


class Excluded(Exception):  # noqa: N818 - no error: the answer to whether a row can be predicted
    """A row that is not predicted; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row as the planner understands it."""

    row: Row
    family: str
    scenario: Scenario
    arrangement: Arrangement
    unstated: bool = False
    """something that matters is not stated by the source and was assumed: the interval is widened"""
    assumed_batch: bool = False
    estimate_only: str | None = None
    """why the row is predicted with an interval but not counted among the errors"""


def family_of(row: Row) -> str:
    """The family that a row is counted in; times to the first token under load are queueing, and count as other."""
    strategy = row.strategy
    if row.metric == "ttft_serving":
        return "other"
    if "speculative" in strategy or "microbench" in strategy or strategy in {"memory", "hot/cold neuron split"}:
        return "other"
    if "HBM shards" in strategy:
        return "other"
    if strategy.startswith(("stream", "partial_resident")):
        return "stream"
    if strategy.startswith("moe"):
        return "moe"
    if "cpu" in strategy or (strategy == "resident" and row.weight_tier in {"cpu", "ram"}):
        return "cpu"
    if strategy.startswith("tensor"):
        return "tensor"
    if strategy in {"pipeline", "tp+pp"}:
        return "pipeline"
    return "resident" if strategy == "resident" else "other"


def case_of(row: Row) -> Case:
    """Read a row. Raises Excluded with the reason where it cannot be predicted."""
    _refuse(row)
    model = _model(row)
    machine, stated = _machine(row)
    family = family_of(row)
    engine = engine_named(row.engine)
    if family == "moe":
        engine = engines()["moe-offload"]
    elif family == "cpu":
        engine = replace(engine, spread=_ON_HOSTS)
    batch, assumed = _batch(row)
    unstated = assumed
    prompt = row.prompt_tokens if row.prompt_tokens is not None else 16
    generate = row.generate_tokens if row.generate_tokens else 128
    if row.metric in {"prefill_throughput", "prefill_latency"}:
        generate = 1
    if row.prompt_tokens is None and row.batch is not None and row.batch > 8:
        unstated = True
    arrangement = _arrangement(row, model, machine, batch)
    machine = _with_room(machine, arrangement)
    replicas = arrangement.parallelism.replicas if row.per_device or arrangement.parallelism.sharded else 1
    work = Workload(sequences=batch * replicas, prompt_tokens=max(1, prompt), generate_tokens=max(1, generate))
    speculation = None
    if "speculative" in row.strategy:
        speculation = Speculation(draft_tokens=16, acceptance=0.85)
        unstated = True
    scenario = Scenario.described(
        replace(model, context_tokens=max(model.context_tokens, work.context_tokens + 1)),
        machine,
        work,
        engine=engine,
        speculation=speculation,
    )
    return Case(
        row=row,
        family=family,
        scenario=scenario,
        arrangement=_filled(row, scenario, arrangement),
        unstated=unstated or not stated,
        assumed_batch=assumed,
        estimate_only=_estimate_only(row, family, unstated=unstated or not stated, assumed=assumed),
    )


def _estimate_only(row: Row, family: str, *, unstated: bool, assumed: bool) -> str | None:
    """Say why a row says too little for an error to mean anything, though an interval can be given."""
    if assumed:
        return "the source does not state the batch"
    if "flexgen" in row.engine.lower() and family == "stream":
        return "FlexGen places weights, cache and attention by percentages that the row does not state"
    if "+-50%" in row.notes.replace(" ", ""):
        return "the source prints one digit"
    if unstated:
        return "the source leaves out the length of prompts or the rate of the disk"
    if family == "stream" and row.prompt_tokens is None and row.generate_tokens is None:
        return "the source describes neither work nor links"
    return None


def machine_of(row: Row) -> Machine | None:
    """The machine that a row names; None where none is understood."""
    try:
        return _machine(row)[0]
    except (Excluded, HeadraceError):
        return None


def is_fitted(row: Row) -> bool:
    """Whether the figure is a constant that its source fitted."""
    return "fit" in row.engine.lower().split() or "FITTED" in row.notes


def _refuse(row: Row) -> None:
    notes = row.notes.lower()
    if "lower bound" in notes or "upper bound" in notes:
        raise Excluded("a bound, not a measurement")
    if "swarm" in row.parallelism.lower() or "swarm" in row.hardware.lower() or "Petals" in row.hardware:
        raise Excluded("a swarm over the internet, whose members and links are not described")
    if row.strategy == "hot/cold neuron split":
        raise Excluded("depends on the sparsity of ReLU models")
    if "write" in row.engine:
        raise Excluded("writing to disk is no part of the model")
    if row.metric in {"decode_steps", "effective_bandwidth"}:
        raise Excluded(f"{row.metric} is fitted or an average, not one measured run")
    if is_fitted(row):
        raise Excluded("a fitted constant, not a measurement")
    if row.hardware in {"?", "", "(see issue)"} or re.fullmatch(r"\d+ ?GB( VRAM)? GPU.*", row.hardware):
        raise Excluded("the source does not name the device")


# -- model --------------------------------------------------------------------------------------------------------


def _model(row: Row) -> Model:
    try:
        model = named_model(row.model)
    except HeadraceError:
        raise Excluded(f"no shape is known of {row.model!r}") from None
    total = model.parameters
    if row.params_total and not 0.7 < row.params_total / total < 1.4:
        raise Excluded(f"{row.model} has {row.params_total / 1e9:.4g} billion in the source, {total / 1e9:.4g} here")
    name = _weight_format(row, model)
    if name is not None and name != model.weight_format:
        model = requantised(model, name)
    if "kv" in row.weight_dtype:
        model = model.with_kv_element_bytes(0.5625)
    return model


def _weight_format(row: Row, model: Model) -> str | None:
    text = row.weight_dtype.lower()
    text = re.sub(r"\(.*?\)|\?", "", text).strip()
    text = text.split("/")[0].split()[0] if text.split() else ""
    text = re.sub(r"-(int\d)$", r" \1", text).split(" ")[-1] if text.startswith(("awq-", "gptq-")) else text
    if model.weight_format == "mxfp4" and text in {"fp4", "mxfp4"}:
        return None
    named = re.search(r"[_-](q\d_k_[sml]|q\d_[01k]|iq\d_\w+)\b", row.model.lower())
    if text in {"quant", "q4", ""} and named is not None:
        text = named[1]
    engine = row.engine.lower()
    if text == "int4" and ("zero" in engine or "flexgen" in engine):
        text = "int4-g32"
    if text == "q4":
        text = "q4_k_m" if "mlx" not in engine else "int4-g32"
    if text in {"-", ""}:
        return None
    text = _WORDS["formats"].get(text, text)
    try:
        return find_format(text).name
    except HeadraceError:
        raise Excluded(f"weights stored as {row.weight_dtype!r}, which has no known size") from None


# -- machine ------------------------------------------------------------------------------------------------------


def _machine(row: Row) -> tuple[Machine, bool]:
    """Return the machine, and whether all that matters of it is stated."""
    text = row.hardware
    count = row.num_devices or 1
    low = text.lower()
    if "dgx-2" in low or "v100" in low:
        return find_machine(f"{count}xv100-32@dgx-2" if "dgx-2" in low else f"{count}xv100-32"), True
    if "superpod" in low or ("a100" in low and "8x" in low):
        base = find_machine("dgx-a100-80")
        return replace(base, nodes=-(-count // 8)) if count > 8 else replace(base, devices=count), True
    name = _device_name(text)
    try:
        machine = find_machine(f"{count}x{name}" if count > 1 else name)
    except HeadraceError:
        raise Excluded(f"no device of the catalogue is meant by {text!r}") from None
    stated = True
    if memory := re.search(r"\((\d+) ?GB (?:host )?(?:RAM|DRAM)", text) or re.search(r"RAM (\d+(?:\.\d+)?) ?GB", text):
        machine = _with_host(machine, memory_bytes=float(memory[1]) * 1e9)
    if "gcp" in low and "t4" in low:
        machine = replace(find_machine("gcp-t4"), devices=1)
    if "252 gb host ram" in low:
        machine = replace(find_machine("a6000-workstation"), devices=1)
    if disk := re.search(r"NVMe (\d+(?:\.\d+)?) ?GB/s", text):
        rate = float(disk[1]) * 1e9
        machine = _with_disk(machine, Quantity(rate, rate * 0.8, rate, "stated by the source"))
    for drive in _WORDS["drives"]:
        if re.search(drive["named"], low):
            rate, what = drive["bytes_per_s"], drive["what"]
            machine = _with_disk(machine, Quantity(rate, rate / 2, rate * 2, f"{what}; not measured"))
            stated = False
    if "pcie4" in low:
        machine = _with_link(machine, "host", Quantity(24e9, 20e9, 26e9, "PCIe 4 x16"))
    if "thunderbolt" in low or "tb5" in low:
        rate = 6e9 if "tb5" in low else 2.8e9
        machine = _with_link(machine, "network", Quantity(rate * 0.8, rate * 0.4, rate, "Thunderbolt"))
    if "raspberry" in low:
        machine = _with_link(machine, "network", Quantity(0.11e9, 0.09e9, 0.12e9, "Ethernet 1G"))
    if (owned := re.search(r"(\d+(?:\.\d+)?)GB x\d", text)) and machine.processor.kind == "gpu":
        memory_bytes = max(float(owned[1]) / max(1, count), machine.processor.memory_bytes / 1e9) * 1e9
        machine = replace(machine, processor=replace(machine.processor, memory_bytes=memory_bytes))
    if cpu := re.search(r"CPU .*?(i9-10900X|i7-12700H)", text):
        beside = find_machine(cpu[1].lower()).processor
        machine = _with_host(machine, memory_bytes_per_s=beside.memory_bytes_per_s, flops=beside.flops["bf16"])
    if "xeon gold 6454s" in low:
        rate_both = Quantity(614e9, 250e9, 614e9, "two sockets of eight DDR5-4800 channels")
        flops = Quantity(8e12, 3e12, 30e12, "estimate: two sockets of 32 cores")
        machine = _with_host(machine, memory_bytes_per_s=rate_both, flops=flops, memory_bytes=1e12)
    return machine, stated


def _with_host(machine: Machine, **parts: Any) -> Machine:
    """The machine with what a source says of its host, where it has one."""
    return machine if machine.host is None else replace(machine, host=replace(machine.host, **parts))


def _with_disk(machine: Machine, rate: Quantity) -> Machine:
    held = machine.disk or Disk(bytes_per_s=rate, latency_s=LATENCIES["disk"])
    return replace(machine, disk=replace(held, bytes_per_s=rate))


def _with_link(machine: Machine, role: str, rate: Quantity) -> Machine:
    former = machine.links.get(role) or Link(name=role, bytes_per_s=rate, latency_s=LATENCIES[role])
    return replace(machine, links={**machine.links, role: replace(former, bytes_per_s=rate)})


def _device_name(text: str) -> str:
    """Bring a source's words for a device into a catalogue name."""
    name = re.split(r",| \+ |\(", text)[0]
    name = re.sub(r"^\d+ ?x ", "", name.strip())
    name = re.sub(r"\bx\d+\b", "", name)
    name = re.sub(r"^(NVIDIA GeForce|NVIDIA|AMD Radeon|AMD|Tesla)\s+", "", name)
    name = re.sub(r"\b\d+(?:\.\d+)? ?GB\b", lambda match: match[0] if "A100" in name else "", name)
    name = re.sub(r"\b(SXM\d?|NVLink\d?|one GCD|\d+-core GPU|Mac Studio|Mac|CPU|NVSwitch|SUPER POD)\b", " ", name)
    name = re.sub(r"\s+", " ", name).strip(" -")
    name = re.sub(r"^TPU ", "tpu-", name)
    if name in _WORDS["devices"]:
        return str(_WORDS["devices"][name])
    apple = re.match(r"(?:Apple )?(M\d)( Pro| Max| Ultra)?", name)
    if apple is not None:
        return "apple-" + (apple[1] + (apple[2] or "")).lower().replace(" ", "-")
    return name.strip("-")


# -- strategy -----------------------------------------------------------------------------------------------------


def _batch(row: Row) -> tuple[int, bool]:
    """Return the batch, and whether it had to be assumed."""
    if row.batch is not None:
        return row.batch, "not stated" in row.notes.lower()
    if row.batch_text.startswith("max"):
        return 1, False  # as many as fit: found by the metric
    if row.batch_text in {"", "-"}:
        return 1, False
    return (64 if row.metric == "throughput" else 1), True


def _arrangement(row: Row, model: Model, machine: Machine, batch: int) -> Arrangement:
    name, count, layers = row.strategy, row.num_devices or 1, model.num_layers
    tier = row.weight_tier.lower()
    source = Placement.DISK if re.search(r"nvme|disk|ssd|hdd", tier) and "cpu/ssd" not in tier else Placement.HOST
    if machine.host is None and name.startswith(("stream", "partial")):
        source = Placement.DISK
    held = arranged(layers)
    mixture = any(group.layer.num_experts for group in model.groups)
    if name in {"resident", "cpu_resident"} and count == 1:
        return arranged(layers, cpu=layers) if tier in {"cpu", "ram"} and machine.host is not None else held
    if name.startswith("tensor"):
        width = re.search(r"TP(\d+)", row.parallelism)
        n = int(width[1]) if width else count
        return held._replace(parallelism=Parallelism(tensor=n, two_dimensional=name.endswith("2d")))
    if name == "tp+pp" or (name == "pipeline" and count > 1):
        both = re.search(r"TP(\d+)xPP(\d+)", row.parallelism)
        stages = re.search(r"PP(\d+)", row.parallelism)
        width_n, depth = (int(both[1]), int(both[2])) if both else (1, int(stages[1]) if stages else count)
        batches = min(batch, depth) if row.metric == "throughput" or both else 1
        return held._replace(parallelism=Parallelism(tensor=width_n, pipeline=depth, micro_batches=max(1, batches)))
    if name == "pipeline":
        return held
    if "bandwidth_centric" in name:
        if "HBM" in name:
            return held._replace(parallelism=Parallelism(replicas=count, sharded=True))
        return arranged(layers, resident=0, source=source, parallelism=Parallelism(replicas=count, sharded=count > 1))
    if name.startswith(("stream_sequential", "stream_overlap", "stream", "partial_resident")):
        if "selectively" in row.notes and mixture:
            return held._replace(expert_hit_rate=0.0, expert_source=source)
        on_host = re.search(r"kv (?:offload|cache in cpu)", (row.engine + row.notes).lower()) is not None
        slots = 1 if "sequential" in name else 2
        return arranged(layers, resident=0, source=source, slots=slots, cache_on_host=on_host)
    if name == "partial_offload_cpu_compute":
        return arranged(layers, cpu=layers)
    if name in {"moe_offload", "moe_cpu_compute"}:
        if not mixture:
            raise Excluded("no mixture of experts")
        return arranged(layers, cpu=layers) if name == "moe_cpu_compute" else held._replace(expert_hit_rate=0.0)
    if name == "resident" or name.endswith("speculative"):
        return held
    raise Excluded(f"the strategy {name!r} is none that is planned")


def _with_room(machine: Machine, arrangement: Arrangement) -> Machine:
    """Give a machine the links that the row's arrangement needs and its description lacks."""
    if arrangement.parallelism.devices_per_copy > 1 and machine.devices > 1 and "scale_up" not in machine.links:
        rate = Quantity(12e9, 5e9, 25e9, "assumed: device to device over the host's bus")
        machine = _with_link(machine, "scale_up", rate)
    if arrangement.parallelism.devices_per_copy > machine.devices and "network" not in machine.links:
        machine = _with_link(machine, "network", Quantity(1e9, 0.1e9, 10e9, "assumed: an ordinary network"))
    return machine


def _filled(row: Row, scenario: Scenario, arrangement: Arrangement) -> Arrangement:
    """Decide what stays on the device where the source leaves that to the software."""
    model = scenario.model
    layers = model.num_layers
    if row.strategy == "partial_resident":
        given = re.search(r"gpu(\d+(?:\.\d+)?)B", row.weight_tier)
        if given is not None:
            share = min(0.99, float(given[1]) * 1e9 / model.parameters)
            source = Placement.DISK if Placement.DISK in arrangement.placements else Placement.HOST
            kept = min(layers - 1, math.floor(share * layers))
            return arranged(layers, resident=kept, source=source, slots=arrangement.slots)
    streams = arrangement.streamed_share > 0 and scenario.described_machine.host is not None
    if streams and not device_fits(scenario, arrangement._replace(cache_on_host=False)):
        return arrangement._replace(cache_on_host=True)
    if row.strategy in {"partial_offload_cpu_compute", "moe_cpu_compute"}:
        kept = 0
        while kept < layers and device_fits(scenario, arranged(layers, cpu=layers - kept - 1)):
            kept += 1
        return arranged(layers, cpu=layers - kept)
    if arrangement.expert_hit_rate is not None:
        share = largest_share(lambda share: arrangement._replace(expert_hit_rate=share), scenario)
        return arrangement._replace(expert_hit_rate=share)
    return arrangement
