"""Machines by name: `h100`, `8xa100-80`, `4x8xh100` (four computers of eight), `dgx-2`, `4xv100-32@dgx-2`, or a file.

The facts lie in `processors.toml`, `links.toml` and `systems.toml`, each with its source. A processor that is
named alone gets the computer that such processors are usually found in.
"""

from __future__ import annotations

import functools
import math
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from headrace.errors import MachineError, near_names
from headrace.machine.machine import Disk, Host, Link, Machine, Processor
from headrace.machine.machine_file import load_machine, read_processor
from headrace.machine.machine_name import MachineName, entry_named, name_key, parse_machine_name
from headrace.machine.quantity import Quantity
from headrace.machine.toml_table import TomlTable
from headrace.machine.unit_text import read_number, read_quantity
from headrace.paths import is_given

_CPU_ACHIEVABLE = Quantity(0.6, 0.4, 0.9, "estimate: share of the peak that products reach on CPUs")
_ASSUMED_HOST_LINK = Quantity(52e9, 24e9, 225e9, "assumed: no source names the link; between PCIe 4 and NVLink-C2C")
_CONSUMER = re.compile(r"^(RTX|RX|GTX|Titan|Quadro|Arc)")
LATENCIES = {
    "host": Quantity(10e-6, 3e-6, 30e-6, "estimate: one asynchronous copy"),
    "disk": Quantity(100e-6, 20e-6, 500e-6, "estimate: one read request"),
    "scale_up": Quantity(4e-6, 2e-6, 10e-6, "formulas.md section 5: 4-7 us per collective within a node"),
    "network": Quantity(12e-6, 8e-6, 50e-6, "0.6 us on the wire, 10-15 us of software"),
}
"""in seconds, of links by role and of disks, where none was measured"""
_PCIE_PEER_SHARE = 0.5
"""devices without a link of their own exchange over the host's bus, in and out of its memory"""


class ProcessorEntry(NamedTuple):
    """A processor of the catalogue with the names it goes by and the links it comes with."""

    processor: Processor
    aliases: tuple[str, ...]
    source: str
    notes: str
    scale_up: Quantity | None
    host_link: Quantity | None
    usual_class: str | None = None
    """class of computers in `systems.toml`, where its kind does not tell"""


class LinkEntry(NamedTuple):
    """A link, memory, disk or network of the catalogue: achieved rate."""

    name: str
    kind: str
    rate: Quantity
    notes: str


def find_machine(text: str) -> Machine:
    """Resolve a name, a count of it, or the path of a machine file.

    Raises MachineError with near matches for what is unknown, and for invalid counts.
    """
    asked = text.strip()
    path = _existing_file(asked)
    if path is not None:
        return load_machine(path)
    if asked.endswith(".toml"):
        raise MachineError(f"the machine file {asked} does not exist")
    written = parse_machine_name(asked)
    system = entry_named(written.name, _computers("system"))
    if written.system is not None:
        return _counted(_held_by(written), written, usual=False)
    if system is not None:
        if written.nodes is not None:
            times = written.nodes * (written.count or 1)
            raise MachineError(f"{asked!r}: {written.name} is a whole computer; write {times}x{written.name}")
        return replace(_system(system), nodes=written.count or 1, name=asked)
    if (cpu := entry_named(written.name, _computers("cpu"))) is not None:
        return _counted(_cpu(cpu), written)
    if (entry := entry_named(written.name, _processors())) is not None:
        return _counted(_usual(entry), written)
    known = [*_computers("system"), *_computers("cpu"), *_processors()]
    raise MachineError(
        f"there is no machine {_short(written.name)} in the catalogue; {near_names(name_key(written.name), known)}"
        "`headrace machines` lists them"
    )


def _held_by(written: MachineName) -> Machine:
    """Return the system behind the @ with the processor before it."""
    system = entry_named(written.system or "", _computers("system"))
    if system is None:
        raise MachineError(
            f"there is no system {_short(written.system or '')} in the catalogue; "
            f"{near_names(name_key(written.system or ''), _computers('system'))}"
            f"known: {', '.join(sorted({entry['name'] for entry in _computers('system').values()}))}"
        )
    entry = entry_named(written.name, _processors())
    if entry is None:
        raise MachineError(
            f"{written.text!r}: {_short(written.name)} is no processor that a computer could hold; "
            f"{near_names(name_key(written.name), _processors())}`headrace machines` lists them"
        )
    own = _system(system)
    if entry.processor.name == own.processor.name:
        return own
    note = f"{system['name']} with {entry.processor.name} in place of its {own.processor.name}"
    return replace(_system(system, entry), notes=(note,))


