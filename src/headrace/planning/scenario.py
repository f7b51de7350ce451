"""The question to the planner: a model, on hardware, doing a workload within a budget. Checked once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headrace.errors import InvalidRequestError, MachineError
from headrace.machine.engine import PRESENT, Engine
from headrace.machine.machine import Machine, Tier
from headrace.model.layout import PAGE_BYTES
from headrace.model.model import Model
from headrace.planning.plan import CPU_DEVICE
from headrace.planning.rates import Rates
from headrace.planning.workload import JobMemory, Speculation, Workload

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

    model: Model
    workload: Workload
    compute_dtype: str = ""
    """of a described machine: the format of the weights, or 16 bits"""
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
    packed: JobMemory | None = None
    """memory of a job's passes; `workload` then says only how many tokens a pass carries and how many passes come"""
    rates: Rates | None = None
    """how fast this hardware is; None before it was measured, when only memory can be asked for"""
    read_is_limited: bool = False
    """reading is held at a limit that the user gave, so that its rate is steady"""
    busy: float = 0.0
    """share of the time in which other work kept the machine busy while `rates` were measured; widens intervals"""
    machine: Machine | None = None
    """a described machine, planned in closed form for an engine"""
    limits_bytes: tuple[float | None, float | None] = (None, None)
    """what the user allows a described machine's devices and hosts to hold, each; None: all but a reserve"""
    engine: Engine = PRESENT
    speculation: Speculation | None = None
    expert_hit_rate: float | None = None
    """share of the routed experts that are found on the device; None: what fits, uniformly used"""

    def __post_init__(self) -> None:
        if self.ring_chunks < MIN_RING_CHUNKS or self.chunk_bytes < PAGE_BYTES:
            raise InvalidRequestError(
                f"a ring of {self.ring_chunks} chunks of {self.chunk_bytes} bytes cannot carry what is read; "
                f"it takes at least {MIN_RING_CHUNKS} chunks of {PAGE_BYTES} bytes"
            )

    @classmethod
    def described(
        cls,
        model: Model,
        machine: Machine,
        workload: Workload,
        *,
        memory_bytes: float | None = None,
        host_memory_bytes: float | None = None,
        engine: Engine = PRESENT,
        speculation: Speculation | None = None,
        expert_hit_rate: float | None = None,
    ) -> Scenario:
        """A question about a machine that is known by its description.

        `memory_bytes` of each device and `host_memory_bytes` of each node bound what may be held; by default all but a
        reserve. Raises InvalidRequestError for more context than the model has, and for a hit rate outside of 0 to 1.
        """
        refuse_long_context(model, workload)
        if expert_hit_rate is not None and not 0 <= expert_hit_rate <= 1:
            raise InvalidRequestError(f"an expert hit rate is between 0 and 1, not {expert_hit_rate}")
        return cls(
            model=model,
            workload=workload,
            budget_bytes=0,
            device=CPU_DEVICE if machine.processor.kind == "cpu" else machine.processor.name,
            limits_bytes=(memory_bytes, host_memory_bytes),
            engine=engine,
            speculation=speculation,
            expert_hit_rate=expert_hit_rate,
        ).on(machine)

    def on(self, machine: Machine) -> Scenario:
        """The same question on another described machine, with the same limits."""
        budgets = [
            round(machine.usable_bytes(tier) if limit is None else min(limit, machine.usable_bytes(tier)))
            for tier, limit in zip((Tier.DEVICE, Tier.HOST), self.limits_bytes, strict=True)
        ]
        return replace(self, machine=machine, budget_bytes=budgets[0], host_budget_bytes=budgets[1])

    @property
    def tokens_checked(self) -> int:
        """Tokens of each sequence in a decode pass: its own, and drafts that are checked with it."""
        return 1 if self.speculation is None else 1 + self.speculation.draft_tokens

    def batch(self, sequences: int) -> Scenario:
        """The same question with another number of sequences."""
        return replace(self, workload=replace(self.workload, sequences=sequences))

    @property
    def described_machine(self) -> Machine:
        """The machine of a closed form; raises MachineError where only rates are known."""
        if self.machine is None:
            raise MachineError(f"no machine of several devices is described; only {self.device} was measured")
        return self.machine

    @property
    def is_calibrated(self) -> bool:
        """Whether rates were measured, so that a plan of one device is simulated."""
        return self.rates is not None

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
        return self.at(replace(self.known_rates, layers=()))


def refuse_long_context(model: Model, work: Workload) -> None:
    """Raise InvalidRequestError where the workload is longer than the model's context."""
    if work.context_tokens > model.context_tokens:
        raise InvalidRequestError(
            f"{work.prompt_tokens} + {work.generate_tokens} tokens do not fit the context of {model.name}, "
            f"{model.context_tokens} tokens: reduce --prompt-tokens or --generate-tokens"
        )
