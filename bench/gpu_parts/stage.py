"""What all parts of a run share: the device, the checkpoints, the clock, and the account of promises about memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import headrace
from gpu_parts.case import Case
from gpu_parts.checkpoint_rack import CheckpointRack
from gpu_parts.deadline import Deadline
from gpu_parts.outcome import SkippedError
from headrace.errors import BudgetError
from headrace.inference.calibration import calibrate
from headrace.inference.load_options import LoadOptions
from headrace.inference.loading import Loading
from headrace.machine.machine import Machine
from headrace.planning.plan import Placement, Plan
from headrace.planning.planner import plan_strategy
from headrace.planning.prediction import Prediction
from headrace.planning.strategies import Strategy
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.device import Device

DECODE: dict[str, Any] = {"batch": 1, "prompt_tokens": 16, "max_tokens": 64}
"""the work that models are loaded for unless a part says otherwise"""
SHARE_OF_FREE = 0.9
"""of the device's memory, for the most tokens in a pass"""


class Promise(NamedTuple):
    """What a load was allowed of the device's memory, and the most that the allocator held for it."""

    what: str
    budget_bytes: int
    peak_bytes: int

    @property
    def kept(self) -> bool:
        """Whether it stayed within."""
        return self.peak_bytes <= self.budget_bytes


@dataclass
class _Open:
    """A model that is loaded now, and the ones it shares the allocator's counter with."""

    what: str
    budget_bytes: int
    held_before_bytes: int
    together: bool = False


@dataclass
class Stage:
    """The setting of a run. `machine`: constants that are not to be measured again at every load."""

    device: Device
    case: Case
    rack: CheckpointRack
    deadline: Deadline
    machine: Machine | None = None
    promises: list[Promise] = field(default_factory=list)
    _open: list[_Open] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether this is a real device."""
        return self.device.torch_device.type == "cuda"

    def require_gpu(self, what: str) -> None:
        """Raise SkippedError on the made-up accelerator."""
        if not self.on_gpu:
            raise SkippedError(f"{what} needs a GPU, and {self.device.name} is made up")

    def needs_s(self, fixed_s: float) -> float:
        """What measuring takes in this case, where it takes `fixed_s` in the full one."""
        return fixed_s * self.case.share_of_time

    def host_bytes(self, name: str) -> int:
        """Host memory that holds every block of a checkpoint, its embedding and the ring, each in whole pages."""
        return int(1.02 * self.rack.size_bytes(name)) + self.case.ring_bytes + (1 << 24)

    def least_bytes(self, name: str, strategy: str, **work: Any) -> int:
        """The least device memory in which a strategy can do this work, to the byte."""
        try:
            headrace.load(
                self.rack.path(name),
                device=self.device,
                memory=1,
                host_memory=self.case.ring_bytes,
                read_limit=self.case.read_limit,
                strategy=strategy,
                **{**DECODE, **work},
            ).close()
        except BudgetError as refused:
            if refused.required_bytes is None:
                raise
            return refused.required_bytes
        raise AssertionError("a model was loaded into one byte")

    def resident_bytes(self, name: str, **work: Any) -> int:
        """Device memory for every block, with the embedding's table, which is as large as the head."""
        shape = self.rack.shape(name)
        table_bytes = shape.vocabulary * shape.hidden * (4 if work.get("dtype") == "float32" else 2)
        return self.least_bytes(name, "resident", **work) + table_bytes + (1 << 20)

    def share_bytes(self, name: str, share: float, **work: Any) -> int:
        """Device memory with which about this share of the blocks stays there: a layer more than it takes."""
        least, most = (self.least_bytes(name, strategy, **work) for strategy in ("overlap", "resident"))
        return int(least + share * (most - least)) + self.layer_bytes(name)

    def layer_bytes(self, name: str) -> int:
        """Of a decoder layer, as the device holds it."""
        checkpoint = Checkpoint(self.rack.path(name), cut_head=False)
        checkpoint.close()
        return checkpoint.model.blocks[0].held_bytes

    def most_tokens(self, name: str) -> int:
        """The most tokens, of a sequence each, for which a streamed model with its work fits beside a resident one."""
        low, high = self.case.token_bounds
        memory = self.device.memory()
        assert memory is not None
        room_bytes = SHARE_OF_FREE * memory.free_bytes - self.resident_bytes(name, **single_tokens(1))
        while high > low and self.least_bytes(name, "overlap", **single_tokens(high)) > room_bytes:
            high = max(low, int(0.95 * high))
        return high

    def predict(self, name: str, *, strategy: str, memory: int, **work: Any) -> Prediction:
        """What `load` would predict with this much memory: measured and planned, but not loaded."""
        self.settle()
        checkpoint = Checkpoint(self.rack.path(name), cut_head=False)
        try:
            options = LoadOptions(
                memory=memory,
                host_memory=self.host_bytes(name),
                strategy=strategy,
                machine=self.machine,
                read_limit=self.case.read_limit,
                **{**DECODE, **work},
            ).checked(checkpoint.model, self.device)
            scenario = calibrate(Loading.of(checkpoint, options, self.device)).scenario
            return plan_strategy(scenario, Strategy(strategy)).prediction
        finally:
            checkpoint.close()
            self.settle()

    @contextmanager
    def load(
        self,
        name: str,
        *,
        what: str,
        memory: int,
        strategy: str,
        host_memory: int | None = None,
        counted: bool = True,
        **options: Any,
    ) -> Iterator[Any]:
        """A loaded model; at its end the peak of the device's memory is held against `memory`.

        Models that are open at once share the allocator's counter, and one promise: the sum. Not `counted`: something
        else allocates meanwhile.
        """
        if not self._open:
            self.settle()
        model = headrace.load(
            self.rack.path(name),
            device=self.device,
            memory=memory,
            host_memory=self.host_bytes(name) if host_memory is None else host_memory,
            strategy=strategy,
            machine=self.machine,
            read_limit=self.case.read_limit,
            **{**DECODE, **options},
        )
        for other in self._open:
            other.together = True
        self._open.append(_Open(f"{name} {what}", memory, model.headrace.overheads.device_bytes))
        try:
            yield model
            if counted:
                self._note_promise()
        finally:
            self._open.pop()
            model.close()
            del model
            self.settle()

    def _note_promise(self) -> None:
        """Of the model that was loaded last; nothing for one whose peak was counted with it."""
        if self._open[-1].together:
            return
        self.device.synchronize()
        first = self._open[0]
        self.promises.append(
            Promise(
                " with ".join(one.what for one in self._open),
                sum(one.budget_bytes for one in self._open),
                self.device.peak_bytes() - first.held_before_bytes,
            )
        )

    def settle(self) -> None:
        """Let go of whatever is not used any more."""
        gc.collect()
        self.device.release_cached()


def single_tokens(count: int) -> dict[str, Any]:
    """Work of so many sequences of a token each: what a pass of so many tokens is planned as.

    A second pass follows, without which nothing would be worth keeping in host memory.
    """
    return {"batch": count, "prompt_tokens": 1, "max_tokens": 3}


def places_text(plan: Plan) -> str:
    """Where the blocks live: `1 device, 32 host`."""
    return ", ".join(f"{plan.placements.count(place)} {place}" for place in Placement if place in plan.placements)
