"""Machines as TOML: every size and rate with its unit, every link by name; round trip without loss.

name = "two cards"
devices = 2

[processor]
name = "RTX 3090"
kind = "gpu"
memory = "24GB"
memory_rate = "936GB/s"
achievable = 0.7
[processor.flops]
bf16 = "71TFLOPS"

[host]
memory = "128GB"
memory_rate = { expected = "60GB/s", low = "45GB/s", high = "76GB/s", source = "measured" }
flops = "1TFLOPS"

[links.host]
rate = "24GB/s"
uplink = "bridge"
[links.bridge]
rate = "30GB/s"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.errors import MachineError, near_names
from headrace.machine.machine import Host, Link, Machine, Processor
from headrace.machine.probed_accelerator import ProbedAccelerator
from headrace.machine.probed_machine import ProbedMachine
from headrace.machine.quantity import Quantity
from headrace.machine.unit_text import read_number, read_quantity, write_number, write_quantity

_TOP = {"name", "devices", "nodes", "processor", "host", "disk", "links", "collectives", "notes", "source"}
_PROCESSOR = {"name", "kind", "memory", "memory_rate", "flops", "achievable", "power", "rent", "price", "source"}
_HOST = {"memory", "memory_rate", "flops", "power", "source"}
_LINK = {"rate", "latency", "uplink", "source"}
FORMATS = ("fp32", "bf16", "fp16", "fp8", "int8", "fp4")
"""of arithmetic"""
ROLES = ("storage", "host", "scale_up", "network")
KINDS = ("gpu", "tpu", "asic", "apple_soc", "soc", "cpu")
_ACHIEVABLE = Quantity(0.7, 0.5, 0.9, "assumed: large products reach 50-90 % of the peak")
_MOST_DEVICES = 1_000_000


def load_machine(path: Path) -> Machine:
    """Read a machine file, this format's or one that `headrace probe` wrote."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MachineError(f"the machine file {path} cannot be read: {error}") from error
    return machine_from_toml(text, origin=str(path))


def machine_from_toml(text: str, *, origin: str) -> Machine:
    """Read a description; raises MachineError that names `origin`, the field, and what is expected there."""
    try:
        raw = tomllib.loads(text)
        if "disk" in raw and isinstance(raw["disk"], dict) and "read_bytes_per_s" in raw["disk"]:
            return machine_from_probe(ProbedMachine.from_toml(text, origin=origin))
        return _machine(raw)
    except tomllib.TOMLDecodeError as error:
        raise MachineError(f"{origin} is not a machine description, not even TOML: {error}") from error
    except (MachineError, RecursionError) as error:
        raise MachineError(f"{origin} is not a machine description: {error}") from error


def machine_to_toml(machine: Machine) -> str:
    """Write a description; `machine_from_toml` is its inverse."""
    import tomli_w  # not needed to read one

    processor = machine.processor
    described: dict[str, Any] = {
        "name": processor.name,
        "kind": processor.kind,
        "memory": write_number(processor.memory_bytes, "size"),
        "memory_rate": write_quantity(processor.memory_bytes_per_s, "rate"),
        "achievable": write_quantity(processor.achievable, "share"),
        "flops": {name: write_quantity(rate, "flops") for name, rate in processor.flops.items()},
    }
    for field, kind, value in (
        ("power", "power", processor.power_w),
        ("rent", "rent", processor.rent_usd_per_h),
        ("price", "price", processor.price_usd),
    ):
        if value is not None:
            described[field] = write_quantity(value, kind)
    raw: dict[str, Any] = {
        "name": machine.name,
        "devices": machine.devices,
        "nodes": machine.nodes,
        "processor": described,
        "links": {name: _link_to_toml(link) for name, link in machine.links.items()},
    }
    if machine.host is not None:
        host = machine.host
        raw["host"] = {
            "memory": write_number(host.memory_bytes, "size"),
            "memory_rate": write_quantity(host.memory_bytes_per_s, "rate"),
            "flops": write_quantity(host.flops, "flops"),
        }
        if host.power_w is not None:
            raw["host"]["power"] = write_quantity(host.power_w, "power")
    if machine.disk_bytes is not None:
        raw["disk"] = write_number(machine.disk_bytes, "size")
    if machine.collectives is not None:
        raw["collectives"] = machine.collectives
    if machine.notes:
        raw["notes"] = list(machine.notes)
    return tomli_w.dumps(raw)


