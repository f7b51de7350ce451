"""Compare the ways to run a model within a budget by simulated time, and take the fastest that fits.

Candidates: everything resident; sequential streaming; overlapped streaming with 2, 3 or 4 slots, each with every number
of resident blocks that the rest of the budget holds, placed evenly among the streamed ones, or first, or last, or the
largest of them. The simplest rule (fill the memory, stream the rest) is among them, so the planner is never slower than
it; and so is what a smaller budget allows, so more memory does not make a plan slower.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from headrace.dtypes import DTYPES
from headrace.errors import BudgetError
from headrace.model.blocks import HEAD_CHUNK_ROWS, product_slices
from headrace.model.layout import PAGE_BYTES, align_up
from headrace.model.stored_model import StoredModel
from headrace.planning.estimate import Pace, Prediction, TimeFloor, block_times, predict
from headrace.planning.plan import EmbeddingPlacement, MemoryUse, Plan, Strategy, Workload
from headrace.units import format_bytes

SLOT_COUNTS = (2, 3, 4)


class Candidate(NamedTuple):
    """One way to run, with what it is predicted to do."""

    plan: Plan
    prediction: Prediction


class Packed(NamedTuple):
    """Memory of passes that carry tokens of many sequences, none of them padded, in place of a rectangular batch."""

    positions: int
    """of keys and values, of all sequences together"""
    pass_tokens: int
    samples: int
    """sequences whose logits a pass gives, at most"""
    longest: int
    """positions of the longest sequence"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the planner is asked: the model, the work, the dtype, the budget.

    `copies_weights`: weights are not used where they land but copied first, although no dtype changes (this
    processor's products depend on their alignment).
    """

    model: StoredModel
    workload: Workload
    compute_dtype: str
    budget_bytes: int
    copies_weights: bool = False
    draft_tokens: int = 0
    """drafted tokens that a decode pass checks beside its own"""
    packed: Packed | None = None
    """memory of packed passes; `workload` then says only how many tokens a pass carries and how many passes come"""

    @cached_property
    def beside_blocks(self) -> MemoryUse:
        """What is held whichever blocks stay: no blocks, no slots, no table."""
        model = self.model
        element_bytes = DTYPES[self.compute_dtype].size_bytes
        return MemoryUse(
            resident_bytes=0,
            slots_bytes=0,
            fixed_bytes=align_up(model.fixed_parameters * element_bytes) + model.fixed_read_bytes,
            embedding_bytes=0,
            conversion_bytes=conversion_bytes(self),
            kv_cache_bytes=self._kv_cache_bytes(element_bytes),
            work_space_bytes=self._work_space_bytes(element_bytes),
        )

    def _kv_cache_bytes(self, element_bytes: int) -> int:
        model, work = self.model, self.workload
        if self.packed is None:
            return round(
                model.kv_cache_bytes(
                    sequences=work.sequences, context_tokens=work.context_tokens, element_bytes=element_bytes
                )
            )
        return model.kv_pool_bytes(positions=self.packed.positions, element_bytes=element_bytes)

    def _work_space_bytes(self, element_bytes: int) -> int:
        model, work, packed = self.model, self.workload, self.packed
        if packed is not None:
            return model.packed_work_space_bytes(
                pass_tokens=packed.pass_tokens,
                samples=packed.samples,
                context_tokens=packed.longest,
                element_bytes=element_bytes,
            )
        prefill, decode = ((work.prompt_tokens, work.prompt_tokens), (1 + self.draft_tokens, work.context_tokens))
        layers = (
            model.work_space_bytes(
                sequences=work.sequences, new_tokens=new, context_tokens=context, element_bytes=element_bytes
            )
            for new, context in (prefill, decode)
        )
        logits = model.work_space_bytes(
            sequences=work.sequences * (1 + self.draft_tokens),
            new_tokens=1,
            context_tokens=1,
            element_bytes=element_bytes,
        )
        return max(*layers, logits)


def minimum_bytes(request: Request, strategy: Strategy | None = None) -> int:
    """The smallest budget in which this model can do this work, by one strategy or (one slot) at all."""
    return _smallest(request, Strategy.SEQUENTIAL if strategy is None else strategy).total_bytes


def _smallest(request: Request, strategy: Strategy) -> MemoryUse:
    count = len(request.model.blocks)
    if strategy is Strategy.RESIDENT:
        return _memory(request, (True,) * count, slots=0)
    if strategy is Strategy.SEQUENTIAL:
        return _memory(request, (False,) * count, slots=1)
    # Where a few blocks are much larger than the others, keeping them takes less than slots of their size.
    slots = min(SLOT_COUNTS)
    sizes = [block.read_bytes for block in request.model.blocks]
    options = [keep_largest(sizes, number) for number in range(max(1, count - slots + 1))]
    return min((_memory(request, resident, slots=slots) for resident in options), key=lambda use: use.total_bytes)


def refuse_below_minimum(request: Request, strategy: Strategy | None) -> None:
    """Raise BudgetError, with the smallest budget that would do, when nothing fits."""
    if minimum_bytes(request, strategy) > request.budget_bytes:
        raise _too_small(request, Strategy.SEQUENTIAL if strategy is None else strategy)


def plan_strategy(request: Request, strategy: Strategy, pace: Pace) -> Candidate:
    """Return the fastest plan of one strategy.

    Raises BudgetError, with the smallest budget that would do, when none fits.
    """
    best: Candidate | None = None
    times = block_times(request.model, request.workload, pace)
    floor = TimeFloor.of(strategy, request.workload, pace, times)
    for slots, resident in dict.fromkeys(_options(request, strategy)):
        if best is not None and floor.total_s(times, resident) >= best.prediction.total_s * (1 - 1e-9):
            continue  # it cannot be faster
        plan = _plan(request, strategy, slots, resident)
        if plan.memory.total_bytes > request.budget_bytes:
            continue
        candidate = Candidate(plan, predict(request.model, plan, pace))
        if best is None or candidate.prediction.total_s < best.prediction.total_s * (1 - 1e-9):
            best = candidate
    if best is None:
        raise _too_small(request, strategy)
    return best


def plan_fastest(request: Request, pace: Pace) -> Candidate:
    """Return the fastest plan of any strategy; raises BudgetError when not even the smallest fits."""
    candidates = []
    for strategy in Strategy:
        try:
            candidates.append(plan_strategy(request, strategy, pace))
        except BudgetError:
            continue
    if not candidates:
        raise _too_small(request, Strategy.SEQUENTIAL)
    fastest_s = min(candidate.prediction.total_s for candidate in candidates)
    # Of equals the first, that is the simplest: keeping everything before streaming it.
    return next(c for c in candidates if c.prediction.total_s <= fastest_s * (1 + 1e-9))


def _plan(request: Request, strategy: Strategy, slots: int, resident: tuple[bool, ...]) -> Plan:
    embedding = _embedding(request, resident)
    return Plan(
        strategy=strategy,
        resident=resident,
        slots=slots,
        slot_bytes=_slot_bytes(request.model, resident) if slots else 0,
        embedding=embedding,
        compute_dtype=request.compute_dtype,
        memory=_memory(request, resident, slots=slots, embedding=embedding),
        budget_bytes=request.budget_bytes,
        workload=request.workload,
        streamed_bytes_per_pass=sum(
            block.read_bytes for block, stays in zip(request.model.blocks, resident, strict=True) if not stays
        ),
    )


def _options(request: Request, strategy: Strategy) -> Iterator[tuple[int, tuple[bool, ...]]]:
    """Numbers of slots and sets of residents that fit, each also filled up; those that keep most blocks first.

    There are some thousands where there are a hundred blocks, so this is arithmetic on lists.
    """
    sizes = [block.read_bytes for block in request.model.blocks]
    if strategy is Strategy.RESIDENT:
        yield 0, (True,) * len(sizes)
        return
    room_bytes = request.budget_bytes - request.beside_blocks.total_bytes
    ascending = sorted(range(len(sizes)), key=sizes.__getitem__)
    descending = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    for slots in (1,) if strategy is Strategy.SEQUENTIAL else SLOT_COUNTS:
        for number in range(len(sizes) - slots, -1, -1):
            for resident in placements(sizes, number):
                held_bytes = sum(itertools.compress(sizes, resident))
                slot_bytes = next(sizes[index] for index in descending if not resident[index])
                left_bytes = room_bytes - held_bytes - slots * slot_bytes
                if left_bytes >= 0:
                    # Largest first fills best; smallest first is how a larger budget only ever adds blocks.
                    for order in (descending, ascending):
                        yield (
                            slots,
                            fill_remaining(resident, order, sizes, left_bytes, most=len(sizes) - slots - number),
                        )
                    yield slots, resident


def fill_remaining(
    resident: tuple[bool, ...], order: Sequence[int], sizes: Sequence[int], left_bytes: int, *, most: int
) -> tuple[bool, ...]:
    """Blocks differ in size (the head's pieces); add up to `most` that still fit, so that no memory lies idle."""
    flags = list(resident)
    for index in order:
        if most and not flags[index] and sizes[index] <= left_bytes:
            flags[index], left_bytes, most = True, left_bytes - sizes[index], most - 1
    return tuple(flags)


def placements(sizes: Sequence[int], number: int) -> Iterator[tuple[bool, ...]]:
    """Ways to choose `number` residents: spread evenly, beginning anywhere; the first; the last; the largest.

    Spread among the streamed: while a resident block computes, the stream gets ahead.
    """
    count = len(sizes)
    evenly = spread_evenly(count, number)
    for shift in range(-(-count // max(1, number))):
        yield evenly[shift:] + evenly[:shift]
    yield (True,) * number + (False,) * (count - number)
    yield (False,) * (count - number) + (True,) * number
    yield keep_largest(sizes, number)


def spread_evenly(count: int, number: int) -> tuple[bool, ...]:
    """Choose `number` of `count` in a row at even distances, the last one among them."""
    return tuple((index + 1) * number // count > index * number // count for index in range(count))


def keep_largest(sizes: Sequence[int], number: int) -> tuple[bool, ...]:
    """Keep the largest blocks, so that slots need not be of their size."""
    kept = set(sorted(range(len(sizes)), key=lambda index: -sizes[index])[:number])
    return tuple(index in kept for index in range(len(sizes)))


def _slot_bytes(model: StoredModel, resident: tuple[bool, ...]) -> int:
    """A slot holds the largest block that is streamed."""
    return max((block.read_bytes for block, stays in zip(model.blocks, resident, strict=True) if not stays), default=0)


def _embedding(request: Request, resident: tuple[bool, ...]) -> EmbeddingPlacement:
    head_stays = all(
        stays for block, stays in zip(request.model.blocks, resident, strict=True) if block.head_rows is not None
    )
    if request.model.tied and head_stays:
        return EmbeddingPlacement.HEAD
    if all(resident):
        with_table = _memory(request, resident, slots=0, embedding=EmbeddingPlacement.RESIDENT)
        if with_table.total_bytes <= request.budget_bytes:
            return EmbeddingPlacement.RESIDENT
    return EmbeddingPlacement.ROWS


def _memory(
    request: Request,
    resident: tuple[bool, ...],
    *,
    slots: int,
    embedding: EmbeddingPlacement = EmbeddingPlacement.ROWS,
) -> MemoryUse:
    model = request.model
    return replace(
        request.beside_blocks,
        resident_bytes=sum(block.read_bytes for block, stays in zip(model.blocks, resident, strict=True) if stays),
        slots_bytes=slots * _slot_bytes(model, resident),
        embedding_bytes=align_up(model.table_bytes) + 2 * PAGE_BYTES if embedding is EmbeddingPlacement.RESIDENT else 0,
    )


def conversion_bytes(request: Request) -> int:
    """Bytes of the buffer in which one module's weights are widened or put together, 0 where none are.

    Weights are converted module by module (a linear layer's matrix and bias), just before the module computes, so the
    buffer is as large as the largest module of any block, or as the smallest piece of the head that is converted.
    """
    model = request.model
    element_bytes = DTYPES[request.compute_dtype].size_bytes
    converts = request.copies_weights or model.stored_dtype != DTYPES[request.compute_dtype].stored_name
    largest = 0
    for block in model.blocks:
        if block.head_rows is not None:
            count = block.head_rows.last - block.head_rows.first
            if converts:
                rows = max(part.last - part.first for part in product_slices(count, HEAD_CHUNK_ROWS))
                largest = max(largest, rows * (block.parameters // count) * element_bytes)
        else:
            largest = max(largest, block.module_bytes(element_bytes, converts=converts))
    return align_up(largest) + 2 * PAGE_BYTES if largest else 0


def _too_small(request: Request, strategy: Strategy) -> BudgetError:
    needed = _smallest(request, strategy)
    work = request.workload
    parts = ", ".join(
        f"{label} {format_bytes(size)}"
        for label, size in (
            ("resident weights", needed.resident_bytes),
            ("slots", needed.slots_bytes),
            ("conversion", needed.conversion_bytes),
            ("KV cache", needed.kv_cache_bytes),
            ("work space", needed.work_space_bytes),
            ("small tensors", needed.fixed_bytes),
        )
        if size
    )
    return BudgetError(
        f"a budget of {format_bytes(request.budget_bytes)} is too small for {request.model.name} ({strategy.value}, "
        f"{request.compute_dtype}, {work.sequences} x ({work.prompt_tokens} + {work.generate_tokens}) tokens): it "
        f"needs at least {format_bytes(needed.total_bytes)} ({needed.total_bytes} bytes: {parts}). "
        "Give --memory that much, or ask for fewer sequences or tokens.",
        required_bytes=needed.total_bytes,
    )
