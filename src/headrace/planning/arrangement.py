"""An arrangement: one strategy with its parameters, for one model on one machine. Frozen; pure values."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import InvalidRequestError
from headrace.machine.machine import Tier


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Where weights lie, how they travel and how the work is divided.

    `tensor` x `pipeline` devices hold one copy; `replicas` of that share the sequences. With `sharded` each of the
    `replicas` pulls its part of every layer over its own link and gathers the others' (bandwidth-centric).
    """

    strategy: str
    """the name in reports: resident, sequential, overlap, partial, cpu, hybrid, pipeline, tensor, tensor-2d, sharded,
    tensor+pipeline, and so on"""
    source: Tier = Tier.DEVICE
    """where the weights lie that are not resident on the device"""
    overlap: bool = True
    """the next layers load while one computes; False: load, compute, drop"""
    slots: int = 0
    resident_share: float = 1.0
    """share of the layers that stays on the device"""
    cpu_share: float = 0.0
    """share of the layers computed by the host's processor where they lie"""
    tensor: int = 1
    two_dimensional: bool = False
    pipeline: int = 1
    micro_batches: int = 1
    replicas: int = 1
    sharded: bool = False
    kv_tier: Tier = Tier.DEVICE
    expert_hit_rate: float | None = None
    """routed experts that are found on the device; None: experts travel with their layer"""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "micro_batches", "replicas"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("resident_share", "cpu_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidRequestError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if self.resident_share + self.cpu_share > 1 + 1e-9:
            raise InvalidRequestError("more than all layers are resident or computed by the host")
        if self.streamed_share > 1e-9 and self.slots < (2 if self.overlap else 1):
            raise InvalidRequestError(f"{self.strategy} streams layers and needs slots, not {self.slots}")

    @property
    def streamed_share(self) -> float:
        """Share of the layers that travels to the device on each pass."""
        return max(0.0, 1.0 - self.resident_share - self.cpu_share)

    @property
    def devices_per_copy(self) -> int:
        """Devices that hold one copy of the weights together."""
        return self.tensor * self.pipeline

    @property
    def devices(self) -> int:
        """All devices."""
        return self.devices_per_copy * self.replicas
