"""A machine as a tree: what computes, the memories around it, and links, several of which may share an uplink.

A machine is `nodes` equal computers of `devices` equal processors each (a laptop: one node, one device). Weights may
lie in the device's memory, the node's host memory or the node's disk:

    disk ---> host memory --host link--> device 0 ... device n-1      (host links may share an uplink)
    device <--scale-up--> device, within a node          node <--network--> node

A computer without accelerators is a machine whose processor is the CPU, and whose memory is the processor's. Rates are
bytes per second in one direction. Every constant is a Quantity: it carries its source (a catalogue, a file, a
measurement) and its range. What `headrace probe` measured beyond peaks and rates is there too: arithmetic as curves,
what copies do, overheads; with it a machine is calibrated, and plans for it are simulated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from headrace.dtypes import STORED_BYTES
from headrace.errors import InvalidRequestError, MachineError
from headrace.machine.compute_curve import UNMEASURED, Arithmetic, ComputeCurve
from headrace.machine.quantity import Quantity

DEVICE_RESERVE_SHARE = 0.06
"""of a device's memory, kept by its driver, the libraries' own buffers and fragmentation"""
HOST_RESERVE_SHARE = 0.1


class Tier(StrEnum):
    """Where bytes may lie."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, kw_only=True)
class Link:
    """One direction of a connection. `uplink` names a link that this one's bytes pass as well, shared with others."""

    name: str
    bytes_per_s: Quantity
    latency_s: Quantity
    uplink: str | None = None


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Measured copies between a host's memory and a device, nothing else going on unless it says so."""

    bytes_per_s: Quantity
    """from page-locked memory; as from pageable memory where the system locks none"""
    while_computing_bytes_per_s: Quantity
    """during matrix products of few tokens, which take as much of the device's memory rate as there is"""
    pageable_bytes_per_s: Quantity
    pageable_back_bytes_per_s: Quantity
    """from the device"""
    latency_s: Quantity
    """of a copy of 4 KiB, from the call until the host knows that it is done"""
    page_locked: bool
    """whether the system page-locked memory when this was measured"""

    def link(self) -> Link:
        """The link that these copies went over: a copy beside products may be slower than its range says."""
        rate = self.bytes_per_s
        low = min(rate.low, self.while_computing_bytes_per_s.expected)
        return Link(name="host", bytes_per_s=replace(rate, low=low), latency_s=self.latency_s)


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What computes: a GPU, a TPU, or a CPU with its memory."""

    name: str
    kind: str
    """gpu, tpu, asic, apple_soc, soc, cpu"""
    memory_bytes: float
    memory_bytes_per_s: Quantity
    flops: Mapping[str, Quantity]
    """peak dense operations per second by format of the arithmetic: fp32, bf16, fp8, int8, fp4"""
    achievable: Quantity
    """share of the bf16 peak that large matrix products reach"""
    power_w: Quantity | None = None
    rent_usd_per_h: Quantity | None = None
    price_usd: Quantity | None = None
    arithmetic: Arithmetic = UNMEASURED
    device: str = ""
    """as users write it (cuda:0), where it was measured and is not the CPU"""
    free_bytes: float | None = None
    """when it was measured; the rest was in use by its driver and by other processes"""
    copies: Copies | None = None

    def __post_init__(self) -> None:
        if not 0 < self.memory_bytes < math.inf:
            raise MachineError(f"{self.name}: memory is {self.memory_bytes} bytes; it must be more than 0 and finite")
        if self.free_bytes is not None and not 0 <= self.free_bytes <= self.memory_bytes:
            raise MachineError(
                f"{self.name}: free is {self.free_bytes} bytes; it must be at most memory, {self.memory_bytes}"
            )
        if bool(self.device) != (self.copies is not None):
            raise MachineError(f"{self.name}: device and copies are given together, for a measured accelerator")
        if self.device and not self.arithmetic.curves:
            raise MachineError(f"{self.name}: curves is empty; it must hold the arithmetic of one dtype at least")

    @property
    def available_bytes(self) -> int:
        """Memory that was free when it was measured; all of it where that is not known."""
        return int(self.memory_bytes if self.free_bytes is None else self.free_bytes)

    def curve(self, *, compute_dtype: str, stored_dtype: str) -> ComputeCurve:
        """The curve for this pair of dtypes; raises MachineError when the processor was not measured with it.

        An accelerator widens weights that are stored in another dtype first, at the rate of its memory.
        """
        same = [own for own in self.arithmetic.curves if own.compute_dtype == compute_dtype]
        if self.copies is None or not same or any(own.stored_dtype == stored_dtype for own in same):
            return self.arithmetic.curve(compute_dtype=compute_dtype, stored_dtype=stored_dtype, measured_on=self.name)
        moved_bytes = STORED_BYTES[stored_dtype] + STORED_BYTES[same[0].stored_dtype]
        return same[0].later(moved_bytes / self.memory_bytes_per_s.expected, stored_dtype=stored_dtype)


@dataclass(frozen=True, kw_only=True)
class Host:
    """The computer around the devices: its memory and its CPU's arithmetic."""

    memory_bytes: float
    memory_bytes_per_s: Quantity
    flops: Quantity
    """what its CPU computes per second in 16- or 32-bit products"""
    power_w: Quantity | None = None
    arithmetic: Arithmetic = UNMEASURED

    def cpu(self, name: str) -> Processor:
        """Its CPU as what computes, from its memory."""
        return Processor(
            name=name,
            kind="cpu",
            memory_bytes=self.memory_bytes,
            memory_bytes_per_s=self.memory_bytes_per_s,
            flops={"bf16": self.flops},
            achievable=Quantity.of(1.0, "the arithmetic itself is described"),
            power_w=self.power_w,
            arithmetic=self.arithmetic,
        )


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Where weights lie that no memory holds, per node."""

    bytes_per_s: Quantity
    """of large reads past the page cache"""
    latency_s: Quantity
    """from asking a reader that stood still for a block until its bytes are there"""
    size_bytes: float | None = None
    """None: as large as is needed"""
    chunk_bytes: int = 8 << 20
    """of one read call, with which the rate is reached"""
    threads: int = 2
    """that read at once"""

    def __post_init__(self) -> None:
        if self.bytes_per_s.low <= 0:
            raise MachineError("disk.rate is zero; it must be more")
        if not 4096 <= self.chunk_bytes < 2**50:
            raise MachineError(f"disk.chunk is {self.chunk_bytes} bytes; it must be at least 4096")
        if not 1 <= self.threads < 1024:
            raise MachineError(f"disk.threads is {self.threads}; it must be from 1 to 1023")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`nodes` x `devices` equal processors, their hosts, disks and links."""

    name: str
    processor: Processor
    devices: int = 1
    """per node"""
    nodes: int = 1
    host: Host | None = None
    """None: the device's memory is the host's (a CPU, unified memory)"""
    disk: Disk | None = None
    links: Mapping[str, Link] = field(default_factory=dict)
    """by name. Known roles: `host` (host to one device), `scale_up` (device to device within a node), `network` (node
    to node); others appear as their uplinks"""
    others: tuple[Processor, ...] = ()
    """measured accelerators of the same computer that could compute instead"""
    notes: tuple[str, ...] = ()
    busy: float = 0.0
    """share of its measuring in which other work kept it busy: its rates and curves may be off by so much"""

    def __post_init__(self) -> None:
        if not 0 <= self.busy < 1:
            raise MachineError(f"{self.name}: busy is {self.busy}; it is a share from 0 on and below 1")
        if self.devices < 1 or self.nodes < 1:
            raise MachineError(f"{self.name}: {self.nodes} nodes of {self.devices} devices; both must be at least 1")
        for link in self.links.values():
            self.path(link.name)
            if link.bytes_per_s.low <= 0:
                raise MachineError(f"{self.name}: the link {link.name!r} carries nothing; give it a bandwidth")
        if self.is_calibrated and self.disk is None:
            raise MachineError(f"{self.name}: disk is missing; a machine with measured curves needs it")
        if self.accelerators and self.host is None:
            raise MachineError(f"{self.name}: host is missing; a measured accelerator needs it")
        named = [own.device for own in self.accelerators]
        if len(set(named)) < len(named) or len(named) != len(self.others) + bool(self.processor.device):
            raise MachineError(f"{self.name}: others names no device, or one twice: {', '.join(named)}")

    @property
    def num_devices(self) -> int:
        """Devices in all nodes."""
        return self.devices * self.nodes

    @property
    def is_calibrated(self) -> bool:
        """Whether its arithmetic was measured, so that a plan for it is simulated."""
        return bool(self.processor.arithmetic.curves)

    @property
    def accelerators(self) -> tuple[Processor, ...]:
        """The measured ones; the first computes unless another one is asked for."""
        return tuple(own for own in (self.processor, *self.others) if own.device)

    @property
    def host_bytes(self) -> int:
        """Memory of the computer around the devices, which is the processor's own where that is the CPU."""
        return int(self.processor.memory_bytes if self.host is None else self.host.memory_bytes)

    def require_disk(self) -> Disk:
        """The disk; raises MachineError where none is described."""
        if self.disk is None:
            raise MachineError(f"{self.name} describes no disk, which this needs; add a table [disk] to its file")
        return self.disk

    def on(self, device: str, *, origin: str) -> Machine:
        """The same computer where `device` computes: auto is the first, cuda the first GPU, cpu its CPU.

        Raises InvalidRequestError, naming what `origin` describes, for a device that it does not.
        """
        found = self.accelerators
        if device == "cpu" or (device == "auto" and not found):
            return self._on_cpu()
        for own in found:
            if device in ("auto", own.device) or (device == "cuda" and own.device.startswith("cuda:")):
                note = f"planned for {own.device} alone; --device names another of the {len(found)} that were measured"
                notes = (*self.notes, note) if device == "auto" and self.others else self.notes
                assert own.copies is not None
                links = {**self.links, "host": own.copies.link()}
                return replace(self, processor=own, links=links, others=(), notes=notes)
        described = ", ".join(["cpu", *(f"{own.device} ({own.name})" for own in found)])
        raise InvalidRequestError(
            f"--device {device}: {origin} describes no such device, only {described}; take one of these, or a file "
            "from `headrace probe --device cuda:N` on a computer that has it"
        )

    def _on_cpu(self) -> Machine:
        if self.host is None:
            return self
        links = {name: link for name, link in self.links.items() if name == "network"}
        return replace(self, processor=self.host.cpu(self.name), host=None, links=links, others=())

    def usable_bytes(self, tier: Tier) -> float:
        """What a tier offers: memory less a reserve; a disk without a stated size holds anything."""
        if tier is Tier.DEVICE:
            return self.processor.memory_bytes * (1 - DEVICE_RESERVE_SHARE)
        if tier is Tier.HOST:
            return 0.0 if self.host is None else self.host.memory_bytes * (1 - HOST_RESERVE_SHARE)
        if self.disk is None:
            return 0.0
        return math.inf if self.disk.size_bytes is None else self.disk.size_bytes

    def path(self, name: str) -> tuple[Link, ...]:
        """The link of this name, its uplink, that one's uplink, and so on. Raises MachineError for a cycle."""
        found: list[Link] = []
        at: str | None = name
        while at is not None:
            if at not in self.links:
                where = f"the uplink {at!r} of {found[-1].name!r}" if found else f"the link {at!r}"
                raise MachineError(f"{self.name}: {where} is not described; links are: {', '.join(self.links)}")
            link = self.links[at]
            if link in found:
                chain = " -> ".join([*(seen.name for seen in found), at])
                raise MachineError(f"{self.name}: the links go round in a circle: {chain}")
            found.append(link)
            at = link.uplink
        return tuple(found)

    def rate(self, name: str, *, sharers: int = 1) -> Quantity:
        """Bytes per second that each of `sharers` devices gets over its own link `name` and the uplinks all share."""
        own, *shared = self.path(name)
        rates = [own.bytes_per_s, *(link.bytes_per_s.times(1 / sharers) for link in shared)]
        return _slowest(rates)


def _slowest(rates: Sequence[Quantity]) -> Quantity:
    narrow = min(rates, key=lambda rate: rate.expected)
    low, high = min(rate.low for rate in rates), min(rate.high for rate in rates)
    return Quantity(narrow.expected, min(low, narrow.expected), max(high, narrow.expected), narrow.source)
