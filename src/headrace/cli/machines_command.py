"""`headrace machines`: what the catalogue knows of machines, with sources and ranges."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer

from headrace.cli.command import Command
from headrace.cli.options import JsonOption
from headrace.cli.output import Output
from headrace.cli.table import Table
from headrace.machine.catalogue import find_machine, link_entries, processor_entries, system_names
from headrace.machine.compute_curve import UNMEASURED, Arithmetic
from headrace.machine.machine import Link, Machine, Processor
from headrace.machine.machine_file import machine_to_toml
from headrace.machine.quantity import Quantity
from headrace.units import format_bytes, format_number, format_range, format_rate

EXAMPLES = (
    "headrace machines",
    "headrace machines 8xh100",
    "headrace machines dgx-2 --toml > my-machine.toml",
    "headrace machines gb300-nvl72 --json",
)


def machines(
    name: Annotated[
        str | None, typer.Argument(metavar="[MACHINE]", help="One machine in detail: a name, a count of it, or a file.")
    ] = None,
    *,
    toml: Annotated[
        bool, typer.Option("--toml", help="Write it as a machine file, to be changed and used with --machine.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the processors, computers and links that planning knows by name, or describe a machine."""
    output = Output(as_json=as_json)
    if name is None:
        output.json(catalogue_json()) if as_json else _show_all(output)
        return
    machine = find_machine(name)
    if toml:
        output.text(machine_to_toml(machine))
    elif as_json:
        output.json(machine_json(machine))
    else:
        _show_one(output, machine)


def catalogue_json() -> dict[str, Any]:
    """List processors, systems and links, each with its sources."""
    return {
        "processors": [
            _processor_json(entry.processor)
            | {"aliases": list(entry.aliases), "source": entry.source, "notes": entry.notes}
            for entry in processor_entries()
        ],
        "systems": [machine_json(find_machine(name)) for name in system_names()],
        "links": [
            {"name": entry.name, "kind": entry.kind, "bytes_per_s": asdict(entry.rate), "notes": entry.notes}
            for entry in link_entries()
        ],
    }


def machine_json(machine: Machine) -> dict[str, Any]:
    """Describe a machine as a tree, every constant with its range and source."""
    host = machine.host
    return {
        "name": machine.name,
        "nodes": machine.nodes,
        "devices_per_node": machine.devices,
        "devices": machine.num_devices,
        "processor": _processor_json(machine.processor),
        "host": None
        if host is None
        else _without(asdict(host), "power_w", "arithmetic") | _arithmetic(host.arithmetic),
        "disk": None if machine.disk is None else asdict(machine.disk),
        "links": {link.name: _without(asdict(link), "name") for link in machine.links.values()},
        "notes": list(machine.notes),
        **({"busy": machine.busy} if machine.busy else {}),
    }


def _processor_json(processor: Processor) -> dict[str, Any]:
    """A processor; what only a measured one has is left out of the others."""
    unknown = [name for name in ("device", "free_bytes", "copies") if getattr(processor, name) in ("", None)]
    return _without(asdict(processor), "arithmetic", *unknown) | _arithmetic(processor.arithmetic)


def _arithmetic(arithmetic: Arithmetic) -> dict[str, Any]:
    if arithmetic == UNMEASURED:
        return {}
    curves = [asdict(curve) | {"points": [point._asdict() for point in curve.points]} for curve in arithmetic.curves]
    return {"arithmetic": asdict(arithmetic) | {"curves": curves}}


def _without(made: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in made.items() if name not in names}


def _show_all(output: Output) -> None:
    rows = []
    for entry in processor_entries():
        processor = entry.processor
        rows.append(
            [
                entry.aliases[0],
                processor.name,
                format_bytes(processor.memory_bytes),
                format_rate(processor.memory_bytes_per_s.expected),
                f"{format_number(processor.flops['bf16'].expected / 1e12)} T",
                "" if entry.host_link is None else format_rate(entry.host_link.expected),
                "" if entry.scale_up is None else format_rate(entry.scale_up.expected),
                "" if processor.rent_usd_per_h is None else format_number(processor.rent_usd_per_h.expected),
            ]
        )
    columns = ("name", "processor", "memory", "its rate", "bf16/s", "from host", "to others", "$/h")
    output.show(
        Table(columns=columns, rows=rows, least=("processor", "to others", "from host")),
        f"\nWhole computers: {', '.join(system_names())}\n",
        "Write 8xh100 for eight in one computer, 4x8xh100 for four of those; `headrace machines NAME` tells ranges and "
        "sources, and with --toml writes a file to change.",
    )


def _show_one(output: Output, machine: Machine) -> None:
    processor = machine.processor
    lines = [f"{machine.name}: {machine.nodes} x {machine.devices} x {processor.name}"]
    lines.append(
        _line("device memory", format_bytes(processor.memory_bytes), processor.memory_bytes_per_s, format_rate)
    )
    for name, rate in processor.flops.items():
        lines.append(_line("arithmetic", name, rate, lambda value: f"{format_number(value / 1e12)} TFLOP/s"))
    lines.append(_line("of which products reach", "", processor.achievable, lambda value: f"{value:.0%}"))
    if machine.host is not None:
        memory = format_bytes(machine.host.memory_bytes)
        lines.append(_line("host memory", memory, machine.host.memory_bytes_per_s, format_rate))
    if machine.disk is not None:
        size = "" if machine.disk.size_bytes is None else format_bytes(machine.disk.size_bytes)
        lines.append(_line("disk", size, machine.disk.bytes_per_s, format_rate))
    for link in machine.links.values():
        lines.append(_line(_role(link), "", link.bytes_per_s, format_rate))
    for what, amount, text in (
        ("power of a device", processor.power_w, "{} W"),
        ("rent of a device", processor.rent_usd_per_h, "{} $/h"),
        ("price of a device", processor.price_usd, "{} $"),
    ):
        if amount is not None:
            lines.append(_line(what, "", amount, functools.partial(_written, text)))
    told: set[str] = set()
    for line in lines:
        figure, _, source = line.partition("\n")
        output.show(figure, hanging=4)
        if source not in told:
            output.show(source)
        told.add(source)
    output.show(*(f"note: {note}" for note in machine.notes), hanging=2)


def _written(text: str, value: float) -> str:
    return text.format(format_number(value))


def _role(link: Link) -> str:
    words = {
        "host": "host to a device",
        "scale_up": "device to device",
        "network": "computer to computer",
    }
    shared = f", through {link.uplink} with the others" if link.uplink else ""
    return f"{words.get(link.name, link.name)}{shared}"


def _line(what: str, detail: str, quantity: Quantity, text: Callable[[float], str]) -> str:
    span = f" ({format_range(text(quantity.low), text(quantity.high))})" if quantity.low != quantity.high else ""
    head = f"{what}{', ' + detail if detail else ''}"
    return f"  {head:42s} {text(quantity.expected)}{span}\n      {quantity.source}"


MACHINES = Command("machines", machines, EXAMPLES)
