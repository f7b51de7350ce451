"""Machines as TOML: every size and rate with its unit, every link by name; read back, a machine is the same.

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

[disk]
rate = "7GB/s"

[links.host]
rate = "24GB/s"
uplink = "bridge"
[links.bridge]
rate = "30GB/s"

`source` in a table is that of all its constants which name none. `headrace probe` adds what it measured: `arithmetic`
of processor and host with its curves, `copies` of an accelerator in place of `links.host`, `others`, and where other
work went on meanwhile `busy`, its share.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.dtypes import ARITHMETIC_FORMATS, DTYPES
from headrace.errors import MachineError, near_names
from headrace.machine.compute_curve import UNMEASURED, Arithmetic, ComputeCurve, CurvePoint
from headrace.machine.machine import Copies, Disk, Host, Link, Machine, Processor
from headrace.machine.quantity import Quantity
from headrace.machine.toml_table import TomlTable
from headrace.machine.unit_text import read_number, write_number, write_quantity

"""of arithmetic"""
ROLES = ("host", "scale_up", "network")
KINDS = ("gpu", "tpu", "asic", "apple_soc", "soc", "cpu")
_TOP = ("name", "devices", "nodes", "processor", "host", "disk", "links", "others", "notes", "busy")
_PROCESSOR = ("name", "kind", "memory", "memory_rate", "flops", "achievable", "power", "rent", "price")
_MEASURED = ("arithmetic", "device", "free", "copies")
_ARITHMETIC = {
    "block_overhead": ("block_overhead_s", "time"),
    "pass_overhead": ("pass_overhead_s", "time"),
    "slowdown_while_reading": ("slowdown_while_reading", "factor"),
    "slowdown_of_reading": ("slowdown_of_reading", "factor"),
}
_COPIES = {
    "rate": ("bytes_per_s", "rate"),
    "while_computing": ("while_computing_bytes_per_s", "rate"),
    "pageable": ("pageable_bytes_per_s", "rate"),
    "pageable_back": ("pageable_back_bytes_per_s", "rate"),
}
_ACHIEVABLE = Quantity(0.7, 0.5, 0.9, "assumed: large products reach 50-90 % of the peak")
_AT_ONCE = Quantity.of(0.0, "part of the rate")
_MOST_DEVICES = 1_000_000


def load_machine(path: Path) -> Machine:
    """Read a machine file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MachineError(f"the machine file {path} cannot be read: {error}") from error
    return machine_from_toml(text, origin=str(path))


def machine_from_toml(text: str, *, origin: str) -> Machine:
    """Read a description; raises MachineError that names `origin`, the field, and what is expected there."""
    try:
        return _machine(TomlTable(tomllib.loads(text), source="the machine file").only(_TOP))
    except tomllib.TOMLDecodeError as error:
        raise MachineError(f"{origin} is not a machine description, not even TOML: {error}") from error
    except (MachineError, RecursionError) as error:
        raise MachineError(
            f"{origin} is not a machine description: {error}; `headrace probe` writes a complete one, and so does "
            "`headrace machines NAME --toml`"
        ) from error


def machine_to_toml(machine: Machine) -> str:
    """Write a description; `machine_from_toml` is its inverse."""
    import tomli_w  # not needed to read one

    raw: dict[str, Any] = {"name": machine.name, "devices": machine.devices, "nodes": machine.nodes}
    if machine.notes:
        raw["notes"] = list(machine.notes)
    if machine.busy:
        raw["busy"] = machine.busy
    raw["processor"] = _processor_to_toml(machine.processor)
    if machine.host is not None:
        host = machine.host
        raw["host"] = {
            "memory": write_number(host.memory_bytes, "size"),
            **_quantities(
                memory_rate=(host.memory_bytes_per_s, "rate"),
                flops=(host.flops, "flops"),
                power=(host.power_w, "power"),
            ),
            **_arithmetic_to_toml(host.arithmetic),
        }
    if machine.disk is not None:
        disk = machine.disk
        raw["disk"] = {
            **({} if disk.size_bytes is None else {"size": write_number(disk.size_bytes, "size")}),
            **_quantities(rate=(disk.bytes_per_s, "rate"), latency=(disk.latency_s, "time")),
            "chunk": write_number(disk.chunk_bytes, "size"),
            "threads": disk.threads,
        }
    links = {
        name: _quantities(rate=(link.bytes_per_s, "rate"), latency=(link.latency_s, "time"))
        | ({} if link.uplink is None else {"uplink": link.uplink})
        for name, link in machine.links.items()
        if name != "host" or machine.processor.copies is None
    }
    if links:
        raw["links"] = links
    if machine.others:
        raw["others"] = [_processor_to_toml(other) for other in machine.others]
    return tomli_w.dumps(raw)