def _existing_file(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if text and is_given(path) else None
    except (OSError, RuntimeError, ValueError):  # too long for a path, nobody's home, a zero byte
        return None


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}...")


def processor_entries() -> tuple[ProcessorEntry, ...]:
    """All processors, in the file's order."""
    return tuple({id(entry): entry for entry in _processors().values()}.values())


def link_entries() -> tuple[LinkEntry, ...]:
    """All links, memories, disks and networks."""
    return tuple(_links().values())


def system_names() -> tuple[str, ...]:
    """Names of whole computers, by their first alias."""
    return tuple(entry["aliases"][0] for kind in ("system", "cpu") for entry in _catalogue("systems")[kind])


# -- counts -------------------------------------------------------------------------------------------------------


def _counted(machine: Machine, written: MachineName, *, usual: bool = True) -> Machine:
    """Give a machine its number of devices: so many in each of its nodes, or spread evenly over nodes.

    `usual`: the computer was not named, so it may hold more devices than most of its kind do; else it may not.
    """
    full, nodes, count = machine.devices, written.nodes, written.count
    machine = replace(machine, name=written.text)
    if not usual and count is not None and count > full:
        raise MachineError(
            f"{written.text!r}: {written.system} holds {full} devices; write {math.ceil(count / full)}x{full}x"
            f"{written.name}@{written.system} for as many computers"
        )
    if count is None:
        count = 1 if usual else full
    if nodes is not None:
        return _with_devices(replace(machine, nodes=nodes), count)
    if machine.host is None and count > full:
        return replace(_with_devices(machine, 1), nodes=count)  # computers, joined by their network
    if count <= full:
        return _with_devices(machine, count)
    per_node = next((n for n in range(full, 0, -1) if count % n == 0 and 2 * n > full), None)
    if per_node is not None:
        note = f"{count} devices taken as {count // per_node} computers of {per_node}"
        return _with_devices(replace(machine, nodes=count // per_node, notes=(*machine.notes, note)), per_node)
    if count > 2 * full:
        raise MachineError(
            f"{written.text!r}: {count} devices do not fill equal computers of up to {full}; {count // full * full} or "
            f"{math.ceil(count / full) * full} do, or write how many are in each, as in 2x{full}x{written.name}"
        )
    note = f"{count} devices taken to be in one computer, though {full} are usual"
    return _with_devices(replace(machine, notes=(*machine.notes, note)), count)


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


# -- making machines ----------------------------------------------------------------------------------------------


def _usual(entry: ProcessorEntry) -> Machine:
    """Return the computer that such a processor is usually found in, with one device."""
    processor, usual = entry.processor, entry.usual_class or "desktop"
    if entry.usual_class is None and not _CONSUMER.match(processor.name):
        of_its_kind = (
            made["name"] for made in _catalogue("systems")["class"] if processor.kind in made.get("kinds", ())
        )
        usual = next(of_its_kind, usual)
    return _assemble(processor.name, entry, {"class": usual})


def _system(raw: Mapping[str, Any], entry: ProcessorEntry | None = None) -> Machine:
    return _assemble(raw["name"], entry or _processors()[name_key(raw["processor"])], raw)


def _assemble(name: str, entry: ProcessorEntry, own: Mapping[str, Any]) -> Machine:
    """Put a processor into a computer: what its table says, and of the rest what its class has."""
    usual = next(made for made in _catalogue("systems")["class"] if made["name"] == own["class"])
    raw = {**usual, **({"storage_count": 1} if "storage" in own else {}), **own}
    where = f"catalogue, {name}"
    host, links = None, {}
    table = TomlTable(raw, f"{where}: ", where)
    if "host_memory" in raw:
        rate = table.rate("host_memory_rate")
        host = Host(
            memory_bytes=table.size("host_memory"), memory_bytes_per_s=rate, flops=table.rate("host_flops", "flops")
        )
        share = rate.times(float(raw.get("bridge_share", 1)), "what all host links together draw from host memory")
        bridge = table.quantity("bridge", "rate", share)
        links["bridge"] = Link(name="bridge", bytes_per_s=bridge, latency_s=Quantity.of(0.0, "part of the links"))
        links["host"] = _link("host", entry.host_link or _ASSUMED_HOST_LINK, uplink="bridge")
    if entry.scale_up is not None:
        links["scale_up"] = _link("scale_up", entry.scale_up)
    if "network" in raw:
        links["network"] = _link("network", _links()[raw["network"]].rate)
    disk = None
    if "storage" in raw:
        kind, count = _links()[raw["storage"]], int(raw.get("storage_count", 1))
        disk = Disk(
            bytes_per_s=kind.rate.times(count, f"{count} x {kind.name}" if count > 1 else kind.name),
            latency_s=LATENCIES["disk"],
            size_bytes=table.size("disk") if "disk" in raw else None,
        )
    machine = Machine(name=name, processor=entry.processor, host=host, disk=disk, links=links)
    return _with_devices(machine, int(raw.get("devices", 1)))


def _link(role: str, rate: Quantity, uplink: str | None = None) -> Link:
    return Link(name=role, bytes_per_s=rate, latency_s=LATENCIES[role], uplink=uplink)


def _cpu(raw: Mapping[str, Any]) -> Machine:
    processor = _read(raw, apart_from=("storage", "network"))
    line = _links()[raw.get("network", "Ethernet 10G")].rate
    return Machine(
        name=raw["name"],
        processor=processor if "achievable" in raw else replace(processor, achievable=_CPU_ACHIEVABLE),
        disk=Disk(bytes_per_s=_links()[raw["storage"]].rate, latency_s=LATENCIES["disk"]),
        links={"network": Link(name="network", bytes_per_s=line, latency_s=Quantity(60e-6, 30e-6, 200e-6, "TCP"))},
    )


# -- the files ----------------------------------------------------------------------------------------------------


@functools.cache
def _catalogue(name: str) -> dict[str, Any]:
    text = resources.files("headrace.machine").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _aliases(raw: Mapping[str, Any]) -> set[str]:
    return {name_key(name) for name in (raw["name"], *raw["aliases"])}


@functools.cache
def _processors() -> dict[str, ProcessorEntry]:
    found: dict[str, ProcessorEntry] = {}
    for raw in _catalogue("processors")["processor"]:
        entry = _processor_entry(raw)
        for alias in _aliases(raw):
            if alias in found:
                raise MachineError(f"the catalogue has two processors {alias!r}")
            found[alias] = entry
    return found


@functools.cache
def _computers(kind: str) -> dict[str, dict[str, Any]]:
    """Whole computers, `system` with accelerators and `cpu` without, under every name that they go by."""
    return {key: raw for raw in _catalogue("systems")[kind] for key in _aliases(raw)}


@functools.cache
def _links() -> dict[str, LinkEntry]:
    found = {}
    for raw in _catalogue("links")["link"]:
        field = f"catalogue, {raw['name']}"
        found[raw["name"]] = LinkEntry(
            name=raw["name"],
            kind=raw["kind"],
            rate=read_quantity(raw["rate"], "rate", field=field, source=f"{raw['name']}: {raw['source']}"),
            notes=raw.get("notes", ""),
        )
    return found


def _read(raw: Mapping[str, Any], *, apart_from: Collection[str]) -> Processor:
    where = f"catalogue, {raw['name']}"
    own = {name: value for name, value in raw.items() if name not in {*apart_from, "aliases", "notes"}}
    return read_processor(TomlTable(own, f"{where}: ", where))


def _processor_entry(raw: Mapping[str, Any]) -> ProcessorEntry:
    return ProcessorEntry(
        processor=_read(raw, apart_from=("class", "scale_up", "host_link")),
        aliases=tuple(raw["aliases"]),
        source=str(raw["source"]),
        notes=str(raw.get("notes", "")),
        scale_up=_link_rate(raw.get("scale_up"), (0.75, 0.6, 0.9)),
        host_link=_link_rate(raw.get("host_link"), (0.85, 0.7, 0.95)),
        usual_class=raw.get("class"),
    )


def _link_rate(link: str | Mapping[str, Any] | None, shares: tuple[float, float, float]) -> Quantity | None:
    """What a link of the catalogue achieves, or what is usually reached of another one's nominal rate."""
    if link is None or isinstance(link, str):
        return None if link is None else _links()[link].rate
    nominal = read_number(link["rate"], "rate", field=link["name"])
    expected, low, high = (nominal * share for share in shares)
    return Quantity(expected, low, high, f"{link['name']}: {shares[0]:.0%} of the nominal rate")
