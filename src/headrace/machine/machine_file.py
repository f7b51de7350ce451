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
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from headrace.dtypes import ARITHMETIC_FORMATS, DTYPES
from headrace.errors import MachineError, near_names
from headrace.machine.compute_curve import UNMEASURED, Arithmetic, ComputeCurve, CurvePoint
from headrace.machine.machine import Copies, Disk, Host, Link, Machine, Processor
from headrace.machine.quantity import Quantity
from headrace.machine.toml_table import TomlTable
from headrace.machine.unit_text import read_number, write_number, write_quantity

ROLES = ("host", "scale_up", "network")
KINDS = ("gpu", "tpu", "asic", "apple_soc", "soc", "cpu")
_TOP = ("name", "devices", "nodes", "processor", "host", "disk", "links", "others", "notes", "busy")
_MOST_DEVICES = 1_000_000

# Constants by their name in a file: the attribute, and the kind of quantity.
_PROCESSOR = {
    "memory_rate": ("memory_bytes_per_s", "rate"),
    "achievable": ("achievable", "share"),
    "power": ("power_w", "power"),
    "rent": ("rent_usd_per_h", "rent"),
    "price": ("price_usd", "price"),
}
_HOST = {"memory_rate": ("memory_bytes_per_s", "rate"), "flops": ("flops", "flops"), "power": ("power_w", "power")}
_DISK = _LINK = {"rate": ("bytes_per_s", "rate"), "latency": ("latency_s", "time")}
_COPIES = {
    "rate": ("bytes_per_s", "rate"),
    "while_computing": ("while_computing_bytes_per_s", "rate"),
    "pageable": ("pageable_bytes_per_s", "rate"),
    "pageable_back": ("pageable_back_bytes_per_s", "rate"),
    "latency": ("latency_s", "time"),
}
_ARITHMETIC = {
    "block_overhead": ("block_overhead_s", "time"),
    "pass_overhead": ("pass_overhead_s", "time"),
    "slowdown_while_reading": ("slowdown_while_reading", "factor"),
    "slowdown_of_reading": ("slowdown_of_reading", "factor"),
}
_ASSUMED = {
    "achievable": Quantity(0.7, 0.5, 0.9, "assumed: large products reach 50-90 % of the peak"),
    "latency": Quantity.of(0.0, "part of the rate"),
}
"""what is taken where a file does not say it"""


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
        raw["host"] = {
            "memory": write_number(machine.host.memory_bytes, "size"),
            **_written(machine.host, _HOST),
            **_arithmetic_to_toml(machine.host.arithmetic),
        }
    if machine.disk is not None:
        disk = machine.disk
        raw["disk"] = {
            **({} if disk.size_bytes is None else {"size": write_number(disk.size_bytes, "size")}),
            **_written(disk, _DISK),
            "chunk": write_number(disk.chunk_bytes, "size"),
            "threads": disk.threads,
        }
    links = {
        name: _written(link, _LINK) | ({} if link.uplink is None else {"uplink": link.uplink})
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
        about = table.table("host").only(("memory", *_HOST, "arithmetic"))
        constants = _constants(about, Host, _HOST)
        host = Host(memory_bytes=about.size("memory"), arithmetic=_arithmetic(about), **constants)
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
    table.only(("name", "kind", "memory", "flops", *_PROCESSOR, "arithmetic", "device", "free", "copies"))
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
    constants = _constants(table, Processor, _PROCESSOR)
    share = constants["achievable"]
    if not 0 < share.low <= share.high <= 1:
        raise MachineError(f"{table.path}achievable is a share above 0 and up to 1, not {share.expected}")
    return Processor(
        name=table.text("name"),
        kind=kind,
        memory_bytes=table.size("memory"),
        flops={name: flops.rate(name, "flops") for name in flops.raw if name != "source"},
        arithmetic=_arithmetic(table),
        device=table.text("device") if "device" in table else "",
        free_bytes=None if "free" not in table else read_number(table.raw["free"], "size", field=f"{table.path}free"),
        copies=_copies(table.table("copies")) if "copies" in table else None,
        **constants,
    )


def _constants(table: TomlTable, made: type, names: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Read those that the table gives, or what is assumed; raises MachineError for a needed one that is neither."""
    needed = {field.name for field in fields(made) if field.default is MISSING}
    found = {}
    for name, (attribute, kind) in names.items():
        if name in table or name in _ASSUMED or attribute in needed:
            sure = attribute in needed and name not in _ASSUMED
            found[attribute] = table.rate(name, kind) if sure else table.optional(name, kind) or _ASSUMED[name]
    return found


def _arithmetic(owner: TomlTable) -> Arithmetic:
    if "arithmetic" not in owner:
        return UNMEASURED
    table = owner.table("arithmetic").only((*_ARITHMETIC, "curves"))
    constants, curves = _constants(table, Arithmetic, _ARITHMETIC), tuple(map(_curve, table.tables("curves")))
    try:
        return Arithmetic(curves=curves, source=table.source, **constants)
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
    table.only((*_COPIES, "page_locked"))
    return Copies(**_constants(table, Copies, _COPIES), page_locked=table.flag("page_locked"))


def _disk(table: TomlTable) -> Disk:
    table.only(("size", *_DISK, "chunk", "threads"))
    chunk_bytes = table.size("chunk") if "chunk" in table else float(Disk.chunk_bytes)
    if not chunk_bytes.is_integer():
        raise MachineError(f"{table.path}chunk is {table.raw['chunk']!r}, no whole number of bytes")
    return Disk(
        **_constants(table, Disk, _DISK),
        size_bytes=table.size("size") if "size" in table else None,
        chunk_bytes=int(chunk_bytes),
        threads=table.whole("threads", Disk.threads, most=1023),
    )


def _link(name: str, table: TomlTable) -> Link:
    table.only((*_LINK, "uplink"))
    uplink = table.text("uplink") if "uplink" in table else None
    return Link(name=name, **_constants(table, Link, _LINK), uplink=uplink)


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
        **_written(processor, _PROCESSOR),
        "flops": _quantities({name: (rate, "flops") for name, rate in processor.flops.items()}),
        **_arithmetic_to_toml(processor.arithmetic),
    }
    if processor.copies is not None:
        made["copies"] = _written(processor.copies, _COPIES) | {"page_locked": processor.copies.page_locked}
    return made


def _arithmetic_to_toml(arithmetic: Arithmetic) -> dict[str, Any]:
    if arithmetic == UNMEASURED:
        return {}
    curves = [
        {
            "compute_dtype": curve.compute_dtype,
            "stored_dtype": curve.stored_dtype,
            "tokens": [point.tokens for point in curve.points],
            "time_per_weight": [write_number(point.seconds_per_parameter, "time") for point in curve.points],
        }
        for curve in arithmetic.curves
    ]
    return {"arithmetic": {**_written(arithmetic, _ARITHMETIC, source=arithmetic.source), "curves": curves}}


def _written(made: Any, names: Mapping[str, tuple[str, str]], *, source: str = "") -> dict[str, Any]:
    """Write the constants that are not what they are by default."""
    default = {field.name: field.default for field in fields(made)}
    given = {name: (getattr(made, attribute), kind) for name, (attribute, kind) in names.items()}
    return _quantities({name: given[name] for name in names if given[name][0] != default[names[name][0]]}, source)


def _quantities(given: Mapping[str, tuple[Quantity, str]], source: str = "") -> dict[str, Any]:
    """Write quantities; the source of most of them once, before them."""
    common = source or Counter(quantity.source for quantity, _ in given.values()).most_common(1)[0][0]
    return {"source": common} | {
        name: write_quantity(quantity, kind, default_source=common) for name, (quantity, kind) in given.items()
    }