def machine_from_probe(probed: ProbedMachine) -> Machine:
    """See a probed computer as a machine.

    With an accelerator: that one computes, fed over its link from the host's memory and from the disk. Without: the
    computer's own processor computes from its memory, which the disk feeds. The processor's memory rate is what
    products of one token reach (two bytes or four for each weight, as stored), the arithmetic what products of the most
    tokens do. Raises MachineError where no arithmetic was measured.
    """
    if not probed.compute:
        raise MachineError(f"{probed.name} has no measurement of arithmetic; run `headrace probe` again")
    fastest = max(probed.compute, key=lambda curve: curve.flops)
    source = f"measured by headrace probe on {probed.name}"
    flops = Quantity.about(fastest.flops, source, share=0.2)
    memory_rate = Quantity.about(fastest.weight_bytes_per_s, source, share=0.2)
    storage = Link(
        name="storage",
        bytes_per_s=Quantity.about(probed.read_bytes_per_s, source, share=0.25),
        latency_s=Quantity.of(0.0, "part of the measured rate"),
    )
    if not probed.accelerators:
        return Machine(
            name=probed.name,
            processor=Processor(
                name=probed.name,
                kind="cpu",
                memory_bytes=float(probed.memory_bytes),
                memory_bytes_per_s=memory_rate,
                flops={"bf16": flops},
                achievable=Quantity.of(1.0, "the arithmetic itself was measured"),
            ),
            devices=1,
            links={"storage": storage},
        )
    accelerator = probed.accelerators[0]
    others = len(probed.accelerators) - 1
    if probed.memory_bytes_per_s is not None:
        memory_rate = Quantity.about(probed.memory_bytes_per_s, source, share=0.2)
    return Machine(
        name=probed.name,
        processor=_probed_processor(accelerator, source),
        devices=1,
        host=Host(memory_bytes=float(probed.memory_bytes), memory_bytes_per_s=memory_rate, flops=flops),
        links={"storage": storage, "host": _probed_link(accelerator, source)},
        notes=(f"planned for {accelerator.device} alone, not for the {others} measured beside it",) if others else (),
    )


def _probed_processor(accelerator: ProbedAccelerator, source: str) -> Processor:
    """See a probed accelerator as a processor. `bf16` stands for 16 bits, whichever the device is faster in."""
    formats = {"bf16": {"bfloat16", "float16"}, "fp32": {"float32"}}
    measured = {
        name: [curve for curve in accelerator.compute if curve.compute_dtype in dtypes]
        for name, dtypes in formats.items()
    }
    fastest = {name: max(curves, key=lambda curve: curve.flops) for name, curves in measured.items() if curves}
    if not fastest:
        raise MachineError(f"{accelerator.name} has no measurement of 16- or 32-bit arithmetic")
    read_bytes_per_s = max(curve.weight_bytes_per_s for curve in accelerator.compute)
    return Processor(
        name=accelerator.name,
        kind="gpu",
        memory_bytes=float(accelerator.memory_bytes),
        memory_bytes_per_s=Quantity.about(max(accelerator.memory_bytes_per_s, read_bytes_per_s), source, share=0.1),
        flops={
            name: Quantity.about(curve.flops, f"{source}, in {curve.compute_dtype}", share=0.1)
            for name, curve in fastest.items()
        },
        achievable=Quantity.of(1.0, "the arithmetic itself was measured"),
    )


def _probed_link(accelerator: ProbedAccelerator, source: str) -> Link:
    rate = Quantity.about(accelerator.pinned_to_device_bytes_per_s, source, share=0.1)
    beside_bytes_per_s = accelerator.pinned_to_device_while_computing_bytes_per_s
    return Link(
        name="host",
        bytes_per_s=replace(rate, low=min(rate.low, beside_bytes_per_s)),
        latency_s=Quantity.about(accelerator.copy_latency_s, source, share=0.5),
    )


def _machine(raw: Mapping[str, Any]) -> Machine:
    _known(raw, _TOP, "")
    processor = _table(raw, "processor")
    source = _text(raw, "source", "") if "source" in raw else "the machine file"
    links = {
        name: _link(name, _table(_table(raw, "links"), name, path="links."), source)
        for name in (_table(raw, "links") if "links" in raw else {})
    }
    host = None
    if "host" in raw:
        table = _table(raw, "host")
        _known(table, _HOST, "host.")
        origin = _text(table, "source", "host.") if "source" in table else source
        host = Host(
            memory_bytes=_size(table, "memory", "host."),
            memory_bytes_per_s=_rate(table, "memory_rate", "rate", "host.", origin),
            flops=_rate(table, "flops", "flops", "host.", origin),
            power_w=_optional(table, "power", "power", "host.", origin),
        )
    disk = raw.get("disk")
    devices, nodes = _count(raw, "devices"), _count(raw, "nodes")
    if devices * nodes > _MOST_DEVICES:
        raise MachineError(f"{nodes:,} nodes of {devices:,} devices are more than {_MOST_DEVICES:,} devices")
    machine = Machine(
        name=_text(raw, "name", ""),
        processor=_processor(processor, source),
        devices=devices,
        nodes=nodes,
        host=host,
        disk_bytes=None if disk is None else _positive(read_number(disk, "size", field="disk"), "disk"),
        links=links,
        collectives=None if "collectives" not in raw else _text(raw, "collectives", ""),
        notes=_texts(raw, "notes"),
    )
    _used(links, host)
    return machine


