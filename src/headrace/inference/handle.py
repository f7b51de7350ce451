"""`model.headrace`: what a loaded model knows about itself, and what its runs have measured so far."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import nn

from headrace.errors import BudgetError, InvalidRequestError
from headrace.inference.host_cache import OffloadedCache
from headrace.inference.kv_cache import lay_out_cache
from headrace.planning.jobs.draft_length import DraftLength
from headrace.planning.memory import cache_bytes, cache_sides
from headrace.planning.plan import Placement, Plan
from headrace.planning.prediction import Candidate, Prediction, timeline_of
from headrace.planning.rates import Rates
from headrace.planning.scenario import Scenario
from headrace.planning.timeline import Lane, Timeline
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.device import Device, DeviceEvent
from headrace.streaming.stream import Stream
from headrace.streaming.system_memory import peak_resident_bytes
from headrace.units import format_bytes


class PassRecord(NamedTuple):
    """One forward pass: its span on the host's clock in seconds, and the tokens it carried.

    On an accelerator `end_s` is when the device was done, once that is known, and before that when all was enqueued.
    """

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
    """highest resident set of the whole process, from the operating system; on an accelerator the most that this
    process's allocator held of the device's memory, by the allocator's counter"""
    process_overhead_bytes: int
    """the same before any weight was read: interpreter and libraries, or what else this process held on the device"""
    bytes_copied: int = 0
    """over the link to an accelerator"""
    copied_bytes_per_s: float = 0.0
    peak_host_memory_bytes: int = 0
    """highest resident set of the whole process where an accelerator computes"""
    host_overhead_bytes: int = 0
    """resident set of interpreter and libraries, the driver's included, before any weight was read"""


def decode_cycles(passes: Sequence[PassRecord]) -> list[float]:
    """Seconds from the start of each decode pass to that of the next; of a lone one its own."""
    decode = passes[1:]
    cycles = [later.start_s - earlier.start_s for earlier, later in itertools.pairwise(decode)]
    return cycles or [record.end_s - record.start_s for record in decode]


class Possible(NamedTuple):
    """What no schedule beats: the bytes of a pass at the best rates, or computing at its best, whichever is longer.

    A rate measured before a run may have been spoiled by other work, so the best that the run showed counts as well.
    Hence nothing here is slower than what was measured.
    """

    read_bytes_per_s: float
    decode_s_per_pass: float
    copied_bytes_per_s: float
    """over the link to an accelerator; infinite where none computes"""

    @classmethod
    def of(
        cls,
        prediction: Prediction,
        rates: Rates,
        measured: Measured,
        passes: Sequence[PassRecord],
        timeline: Timeline,
    ) -> Possible:
        """From what was measured and predicted before a run, and from its passes."""
        parts = prediction.decode_parts_s
        cycles = decode_cycles(passes)
        fastest_s = min(cycles, default=math.inf)

        def best(rate: float, seen: float, part: str) -> float:
            """`rate`, or what the run shows: seconds at it, done within a shorter pass, were done at a higher one."""
            return max(rate, seen, rate * parts[part] / fastest_s if parts[part] else 0.0)

        read_bytes_per_s = best(rates.read_bytes_per_s, measured.read_bytes_per_s, "disk")
        copied_bytes_per_s = best(rates.link_bytes_per_s, measured.copied_bytes_per_s, "link")
        waited_s: dict[int, float] = defaultdict(float)
        for event in timeline.events:
            if event.lane is Lane.STALL:
                waited_s[event.pass_index] += event.duration_s
        # The rest of a pass is computing; of one whose oldest events are forgotten, the rest and more.
        computed_s = [cycle_s - waited_s[number] for number, cycle_s in enumerate(cycles, start=1)]
        limits_s = (
            parts["disk"] * rates.read_bytes_per_s / read_bytes_per_s,
            parts["link"] * rates.link_bytes_per_s / copied_bytes_per_s if parts["link"] else 0.0,
            min([parts["compute"] + parts["cpu"], *(seconds for seconds in computed_s if seconds > 0)]),
        )
        return cls(read_bytes_per_s, min(max(limits_s), fastest_s), copied_bytes_per_s)


class Overheads(NamedTuple):
    """What was held before any weight was read."""

    process_bytes: int
    """resident set: interpreter and libraries"""
    device_bytes: int
    """by this process's allocator on an accelerator"""