# -- reading ----------------------------------------------------------------------------------------------------------


def _machine(table: TomlTable) -> Machine:
    processor = read_processor(table.table("processor"))
    described = table.table("links", {})
    links = {name: _link(name, described.table(name)) for name in described.raw}
    if processor.copies is not None:
        if "host" in links:
            raise MachineError("links.host stands beside processor.copies, which says the same; leave it out")
        links["host"] = processor.copies.link()
    host = None
    if "host" in table:
        about = table.table("host").only(("memory", "memory_rate", "flops", "power", "arithmetic"))
        host = Host(
            memory_bytes=about.size("memory"),
            memory_bytes_per_s=about.rate("memory_rate"),
            flops=about.rate("flops", "flops"),
            power_w=about.optional("power", "power"),
            arithmetic=_arithmetic(about),
        )
    devices, nodes = (table.whole(name, 1, most=_MOST_DEVICES) for name in ("devices", "nodes"))
    if devices * nodes > _MOST_DEVICES:
        raise MachineError(f"{nodes:,} nodes of {devices:,} devices are more than {_MOST_DEVICES:,} devices")
    machine = Machine(
        name=table.text("name"),
        processor=processor,
        devices=devices,
        nodes=nodes,
        host=host,
        disk=_disk(table.table("disk")) if "disk" in table else None,
        links=links,
        others=tuple(map(read_processor, table.tables("others"))),
        notes=table.texts("notes"),
        busy=read_number(table.raw["busy"], "share", field="busy") if "busy" in table else 0.0,
    )
    _used(links, host)
    return machine


def read_processor(table: TomlTable) -> Processor:
    """Read a processor's table; raises MachineError that names the field."""
    table.only((*_PROCESSOR, *_MEASURED))
    kind = table.text("kind")
    if kind not in KINDS:
        raise MachineError(f"{table.path}kind is {kind!r}; {near_names(kind, KINDS)}known: {', '.join(KINDS)}")
    flops = table.table("flops")
    if not flops.raw:
        raise MachineError(f'{table.path}flops is empty; it lists rates by format, such as bf16 = "312TFLOPS"')
    for name in set(flops.raw) - {*ARITHMETIC_FORMATS, "source"}:
        raise MachineError(
            f"{flops.path}{name} is no format of arithmetic; {near_names(name, ARITHMETIC_FORMATS)}known: "
            + ", ".join(ARITHMETIC_FORMATS)
        )
    if not {dtype.short_name for dtype in DTYPES.values()} & set(flops.raw):
        raise MachineError(f"{table.path}flops lists no 16- or 32-bit arithmetic, which every model needs; add bf16")
    share = table.quantity("achievable", "share", _ACHIEVABLE)
    if not 0 < share.low <= share.high <= 1:
        raise MachineError(f"{table.path}achievable is a share above 0 and up to 1, not {share.expected}")
    return Processor(
        name=table.text("name"),
        kind=kind,
        memory_bytes=table.size("memory"),
        memory_bytes_per_s=table.rate("memory_rate"),
        flops={name: flops.rate(name, "flops") for name in flops.raw if name != "source"},
        achievable=share,
        power_w=table.optional("power", "power"),
        rent_usd_per_h=table.optional("rent", "rent"),
        price_usd=table.optional("price", "price"),
        arithmetic=_arithmetic(table),
        device=table.text("device") if "device" in table else "",
        free_bytes=None if "free" not in table else read_number(table.raw["free"], "size", field=f"{table.path}free"),
        copies=_copies(table.table("copies")) if "copies" in table else None,
    )


def _arithmetic(owner: TomlTable) -> Arithmetic:
    if "arithmetic" not in owner:
        return UNMEASURED
    table = owner.table("arithmetic").only((*_ARITHMETIC, "curves"))
    read = {attribute: table.optional(name, kind) for name, (attribute, kind) in _ARITHMETIC.items()}
    given = {attribute: quantity for attribute, quantity in read.items() if quantity is not None}
    curves = tuple(map(_curve, table.tables("curves")))
    try:
        return Arithmetic(curves=curves, source=table.source, **given)
    except MachineError as error:
        raise MachineError(f"{table.path}{error}") from None


