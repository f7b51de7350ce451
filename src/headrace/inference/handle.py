"""`model.headrace`: what a loaded model knows about itself, and what its runs have measured so far."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from headrace.errors import BudgetError, InvalidRequestError
from headrace.planning.draft_length import DraftLength
from headrace.planning.estimate import Pace, Prediction
from headrace.planning.plan import ELEMENT_BYTES, Plan
from headrace.planning.timeline import Timeline
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.stream import Stream
from headrace.streaming.system_memory import peak_resident_bytes
from headrace.units import format_bytes


class PassRecord(NamedTuple):
    """One forward pass: its span on the host's clock in seconds, and the tokens it carried."""

    start_s: float
    end_s: float
    tokens: int


class Measured(NamedTuple):
    """What a run took. `decode_s_per_pass`: median over decode passes, the first left out."""

    load_s: float
    prefill_s: float
    decode_s_per_pass: float
    tokens_per_s: float
    passes: int
    bytes_read: int
    read_bytes_per_s: float
    stall_s: float
    peak_memory_bytes: int
    """highest resident set of the whole process, from the operating system"""
    process_overhead_bytes: int
    """resident set of interpreter and libraries before any weight was read"""


@dataclass
class Handle:
    """Plan, prediction and measurements of one loaded model; owner of its stream."""

    checkpoint: Checkpoint
    plan: Plan
    prediction: Prediction
    pace: Pace
    stream: Stream
    load_s: float
    process_overhead_bytes: int
    notes: tuple[str, ...] = ()
    """what was decided while loading, in sentences"""
    passes: list[PassRecord] = field(default_factory=list)
    layers: tuple[nn.Module, ...] = ()
    """the model's decoder layers, in order"""
    draft_length: DraftLength | None = None
    """chooses the drafts of each pass, where the model was loaded for drafts"""
    closed: bool = False

    def admit(self, *, sequences: int, context_tokens: int) -> None:
        """Refuse a request whose keys and values would not fit, before it starts.

        Raises BudgetError with the numbers, InvalidRequestError beyond the model's own context.
        """
        spec, plan = self.checkpoint.spec, self.plan
        if self.closed:
            raise InvalidRequestError("this model was closed; load it again")
        if context_tokens > spec.config.context_tokens:
            raise InvalidRequestError(
                f"prompt and new tokens come to {context_tokens}, but {spec.name} was trained for a context of "
                f"{spec.config.context_tokens} tokens; shorten the prompt or ask for fewer new tokens"
            )
        needed = spec.kv_cache_bytes(
            sequences=sequences, tokens=context_tokens, element_bytes=ELEMENT_BYTES[plan.compute_dtype]
        )
        spare = plan.budget_bytes - plan.memory.total_bytes
        allowed = plan.memory.kv_cache_bytes + spare
        if needed > allowed:
            raise BudgetError(
                f"{sequences} sequences of {context_tokens} tokens need {format_bytes(needed)} of KV cache; the budget "
                f"of {format_bytes(plan.budget_bytes)} leaves {format_bytes(allowed)} for it (planned for "
                f"{plan.workload.sequences} x {plan.workload.context_tokens} tokens). Load with a larger batch or "
                "max_tokens, give more memory, or ask for fewer tokens.",
                required_bytes=plan.budget_bytes + needed - allowed,
            )

    def timeline(self) -> Timeline:
        """What was read, computed and waited for so far."""
        return self.stream.timeline()

    def measured(self) -> Measured:
        """Summarise the passes since loading; the first pass counts as prefill."""
        counters = self.stream.counters
        cycles = [later.start_s - earlier.start_s for earlier, later in zip(self.passes, self.passes[1:], strict=False)]
        decode = cycles[2:] or cycles[1:] or [record.end_s - record.start_s for record in self.passes[1:]]
        decode_s = statistics.median(decode) if decode else 0.0
        elapsed = self.passes[-1].end_s - self.passes[0].start_s if self.passes else 0.0
        return Measured(
            load_s=self.load_s,
            prefill_s=self.passes[0].end_s - self.passes[0].start_s if self.passes else 0.0,
            decode_s_per_pass=decode_s,
            tokens_per_s=self.passes[-1].tokens / decode_s if decode_s else 0.0,
            passes=len(self.passes),
            bytes_read=counters.bytes_read + self.checkpoint.row_bytes_read,
            read_bytes_per_s=counters.bytes_read / elapsed if elapsed else 0.0,
            stall_s=counters.stall_s,
            peak_memory_bytes=peak_resident_bytes(),
            process_overhead_bytes=self.process_overhead_bytes,
        )

    def close(self) -> None:
        """Stop the readers and give the memory back; a second call does nothing."""
        if not self.closed:
            self.closed = True
            self.stream.close()
            self.checkpoint.close()

    def possible(self) -> dict[str, Any]:
        """The limit: bytes that must be read over the link's raw speed, or the computation alone."""
        return {
            "read_bytes_per_s": self.pace.read_bytes_per_s,
            "decode_s_per_pass": self.prediction.possible_decode_s,
        }