@dataclass(kw_only=True)
class Handle:
    """Plan, prediction and measurements of one loaded model; owner of its stream."""

    checkpoint: Checkpoint
    plan: Plan
    prediction: Prediction
    scenario: Scenario
    """what was asked of the planner, and the rates that were measured"""
    notes: tuple[str, ...]
    """what was decided while loading, in sentences"""
    warnings: tuple[str, ...]
    """those of them that tell of trouble"""
    stream: Stream
    device: Device
    layers: tuple[nn.Module, ...]
    """the model's decoder layers, in order"""
    overheads: Overheads
    load_s: float
    view_droppers: tuple[Callable[[], None], ...]
    """called when the model is closed: they drop views of its memory"""
    passes: list[PassRecord] = field(default_factory=list, init=False)
    draft_length: DraftLength | None = field(default=None, init=False)
    """chooses the drafts of each pass, where the model was loaded for drafts"""
    clean_up: Callable[[], None] = field(default=lambda: None, init=False)
    """lets go of what a pass that was broken off still holds"""
    closed: bool = field(default=False, init=False)
    _last_end: DeviceEvent | None = field(default=None, init=False)

    def note_pass(self, start_s: float, tokens: int) -> None:
        """A pass was computed, or on an accelerator enqueued, that began at `start_s`."""
        self._settle_last_pass()
        self.passes.append(PassRecord(start_s, time.perf_counter(), tokens))
        if not self.device.uses_host_memory:
            self._last_end = self.device.computed()

    def _settle_last_pass(self) -> None:
        """Correct the end of the last pass to when the device was done with it, if it is."""
        if self._last_end is not None and self._last_end.passed():
            self.passes[-1] = self.passes[-1]._replace(end_s=self._last_end.moment_s())
            self._last_end = None

    def admit(self, *, sequences: int, context_tokens: int) -> None:
        """Refuse a request whose keys and values would not fit, before it starts.

        Raises BudgetError with the numbers, InvalidRequestError beyond the model's own context.
        """
        model, plan = self.checkpoint.model, self.plan
        if self.closed:
            raise InvalidRequestError("this model was closed; load it again")
        if context_tokens > model.context_tokens:
            raise InvalidRequestError(
                f"prompt and new tokens come to {context_tokens}, but {model.name} takes at most "
                f"{model.context_tokens} tokens; shorten the prompt or ask for fewer new tokens"
            )
        needed = self._cache_bytes(sequences, context_tokens)
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

    def _cache_bytes(self, sequences: int, tokens: int) -> int:
        """Keys and values in the computing device's memory."""
        model, plan = self.checkpoint.model, self.plan
        work = replace(plan.workload, sequences=sequences)
        of_blocks = cache_bytes(model, work, plan.compute_dtype, tokens=tokens)
        return cache_sides(model, of_blocks, plan.placements, on_host=plan.cache_on_host)[0]

    def lay_out_cache(self, cache: Any, *, capacity_tokens: int) -> None:
        """Let a transformers cache for this model keep keys and values where the plan does."""
        if not self.plan.cache_on_host:
            lay_out_cache(cache, capacity_tokens=capacity_tokens)
            return
        lay_out_cache(
            cache,
            capacity_tokens=capacity_tokens,
            visits=OffloadedCache(self.device, capacity_tokens=capacity_tokens),
            on_cpu={number for number, own in enumerate(self.plan.placements) if own is Placement.CPU},
        )

    def out_of_memory(self, error: BaseException) -> BudgetError:
        """Let go of a pass for which the device had no memory, and say so; the next pass starts afresh."""
        self.clean_up()
        with contextlib.suppress(RuntimeError):
            self.device.synchronize()
        self.device.release_cached()
        memory = self.device.memory()
        free = "" if memory is None else f", {format_bytes(memory.free_bytes)} of which are free now"
        held = self.device.held_bytes() - self.overheads.device_bytes
        first_line = (str(error).splitlines() or ["out of memory"])[0]
        return BudgetError(
            f"{self.device.name} ran out of memory in a pass: headrace holds {format_bytes(held)} and was promised "
            f"{format_bytes(self.plan.budget_bytes)}{free} ({first_line}). Other processes may have taken what was "
            "free at the start; send a smaller batch or shorter prompts, or load again with less --memory"
        )

    def predicted_timeline(self) -> Timeline:
        """What the plan's first passes were predicted to do."""
        return timeline_of(Candidate(self.plan, self.prediction), self.scenario)

    def timeline(self) -> Timeline:
        """What was read, computed and waited for so far."""
        return self.stream.timeline()

    def measured(self) -> Measured:
        """Summarise the passes since loading; the first pass counts as prefill. Waits for the device."""
        self.device.synchronize()
        self._settle_last_pass()
        counters = self.stream.counters
        on_device = not self.device.uses_host_memory
        peak_bytes = peak_resident_bytes()
        cycles = decode_cycles(self.passes)
        decode_s = statistics.median(cycles[1:] or cycles) if cycles else 0.0
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
            peak_memory_bytes=self.device.peak_bytes() if on_device else peak_bytes,
            process_overhead_bytes=self.overheads.device_bytes if on_device else self.overheads.process_bytes,
            bytes_copied=counters.bytes_copied,
            copied_bytes_per_s=counters.bytes_copied / elapsed if elapsed else 0.0,
            peak_host_memory_bytes=peak_bytes if on_device else 0,
            host_overhead_bytes=self.overheads.process_bytes if on_device else 0,
        )

    def close(self) -> None:
        """Stop the readers and give the memory back; a second call does nothing."""
        if not self.closed:
            self.closed = True
            self.stream.close()
            self.checkpoint.close()
            for drop_views in self.view_droppers:
                drop_views()
            self.device.release_cached()

    def possible(self) -> Possible:
        """The limit of decode passes, given all that was seen. Waits for the device."""
        measured = self.measured()
        return Possible.of(self.prediction, self.scenario.known_rates, measured, self.passes, self.timeline())
