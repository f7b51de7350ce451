"""Machines by name: `h100`, `8xa100-80`, `4x8xh100` (four computers of eight), `dgx-2`, `4xv100-32@dgx-2`, or a file.

The facts lie in `catalogue/processors.toml`, `links.toml` and `systems.toml`, each with its source. A processor that is
named alone gets the computer that such processors are usually found in.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from headrace.errors import MachineError
from headrace.planning.machine import Host, Link, Machine, Processor
from headrace.planning.machine_file import load_machine
from headrace.planning.near_names import near_names
from headrace.planning.quantity import Quantity
from headrace.planning.unit_text import read_number, read_quantity

MOST_DEVICES = 1_000_000
_ASSUMED_ACHIEVABLE = Quantity(0.7, 0.5, 0.9, "assumed: large products reach 50-90 % of the peak")
_ASSUMED_HOST_LINK = Quantity(52e9, 24e9, 225e9, "assumed: no source names the link; between PCIe 4 and NVLink-C2C")
_CONSUMER = re.compile(r"^(RTX|RX|Titan)")
_HOST_LATENCY = Quantity(10e-6, 3e-6, 30e-6, "estimate: one asynchronous copy")
_DISK_LATENCY = Quantity(100e-6, 20e-6, 500e-6, "estimate: one read request")
_PEER_LATENCY = Quantity(4e-6, 2e-6, 10e-6, "formulas.md section 5: 4-7 us per collective within a node")
_NETWORK_LATENCY = Quantity(12e-6, 8e-6, 50e-6, "0.6 us on the wire, 10-15 us of software")
_PCIE_PEER_SHARE = 0.5
"""devices without a link of their own exchange over the host's bus, in and out of its memory"""


@dataclass(frozen=True, kw_only=True)
class ProcessorEntry:
    """A processor of the catalogue with the names it goes by and the links it comes with."""

    processor: Processor
    aliases: tuple[str, ...]
    source: str
    notes: str
    scale_up_name: str | None
    scale_up: Quantity | None
    host_link_name: str | None
    host_link: Quantity | None


@dataclass(frozen=True, kw_only=True)
class LinkEntry:
    """A link, memory, disk or network of the catalogue: achieved rate."""

    name: str
    kind: str
    rate: Quantity
    nominal_bytes_per_s: float
    notes: str


def find_machine(text: str) -> Machine:
    """Resolve a name, a count of it, or the path of a machine file.

    Raises MachineError with near matches for what is unknown, and for counts that cannot be meant.
    """
    asked = text.strip()
    path = Path(asked).expanduser()
    if asked and path.is_file():
        return load_machine(path)
    if asked.endswith(".toml"):
        raise MachineError(f"the machine file {asked} does not exist")
    nodes, count, name, system = _parse(asked)
    known = _names()
    key = _key(name)
    if key not in known:
        raise MachineError(
            f"there is no machine {name!r} in the catalogue; {near_names(key, known)}`headrace machines` lists them"
        )
    if system is not None:
        if _key(system) not in _systems():
            raise MachineError(
                f"there is no system {system!r} in the catalogue; {near_names(_key(system), _systems())}"
                f"known: {', '.join(sorted({entry['name'] for entry in _systems().values()}))}"
            )
        made = _system(_systems()[_key(system)], None)
        if key in _processors() and _processors()[key].processor.name != made.processor.name:
            made = _system(_systems()[_key(system)], _processors()[key])
        return _counted(made, nodes, count, text=asked)
    kind = known[key]
    if kind == "system":
        made = _system(_systems()[key], None)
        if nodes is not None:
            raise MachineError(f"{asked!r}: {name} is a whole computer; write {nodes * (count or 1)}x{name}")
        return _named(replace(made, nodes=count or 1), asked)
    if kind == "cpu":
        made = _cpu(_cpus()[key])
        return _counted(made, nodes, count, text=asked)
    return _counted(_usual(_processors()[key]), nodes, count, text=asked)


def processor_entries() -> tuple[ProcessorEntry, ...]:
    """All processors, in the file's order."""
    return tuple({id(entry): entry for entry in _processors().values()}.values())


def link_entries() -> tuple[LinkEntry, ...]:
    """All links, memories, disks and networks."""
    return tuple(_links().values())


def system_names() -> tuple[str, ...]:
    """Names of whole computers, by their first alias."""
    named = [entry["aliases"][0] for entry in _catalogue("systems")["system"] + _catalogue("systems")["cpu"]]
    return tuple(named)


