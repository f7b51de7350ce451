"""How a model is loaded: the options as users write them, once, and what they come to for a model on a device.

Both `headrace.load` and the commands make `LoadOptions`; defaults stand here alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from headrace.dtypes import DTYPES
from headrace.errors import InvalidRequestError
from headrace.machine.machine import Machine
from headrace.model.model import Model
from headrace.planning.scenarios import refuse_on_cpu
from headrace.planning.strategies import RUNNABLE, Strategy
from headrace.planning.workload import Workload
from headrace.units import parse_rate, parse_size

if TYPE_CHECKING:
    from headrace.streaming.device import Device

DEFAULT_MAX_TOKENS = 1024
MOST_DRAFT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The options of `headrace.load`; see there. Raises InvalidRequestError for what no model could use."""

    memory: str | int | None = None
    """of the computing device, in bytes or as text; None: what is free, less a reserve"""
    host_memory: str | int | None = None
    """of the host beside an accelerator, likewise"""
    device: str | Device = "auto"
    strategy: str = "auto"
    dtype: str = "auto"
    batch: int = 1
    prompt_tokens: int | None = None
    """None: half of `max_tokens`"""
    max_tokens: int | None = None
    """prompt and new tokens; None: DEFAULT_MAX_TOKENS, or the model's context where that is shorter"""
    read_limit: str | float | None = None
    """bytes per second, or text"""
    machine: Machine | None = None
    attention: str | None = None
    """transformers' name of an attention function; None: its own choice"""
    poison: bool = False
    """overwrite memory that was given back, so that late use shows"""
    trust_remote_code: bool = False
    draft_tokens: int = 0
    """drafted tokens that a decode pass checks, at most"""
    cpu_blocks: bool = False
    cache_on_host: bool = False
    compile_layers: bool = False
    fresh: bool = False
    """measure again, and not take what an earlier start measured"""

    def __post_init__(self) -> None:
        for size in (self.memory, self.host_memory):
            if size is not None:
                parse_size(size)
        if self.strategy not in ("auto", *RUNNABLE):
            raise InvalidRequestError(f"cannot run with strategy {self.strategy!r}; choose auto, {', '.join(RUNNABLE)}")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise InvalidRequestError(f"unsupported dtype {self.dtype!r}; choose auto, {', '.join(DTYPES)}")
        if self.batch < 1:
            raise InvalidRequestError(f"batch must be at least 1, not {self.batch}")
        if not 0 <= self.draft_tokens <= MOST_DRAFT_TOKENS:
            raise InvalidRequestError(
                f"draft tokens must lie between 0 and {MOST_DRAFT_TOKENS}, not {self.draft_tokens}"
            )
        if self.draft_tokens and self.batch > 1:
            raise InvalidRequestError(f"drafts work with one sequence at a time, not {self.batch}")
        limit = self.read_limit_bytes_per_s
        if limit is not None and not 0 < limit < float("inf"):
            raise InvalidRequestError(f"the read limit must be positive, not {limit}")

    @property
    def read_limit_bytes_per_s(self) -> float | None:
        """The reader's limit, if there is one."""
        return None if self.read_limit is None else parse_rate(self.read_limit)

    def checked(self, model: Model, device: Device) -> Options:
        """What the options come to for `model` on `device`, which is asked what is free where no budget was given.

        Raises InvalidRequestError for more context than the model has, and for an accelerator's options on the CPU.
        """
        from headrace.streaming.device_budget import device_budget_bytes, host_budget_bytes

        if device.uses_host_memory:
            refuse_on_cpu(
                host_memory=self.host_memory is not None, cpu_blocks=self.cpu_blocks, cache_on_host=self.cache_on_host
            )
        if self.host_memory is not None:
            host_bytes = parse_size(self.host_memory)
        else:
            host_bytes = 0 if device.uses_host_memory else host_budget_bytes()
        return Options(
            asked=self,
            workload=self._workload(model),
            budget_bytes=device_budget_bytes(device) if self.memory is None else parse_size(self.memory),
            host_budget_bytes=host_bytes,
            strategy=None if self.strategy == "auto" else Strategy(self.strategy),
            dtype=None if self.dtype == "auto" else self.dtype,
            read_limit_bytes_per_s=self.read_limit_bytes_per_s,
        )

    def _workload(self, model: Model) -> Workload:
        longest = model.context_tokens
        most = min(longest, DEFAULT_MAX_TOKENS) if self.max_tokens is None else self.max_tokens
        if not 2 <= most <= longest:
            raise InvalidRequestError(
                f"max_tokens {most} is out of range: {model.name} takes 2 to {longest}, prompt and new tokens together"
            )
        prompt_tokens = most // 2 if self.prompt_tokens is None else self.prompt_tokens
        if not 1 <= prompt_tokens < most:
            raise InvalidRequestError(f"a prompt of {prompt_tokens} tokens leaves nothing of {most} to generate")
        return Workload(sequences=self.batch, prompt_tokens=prompt_tokens, generate_tokens=most - prompt_tokens)


class LoadKeywords(TypedDict, total=False):
    """The fields of `LoadOptions` as keywords of `headrace.load`."""

    memory: str | int | None
    host_memory: str | int | None
    device: str | Device
    strategy: str
    dtype: str
    batch: int
    prompt_tokens: int | None
    max_tokens: int | None
    read_limit: str | float | None
    machine: Machine | None
    attention: str | None
    poison: bool
    trust_remote_code: bool
    draft_tokens: int
    cpu_blocks: bool
    cache_on_host: bool
    compile_layers: bool
    fresh: bool


class Options(NamedTuple):
    """Options checked against a model and a device; sizes in bytes, rates in bytes per second."""

    asked: LoadOptions
    workload: Workload
    budget_bytes: int
    host_budget_bytes: int
    """host memory for blocks that travel to an accelerator, for those the CPU computes, for the ring between"""
    strategy: Strategy | None
    dtype: str | None
    read_limit_bytes_per_s: float | None