def _processor(table: Mapping[str, Any], source: str) -> Processor:
    _known(table, _PROCESSOR, "processor.")
    origin = _text(table, "source", "processor.") if "source" in table else source
    kind = _text(table, "kind", "processor.")
    if kind not in KINDS:
        raise MachineError(f"processor.kind is {kind!r}; {near_names(kind, KINDS)}known: {', '.join(KINDS)}")
    flops = _table(table, "flops", path="processor.")
    if not flops:
        raise MachineError('processor.flops is empty; it lists rates by format, such as bf16 = "312TFLOPS"')
    for name in flops:
        if name not in FORMATS:
            raise MachineError(
                f"processor.flops.{name} is no format of arithmetic; {near_names(name, FORMATS)}"
                f"known: {', '.join(FORMATS)}"
            )
    if not {"fp32", "bf16", "fp16"} & set(flops):
        raise MachineError("processor.flops lists no 16- or 32-bit arithmetic, which every model needs; add bf16")
    achievable = table.get("achievable")
    share = (
        _ACHIEVABLE
        if achievable is None
        else read_quantity(achievable, "share", field="processor.achievable", source=origin)
    )
    if not 0 < share.low <= share.high <= 1:
        raise MachineError(f"processor.achievable is a share above 0 and up to 1, not {share.expected}")
    return Processor(
        name=_text(table, "name", "processor."),
        kind=kind,
        memory_bytes=_size(table, "memory", "processor."),
        memory_bytes_per_s=_rate(table, "memory_rate", "rate", "processor.", origin),
        flops={name: _rate(flops, name, "flops", "processor.flops.", origin) for name in flops},
        achievable=share,
        power_w=_optional(table, "power", "power", "processor.", origin),
        rent_usd_per_h=_optional(table, "rent", "rent", "processor.", origin),
        price_usd=_optional(table, "price", "price", "processor.", origin),
    )


def _link(name: str, table: Mapping[str, Any], source: str) -> Link:
    path = f"links.{name}."
    _known(table, _LINK, path)
    origin = _text(table, "source", path) if "source" in table else source
    latency = table.get("latency", "0s")
    return Link(
        name=name,
        bytes_per_s=_rate(table, "rate", "rate", path, origin),
        latency_s=read_quantity(latency, "time", field=f"{path}latency", source=origin),
        uplink=None if "uplink" not in table else _text(table, "uplink", path),
    )


def _used(links: Mapping[str, Link], host: Host | None) -> None:
    """Refuse links that nothing would ever travel over."""
    uplinks = {link.uplink for link in links.values()}
    for name in links:
        if name not in ROLES and name not in uplinks:
            raise MachineError(
                f"links.{name} is no link that planning knows, nor any link's uplink; {near_names(name, ROLES)}"
                f"known: {', '.join(ROLES)}"
            )
    if "host" in links and host is None:
        raise MachineError("links.host leads from a host's memory, and there is no table [host]")


def _link_to_toml(link: Link) -> dict[str, Any]:
    made: dict[str, Any] = {
        "rate": write_quantity(link.bytes_per_s, "rate"),
        "latency": write_quantity(link.latency_s, "time"),
    }
    if link.uplink is not None:
        made["uplink"] = link.uplink
    return made


def _known(table: Mapping[str, Any], known: set[str], path: str) -> None:
    for name in table:
        if name not in known:
            raise MachineError(
                f"{path}{name} is no field of a machine; {near_names(name, known)}known: {', '.join(sorted(known))}"
            )


def _need(table: Mapping[str, Any], name: str, path: str) -> object:
    if name not in table:
        raise MachineError(f"the field {path}{name} is missing")
    return table[name]


def _table(table: Mapping[str, Any], name: str, path: str = "") -> Mapping[str, Any]:
    value = _need(table, name, path)
    if not isinstance(value, dict):
        raise MachineError(f"{path}{name} is {value!r} where a table is expected")
    return value


def _text(table: Mapping[str, Any], name: str, path: str) -> str:
    value = _need(table, name, path)
    if not isinstance(value, str) or not value:
        raise MachineError(f"{path}{name} is {value!r} where a text is expected")
    return value


def _texts(table: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = table.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise MachineError(f"{name} is {value!r} where an array of texts is expected")
    return tuple(value)


def _count(table: Mapping[str, Any], name: str) -> int:
    value = table.get(name, 1)
    if type(value) is not int or not 1 <= value <= _MOST_DEVICES:
        raise MachineError(f"{name} is {value!r}; a whole number from 1 to {_MOST_DEVICES:,} is expected")
    return value


def _rate(table: Mapping[str, Any], name: str, kind: str, path: str, source: str) -> Quantity:
    found = read_quantity(_need(table, name, path), kind, field=f"{path}{name}", source=source)
    if found.low <= 0:
        raise MachineError(f"{path}{name} is zero; it must be more, or left out with what needs it")
    return found


def _size(table: Mapping[str, Any], name: str, path: str) -> float:
    return _positive(read_number(_need(table, name, path), "size", field=f"{path}{name}"), f"{path}{name}")


def _optional(table: Mapping[str, Any], name: str, kind: str, path: str, source: str) -> Quantity | None:
    return None if name not in table else read_quantity(table[name], kind, field=f"{path}{name}", source=source)


def _positive(value: float, field: str) -> float:
    if value <= 0:
        raise MachineError(f"{field} is zero; it must be more")
    return value