def with_parts(
    machine: Machine,
    *,
    host_link: Quantity | None = None,
    storage: Quantity | None = None,
    scale_up: Quantity | None = None,
    network: Quantity | None = None,
    host_memory_bytes: float | None = None,
    device_memory_bytes: float | None = None,
) -> Machine:
    """The same machine with some parts exchanged: what a source states about its own computer."""
    links = dict(machine.links)
    latencies = {
        "host": _HOST_LATENCY,
        "storage": _DISK_LATENCY,
        "scale_up": _PEER_LATENCY,
        "network": _NETWORK_LATENCY,
    }
    for role, rate in (("host", host_link), ("storage", storage), ("scale_up", scale_up), ("network", network)):
        if rate is not None:
            former = links.get(role)
            uplink = None if former is None else former.uplink
            latency = latencies[role] if former is None else former.latency_s
            links[role] = Link(name=role, bytes_per_s=rate, latency_s=latency, uplink=uplink)
    host = machine.host
    if host is not None and host_memory_bytes is not None:
        host = replace(host, memory_bytes=host_memory_bytes)
    processor = machine.processor
    if device_memory_bytes is not None:
        processor = replace(processor, memory_bytes=device_memory_bytes)
    return replace(machine, links=links, host=host, processor=processor)


# -- names --------------------------------------------------------------------------------------------------------


def _key(name: str) -> str:
    """Bring a name into the form that aliases have: lower case, dashes."""
    key = re.sub(r"[\s_/]+", "-", name.strip().lower())
    for maker in ("nvidia-geforce-", "nvidia-", "amd-radeon-", "amd-", "google-", "geforce-", "tesla-"):
        key = key.removeprefix(maker)
    key = re.sub(r"^(rtx|rx|gtx|a|v|h|b)-?(\d{3,4})(?=-|$)", _hyphenated, key)
    return key


def _hyphenated(match: re.Match[str]) -> str:
    return f"{match[1]}-{match[2]}" if match[1] in {"rtx", "rx", "gtx"} else f"{match[1]}{match[2]}"


@functools.cache
def _names() -> dict[str, str]:
    return (
        dict.fromkeys(_systems(), "system") | dict.fromkeys(_cpus(), "cpu") | dict.fromkeys(_processors(), "processor")
    )


def _parse(text: str) -> tuple[int | None, int | None, str, str | None]:
    """Split `4x8xh100@system` into nodes, devices, name and system."""
    body, _, system = text.partition("@")
    numbers: list[int] = []
    rest = body
    while match := re.match(r"\s*([+-]?\d+(?:\.\d+)?)\s*[x*]\s*", rest, re.IGNORECASE):
        if not re.fullmatch(r"\d+", match[1]) or not 1 <= int(match[1]) <= MOST_DEVICES:
            raise MachineError(f"{text!r}: {match[1]} is no number of devices; 1 to {MOST_DEVICES:,} are")
        numbers.append(int(match[1]))
        rest = rest[match.end() :]
    if not rest.strip():
        raise MachineError(f"{text!r} names no machine; write for instance h100, 8xh100 or 2x8xh100")
    if len(numbers) > 2:
        raise MachineError(f"{text!r} has {len(numbers)} counts; computers and devices in each are what is counted")
    if len(numbers) == 2 and numbers[0] * numbers[1] > MOST_DEVICES:
        raise MachineError(f"{text!r} has more than {MOST_DEVICES:,} devices")
    nodes, count = (numbers[0], numbers[1]) if len(numbers) == 2 else (None, numbers[0] if numbers else None)
    return nodes, count, rest.strip(), system.strip() or None


