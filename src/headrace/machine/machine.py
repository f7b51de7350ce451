"""A machine as a tree: processors, the memory tiers they reach, and links, several of which may share an uplink.

A machine is `nodes` equal computers of `devices` equal processors each (a laptop: one node, one device). Weights may
lie in the device's memory, the node's host memory or the node's disk, and travel over links:

    disk --storage--> host memory --host link--> device 0 ... device n-1      (host links may share an uplink)
    device <--scale-up--> device, within a node          node <--network--> node

Rates are bytes per second in one direction. Every constant is a Quantity: it carries its source and its range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from headrace.errors import MachineError
from headrace.machine.quantity import Quantity


class Tier(StrEnum):
    """Where bytes may lie."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


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


@dataclass(frozen=True, kw_only=True)
class Link:
    """One direction of a connection. `uplink` names a link that this one's bytes pass as well, shared with others."""

    name: str
    bytes_per_s: Quantity
    latency_s: Quantity
    uplink: str | None = None


@dataclass(frozen=True, kw_only=True)
class Host:
    """The computer around the devices: its memory and its own processor's arithmetic."""

    memory_bytes: float
    memory_bytes_per_s: Quantity
    flops: Quantity
    """what its CPU computes per second in 16- or 32-bit products"""
    power_w: Quantity | None = None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`nodes` x `devices` equal processors, their hosts, disks and links."""

    name: str
    processor: Processor
    devices: int
    """per node"""
    nodes: int = 1
    host: Host | None = None
    """None: the device's memory is the host's (a CPU, unified memory)"""
    disk_bytes: float | None = None
    links: Mapping[str, Link] = field(default_factory=dict)
    """by name. Known roles: `storage` (disk to host, per node), `host` (host to one device), `scale_up` (device to
    device within a node), `network` (node to node); others appear as their uplinks"""
    collectives: str | None = None
    """name of a measured table of all-reduce times (`headrace.planning.collectives`)"""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.devices < 1 or self.nodes < 1:
            raise MachineError(f"{self.name}: {self.nodes} nodes of {self.devices} devices; both must be at least 1")
        for link in self.links.values():
            self.path(link.name)
            if link.bytes_per_s.low <= 0:
                raise MachineError(f"{self.name}: the link {link.name!r} carries nothing; give it a bandwidth")

    @property
    def num_devices(self) -> int:
        """Devices in all nodes."""
        return self.devices * self.nodes

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
