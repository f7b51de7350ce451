"""The question to the planner: a model, on hardware, doing a workload within a budget. Checked once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headrace.errors import InvalidRequestError, MachineError
from headrace.model.layout import PAGE_BYTES
from headrace.model.stored_model import StoredModel
from headrace.planning.plan import CPU_DEVICE
from headrace.planning.rates import Rates
from headrace.planning.workload import Packed, Workload

CHUNK_BYTES = 16 << 20
"""One read, and one place of the ring."""

MIN_RING_CHUNKS = 2
"""one is being read into while another one is copied from"""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A model, the work, the dtype, the device that computes, and what may be held on it and on its host.

    Where the host's CPU computes, `budget_bytes` is all there is. Raises InvalidRequestError for a ring that could
    carry nothing.
    """

    model: StoredModel
    workload: Workload
    compute_dtype: str
    budget_bytes: int
    """of the computing device's memory"""
    device: str = CPU_DEVICE
    """as users write it: cpu, cuda:0"""
    host_budget_bytes: int = 0
    """of host memory beside an accelerator"""
    copies_weights: bool = False
    """weights are not used where they land but copied first, although no dtype changes: this CPU's products depend on
    their alignment"""
    pinned: bool = True
    """the system lets host memory be page-locked"""
    allow_cpu: bool = False
    """layers may be computed by the CPU from host memory, for an accelerator"""
    allow_host_cache: bool = False
    """keys and values may wait in host memory where they do not fit on the device together with two slots"""
    chunk_bytes: int = CHUNK_BYTES
    ring_chunks: int = 4
    draft_tokens: int = 0
    """drafted tokens that a decode pass checks in addition to its own"""
    packed: Packed | None = None
    """memory of packed passes; `workload` then says only how many tokens a pass carries and how many passes come"""
    rates: Rates | None = None
    """how fast this hardware is; None before it was measured, when only memory can be asked for"""
    read_is_limited: bool = False
    """reading is held at a limit that the user gave, so that its rate is steady"""

    def __post_init__(self) -> None:
        if self.ring_chunks < MIN_RING_CHUNKS or self.chunk_bytes < PAGE_BYTES:
            raise InvalidRequestError(
                f"a ring of {self.ring_chunks} chunks of {self.chunk_bytes} bytes cannot carry what is read; "
                f"it takes at least {MIN_RING_CHUNKS} chunks of {PAGE_BYTES} bytes"
            )

    @property
    def on_cpu(self) -> bool:
        """Whether the host's CPU computes, from its own memory: no link, no ring, no second budget."""
        return self.device == CPU_DEVICE

    @property
    def known_rates(self) -> Rates:
        """How fast this hardware is; raises MachineError before it was measured."""
        if self.rates is None:
            raise MachineError(f"the speed of {self.device} with {self.model.name} was not measured")
        return self.rates

    def at(self, rates: Rates) -> Scenario:
        """The same question on hardware of other rates."""
        return replace(self, rates=rates)

    @property
    def without_layer(self) -> Scenario:
        """The same without the timing of a layer in the asked workload: for others only the curves count."""
        return self.at(replace(self.known_rates, layer=None))