def _curve(table: TomlTable) -> ComputeCurve:
    table.only(("compute_dtype", "stored_dtype", "tokens", "time_per_weight"))
    tokens, times = table.array("tokens"), table.array("time_per_weight")
    if len(tokens) != len(times):
        raise MachineError(f"{table.path}tokens has {len(tokens)} entries and time_per_weight {len(times)}")
    points = []
    for count, time in zip(tokens, times, strict=True):
        if type(count) is not int:
            raise MachineError(f"{table.path}tokens holds {count!r} where a whole number is expected")
        points.append(CurvePoint(count, read_number(time, "time", field=f"{table.path}time_per_weight")))
    dtypes = {name: table.text(name) for name in ("compute_dtype", "stored_dtype")}
    try:
        return ComputeCurve(**dtypes, points=tuple(points))
    except MachineError as error:
        raise MachineError(f"{table.path[:-1]} (tokens, time_per_weight): {error}") from None


def _copies(table: TomlTable) -> Copies:
    table.only((*_COPIES, "latency", "page_locked"))
    rates = {attribute: table.rate(name) for name, (attribute, _) in _COPIES.items()}
    latency_s = table.quantity("latency", "time", _AT_ONCE)
    return Copies(**rates, latency_s=latency_s, page_locked=table.flag("page_locked"))


def _disk(table: TomlTable) -> Disk:
    table.only(("size", "rate", "latency", "chunk", "threads"))
    chunk_bytes = table.size("chunk") if "chunk" in table else float(Disk.chunk_bytes)
    if not chunk_bytes.is_integer():
        raise MachineError(f"{table.path}chunk is {table.raw['chunk']!r}, no whole number of bytes")
    return Disk(
        bytes_per_s=table.rate("rate"),
        latency_s=table.quantity("latency", "time", _AT_ONCE),
        size_bytes=table.size("size") if "size" in table else None,
        chunk_bytes=int(chunk_bytes),
        threads=table.whole("threads", Disk.threads, most=1023),
    )


def _link(name: str, table: TomlTable) -> Link:
    table.only(("rate", "latency", "uplink"))
    return Link(
        name=name,
        bytes_per_s=table.rate("rate"),
        latency_s=table.quantity("latency", "time", _AT_ONCE),
        uplink=table.text("uplink") if "uplink" in table else None,
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


# -- writing ----------------------------------------------------------------------------------------------------------


def _processor_to_toml(processor: Processor) -> dict[str, Any]:
    made = {
        "name": processor.name,
        "kind": processor.kind,
        **({"device": processor.device} if processor.device else {}),
        "memory": write_number(processor.memory_bytes, "size"),
        **({} if processor.free_bytes is None else {"free": write_number(processor.free_bytes, "size")}),
        **_quantities(
            memory_rate=(processor.memory_bytes_per_s, "rate"),
            achievable=(processor.achievable, "share"),
            power=(processor.power_w, "power"),
            rent=(processor.rent_usd_per_h, "rent"),
            price=(processor.price_usd, "price"),
        ),
        "flops": _quantities(**{name: (rate, "flops") for name, rate in processor.flops.items()}),
        **_arithmetic_to_toml(processor.arithmetic),
    }
    if processor.copies is not None:
        copies = processor.copies
        rates = {name: (getattr(copies, attribute), kind) for name, (attribute, kind) in _COPIES.items()}
        made["copies"] = _quantities(**rates, latency=(copies.latency_s, "time")) | {"page_locked": copies.page_locked}
    return made


def _arithmetic_to_toml(arithmetic: Arithmetic) -> dict[str, Any]:
    if arithmetic == UNMEASURED:
        return {}
    constants = {
        name: (getattr(arithmetic, attribute), kind)
        for name, (attribute, kind) in _ARITHMETIC.items()
        if getattr(arithmetic, attribute) != getattr(UNMEASURED, attribute)
    }
    curves = [
        {
            "compute_dtype": curve.compute_dtype,
            "stored_dtype": curve.stored_dtype,
            "tokens": [point.tokens for point in curve.points],
            "time_per_weight": [write_number(point.seconds_per_parameter, "time") for point in curve.points],
        }
        for curve in arithmetic.curves
    ]
    return {"arithmetic": {**_quantities(arithmetic.source, **constants), "curves": curves}}


def _quantities(source: str = "", /, **given: tuple[Quantity | None, str]) -> dict[str, Any]:
    """Write those that are known; the source of most of them once, before them."""
    known = {name: (quantity, kind) for name, (quantity, kind) in given.items() if quantity is not None}
    common = source or Counter(quantity.source for quantity, _ in known.values()).most_common(1)[0][0]
    return {"source": common} | {
        name: write_quantity(quantity, kind, default_source=common) for name, (quantity, kind) in known.items()
    }