def _counted(machine: Machine, nodes: int | None, count: int | None, *, text: str) -> Machine:
    """Give a machine its number of devices: so many in each of `nodes`, or spread over full nodes."""
    full = machine.devices
    if count is None:
        count = 1 if nodes is None and "@" not in text else full
    if nodes is not None:
        return _named(_with_devices(replace(machine, nodes=nodes), count), text)
    if machine.host is None and count > full:
        return _named(replace(_with_devices(machine, 1), nodes=count), text)  # computers, joined by their network
    if count > full and count % full == 0:
        note = f"{count} devices taken as {count // full} computers of {full}"
        return _named(replace(machine, nodes=count // full, notes=(*machine.notes, note)), text)
    if count > full:
        note = f"{count} devices taken to be in one computer, though {full} are usual"
        machine = replace(machine, notes=(*machine.notes, note))
    return _named(_with_devices(machine, count), text)


def _with_devices(machine: Machine, devices: int) -> Machine:
    """Set the devices per node; where they have no link of their own they exchange over the host's bus."""
    links = dict(machine.links)
    if devices > 1 and "scale_up" not in links and "host" in links:
        rate = links["host"].bytes_per_s.times(_PCIE_PEER_SHARE, "device to device over the host's bus")
        links["scale_up"] = Link(
            name="scale_up",
            bytes_per_s=Quantity(rate.expected, rate.low / 2, rate.high * 1.8, rate.source),
            latency_s=Quantity(12e-6, 6e-6, 30e-6, "estimate: over the host's bus"),
        )
    return replace(machine, devices=devices, links=links)


def _named(machine: Machine, text: str) -> Machine:
    return replace(machine, name=text) if text else machine


# -- making machines ----------------------------------------------------------------------------------------------


def _usual(entry: ProcessorEntry) -> Machine:
    """Return the computer that such a processor is usually found in, with one device."""
    if "NVL72" in (entry.scale_up_name or ""):
        return _assemble(entry.processor.name, entry, _class("rack"), {})
    for made in _catalogue("systems")["class"]:
        if entry.processor.kind in made.get("kinds", ()) and not _CONSUMER.match(entry.processor.name):
            return _assemble(entry.processor.name, entry, made, {})
    return _assemble(entry.processor.name, entry, _class("desktop"), {})


def _system(raw: Mapping[str, Any], entry: ProcessorEntry | None) -> Machine:
    held = entry if entry is not None else _processors()[_key(raw["processor"])]
    return _assemble(raw["name"], held, _class(raw["class"]), raw)


def _class(name: str) -> Mapping[str, Any]:
    return next(entry for entry in _catalogue("systems")["class"] if entry["name"] == name)


def _assemble(name: str, entry: ProcessorEntry, usual: Mapping[str, Any], own: Mapping[str, Any]) -> Machine:
    raw = {**usual, **own}
    where = f"catalogue, {name}"
    host = None
    links: dict[str, Link] = {}
    if "host_memory" in raw:
        rate = read_quantity(raw["host_memory_rate"], "rate", field=f"{where}: host_memory_rate", source=where)
        host = Host(
            memory_bytes=read_number(raw["host_memory"], "size", field=f"{where}: host_memory"),
            memory_bytes_per_s=rate,
            flops=read_quantity(raw["host_flops"], "flops", field=f"{where}: host_flops", source=where),
        )
        bridge = (
            read_quantity(raw["bridge"], "rate", field=f"{where}: bridge", source=where)
            if "bridge" in raw
            else rate.times(float(raw["bridge_share"]), "what all host links together draw from host memory")
        )
        links["bridge"] = Link(name="bridge", bytes_per_s=bridge, latency_s=Quantity.of(0.0, "part of the links"))
        links["host"] = Link(
            name="host", bytes_per_s=entry.host_link or _ASSUMED_HOST_LINK, latency_s=_HOST_LATENCY, uplink="bridge"
        )
    if "storage" in raw:
        disk = _links()[raw["storage"]]
        count = int(raw.get("storage_count", 1)) if "storage" not in own or "storage_count" in own else 1
        links["storage"] = Link(
            name="storage",
            bytes_per_s=disk.rate.times(count, f"{count} x {disk.name}" if count > 1 else disk.name),
            latency_s=_DISK_LATENCY,
        )
    devices = int(raw.get("devices", 1))
    if entry.scale_up is not None:
        links["scale_up"] = Link(name="scale_up", bytes_per_s=entry.scale_up, latency_s=_PEER_LATENCY)
    if "network" in raw:
        line = _links()[raw["network"]]
        links["network"] = Link(name="network", bytes_per_s=line.rate, latency_s=_NETWORK_LATENCY)
    machine = Machine(
        name=name,
        processor=entry.processor,
        devices=devices,
        host=host,
        disk_bytes=read_number(raw["disk"], "size", field=f"{where}: disk") if "disk" in raw else None,
        links=links,
    )
    return _with_devices(machine, devices)


def _cpu(raw: Mapping[str, Any]) -> Machine:
    where = f"catalogue, {raw['name']}"
    rate = read_quantity(raw["memory_rate"], "rate", field=f"{where}: memory_rate", source=where)
    disk = _links()[raw["storage"]]
    line = _links()[raw.get("network", "Ethernet 10G")]
    return Machine(
        name=raw["name"],
        processor=Processor(
            name=raw["name"],
            kind="cpu",
            memory_bytes=read_number(raw["memory"], "size", field=f"{where}: memory"),
            memory_bytes_per_s=rate,
            flops={"bf16": read_quantity(raw["flops"], "flops", field=f"{where}: flops", source=where)},
            achievable=Quantity(0.6, 0.4, 0.9, "estimate: share of the peak that products reach on CPUs"),
        ),
        devices=1,
        links={
            "storage": Link(name="storage", bytes_per_s=disk.rate, latency_s=_DISK_LATENCY),
            "network": Link(name="network", bytes_per_s=line.rate, latency_s=Quantity(60e-6, 30e-6, 200e-6, "TCP")),
        },
    )


# -- the files ----------------------------------------------------------------------------------------------------


@functools.cache
def _catalogue(name: str) -> dict[str, Any]:
    text = resources.files("headrace.planning").joinpath("catalogue", f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@functools.cache
def _processors() -> dict[str, ProcessorEntry]:
    found: dict[str, ProcessorEntry] = {}
    for raw in _catalogue("processors")["processor"]:
        entry = _processor_entry(raw)
        for alias in {_key(raw["name"]), *(_key(alias) for alias in raw["aliases"])}:
            if alias in found:
                raise MachineError(f"the catalogue has two processors {alias!r}")
            found[alias] = entry
    return found


@functools.cache
def _systems() -> dict[str, dict[str, Any]]:
    return {
        key: raw
        for raw in _catalogue("systems")["system"]
        for key in {_key(raw["name"]), *(_key(alias) for alias in raw["aliases"])}
    }


@functools.cache
def _cpus() -> dict[str, dict[str, Any]]:
    return {
        key: raw
        for raw in _catalogue("systems")["cpu"]
        for key in {_key(raw["name"]), *(_key(alias) for alias in raw["aliases"])}
    }


@functools.cache
def _links() -> dict[str, LinkEntry]:
    found = {}
    for raw in _catalogue("links")["link"]:
        field = f"catalogue, {raw['name']}"
        found[raw["name"]] = LinkEntry(
            name=raw["name"],
            kind=raw["kind"],
            rate=read_quantity(raw["rate"], "rate", field=field, source=f"{raw['name']}: {raw['source']}"),
            nominal_bytes_per_s=read_number(raw["nominal"], "rate", field=field),
            notes=raw.get("notes", ""),
        )
    return found


def _processor_entry(raw: Mapping[str, Any]) -> ProcessorEntry:
    where, source = f"catalogue, {raw['name']}", str(raw["source"])

    def quantity(name: str, kind: str) -> Quantity | None:
        if name not in raw:
            return None
        return read_quantity(raw[name], kind, field=f"{where}: {name}", source=source)

    memory_rate = quantity("memory_rate", "rate")
    if memory_rate is None:
        raise MachineError(f"{where} has no memory_rate")
    scale_up, host_link = raw.get("scale_up"), raw.get("host_link")
    return ProcessorEntry(
        processor=Processor(
            name=raw["name"],
            kind=raw["kind"],
            memory_bytes=read_number(raw["memory"], "size", field=f"{where}: memory"),
            memory_bytes_per_s=memory_rate,
            flops={
                name: read_quantity(value, "flops", field=f"{where}: flops.{name}", source=source)
                for name, value in raw["flops"].items()
            },
            achievable=quantity("achievable", "share") or _ASSUMED_ACHIEVABLE,
            power_w=quantity("power", "power"),
            rent_usd_per_h=quantity("rent", "rent"),
            price_usd=quantity("price", "price"),
        ),
        aliases=tuple(raw["aliases"]),
        source=source,
        notes=str(raw.get("notes", "")),
        scale_up_name=None if scale_up is None else scale_up["name"],
        scale_up=None if scale_up is None else _achieved(scale_up, 0.75, 0.6, 0.9, where),
        host_link_name=None if host_link is None else host_link["name"],
        host_link=None if host_link is None else _host_rate(host_link, where),
    )


def _achieved(raw: Mapping[str, Any], expected: float, low: float, high: float, where: str) -> Quantity:
    """Return what is reached of a nominal rate."""
    rate = read_number(raw["rate"], "rate", field=where)
    return Quantity(rate * expected, rate * low, rate * high, f"{raw['name']}: {expected:.0%} of the nominal rate")


def _host_rate(raw: Mapping[str, Any], where: str) -> Quantity:
    """Return the achieved rate of PCI Express where it was measured, else a share of the nominal."""
    names = {
        "PCIe3 x16": "PCIe 3.0 x16",
        "PCIe4 x16": "PCIe 4.0 x16",
        "PCIe5 x16": "PCIe 5.0 x16",
        "PCIe6 x16": "PCIe 6.0 x16",
    }
    measured = names.get(" ".join(str(raw["name"]).split()[:2]))
    if measured is not None:
        return _links()[measured].rate
    return _achieved(raw, 0.85, 0.7, 0.95, where)
