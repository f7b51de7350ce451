"""What decides how a model is loaded, checked: budget, work, strategy, dtype, reading.

The same checks stand behind `headrace.load`, `headrace run` and `headrace plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from headrace.dtypes import DTYPES, STORED_DTYPES
from headrace.errors import InvalidRequestError, MachineError
from headrace.machine.compute_curve import ComputeCurve
from headrace.machine.machine import Machine
from headrace.model.model import Model
from headrace.planning.strategies import RUNNABLE, Strategy
from headrace.planning.workload import Workload
from headrace.units import format_bytes, parse_rate, parse_size

DEFAULT_MAX_TOKENS = 1024
MOST_DRAFT_TOKENS = 64
RESERVE_SHARE = 0.05
RESERVE_MIN_BYTES = 160 << 20
DEVICE_RESERVE_MIN_BYTES = 512 << 20
HOST_RESERVE_SHARE = 0.1
HOST_RESERVE_MIN_BYTES = 1 << 30


class Options(NamedTuple):
    """Everything that decides how a model is loaded; sizes in bytes, rates in bytes per second."""

    budget_bytes: int
    workload: Workload
    strategy: Strategy | None = None
    dtype: str | None = None
    read_limit_bytes_per_s: float | None = None
    machine: Machine | None = None
    attention: str | None = None
    poison: bool = False
    trust_remote_code: bool = False
    draft_tokens: int = 0
    """drafted tokens that a decode pass checks, at most"""
    host_budget_bytes: int = 0
    """host memory for blocks that travel to an accelerator, for those the CPU computes, for the ring between"""
    cpu_blocks: bool = False
    """the CPU may compute layers for an accelerator, whose results then differ in rounding"""
    cache_on_host: bool = False
    """keys and values may wait in host memory and visit an accelerator layer by layer"""
    compile_layers: bool = False
    """torch.compile the feed-forward parts and norms of the layers; results may then differ in rounding"""


def device_reserve_bytes(free_bytes: int) -> int:
    """What is left alone of so much free memory of an accelerator: a twentieth, 512 MiB at least."""
    return max(DEVICE_RESERVE_MIN_BYTES, int(RESERVE_SHARE * free_bytes))


def host_reserve_bytes(free_bytes: int) -> int:
    """What is left alone of free host memory beside an accelerator: a tenth, 1 GiB at least.

    More than where the CPU computes: page-locked memory cannot be taken back by a system that runs short.
    """
    return max(HOST_RESERVE_MIN_BYTES, int(HOST_RESERVE_SHARE * free_bytes))


def reserve_bytes(free_bytes: int) -> int:
    """What is left alone of so much free memory when no budget is given: a twentieth, 160 MiB at least."""
    return max(RESERVE_MIN_BYTES, int(RESERVE_SHARE * free_bytes))


def beyond_memory(option: str, asked_bytes: float | None, has_bytes: float, owner: str, done: str) -> tuple[str, ...]:
    """A note where `option` allows more memory than its owner has, with what was done about it."""
    if asked_bytes is None or asked_bytes <= has_bytes:
        return ()
    return (f"{option} is more than {format_bytes(has_bytes)}, all that {owner} has: {done}",)


def make_options(
    model: Model,
    *,
    memory: str | int | None,
    default_budget_bytes: Callable[[], int],
    strategy: str = "auto",
    dtype: str = "auto",
    batch: int = 1,
    prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    read_limit: str | float | None = None,
    machine: Machine | None = None,
    attention: str | None = None,
    poison: bool = False,
    trust_remote_code: bool = False,
    draft_tokens: int = 0,
    host_memory: str | int | None = None,
    default_host_budget_bytes: Callable[[], int] | None = None,
    cpu_blocks: bool = False,
    cache_on_host: bool = False,
    compile_layers: bool = False,
) -> Options:
    """Check the arguments of `load`; raises InvalidRequestError for any that cannot be meant.

    `default_budget_bytes` is asked where `memory` is None, and `default_host_budget_bytes`, which is None where the
    processor alone computes, where `host_memory` is.
    """
    if default_host_budget_bytes is None:
        for name, given in (
            ("--host-memory", host_memory is not None),
            ("--cpu-blocks", cpu_blocks),
            ("--cache-on-host", cache_on_host),
        ):
            if given:
                raise InvalidRequestError(
                    f"{name} is for an accelerator (--device cuda); the CPU has one memory, which --memory bounds"
                )
    if strategy not in ("auto", *RUNNABLE):
        raise InvalidRequestError(f"cannot run with strategy {strategy!r}; choose auto, {', '.join(RUNNABLE)}")
    if dtype != "auto" and dtype not in DTYPES:
        raise InvalidRequestError(f"unsupported dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    longest = model.context_tokens
    max_tokens = min(longest, DEFAULT_MAX_TOKENS) if max_tokens is None else max_tokens
    if not 2 <= max_tokens <= longest:
        raise InvalidRequestError(
            f"{max_tokens} tokens of context were asked for; {model.name} can do 2 to {longest} (prompt and new ones)"
        )
    prompt_tokens = max_tokens // 2 if prompt_tokens is None else prompt_tokens
    if not 1 <= prompt_tokens < max_tokens:
        raise InvalidRequestError(f"a prompt of {prompt_tokens} tokens leaves nothing of {max_tokens} to generate")
    if batch < 1:
        raise InvalidRequestError(f"batch must be at least 1, not {batch}")
    if isinstance(memory, str):
        memory = parse_size(memory)
    if not 0 <= draft_tokens <= MOST_DRAFT_TOKENS:
        raise InvalidRequestError(f"draft tokens must lie between 0 and {MOST_DRAFT_TOKENS}, not {draft_tokens}")
    if draft_tokens and batch > 1:
        raise InvalidRequestError(f"drafts serve one sequence at a time, and {batch} were asked for")
    limit = parse_rate(read_limit) if isinstance(read_limit, str) else read_limit
    if limit is not None and not 0 < limit < float("inf"):
        raise InvalidRequestError(f"the read limit must be positive, not {limit}")
    return Options(
        budget_bytes=default_budget_bytes() if memory is None else memory,
        workload=Workload(sequences=batch, prompt_tokens=prompt_tokens, generate_tokens=max_tokens - prompt_tokens),
        strategy=None if strategy == "auto" else Strategy(strategy),
        dtype=None if dtype == "auto" else dtype,
        read_limit_bytes_per_s=limit,
        machine=machine,
        attention=attention,
        poison=poison,
        trust_remote_code=trust_remote_code,
        draft_tokens=draft_tokens,
        host_budget_bytes=_host_budget(host_memory, default_host_budget_bytes),
        cpu_blocks=cpu_blocks,
        cache_on_host=cache_on_host,
        compile_layers=compile_layers,
    )


def _host_budget(host_memory: str | int | None, default_bytes: Callable[[], int] | None) -> int:
    if default_bytes is None:
        return 0
    if isinstance(host_memory, str):
        host_memory = parse_size(host_memory)
    return default_bytes() if host_memory is None else host_memory


def compute_dtypes(model: Model, wanted: str | None) -> tuple[str, ...]:
    """The dtypes to compare: the one that is wanted, or the stored one and float32.

    Raises MachineError where the weights are stored in a dtype that is not computed with.
    """
    stored = model.stored_dtype
    if stored not in STORED_DTYPES and stored != model.weight_format:
        raise MachineError(f"{model.name} is stored as {stored}, which no machine file has measurements of")
    if wanted is not None:
        return (wanted,)
    own = STORED_DTYPES[stored].name if stored in STORED_DTYPES else "bfloat16"
    return tuple(dict.fromkeys((own, "float32")))


def work_seconds(curve: ComputeCurve, work: Workload) -> float:
    """Seconds per weight of the whole work: how the faster of two dtypes is told."""
    prefill = curve.seconds_per_parameter(work.sequences * work.prompt_tokens)
    return prefill + (work.generate_tokens - 1) * curve.seconds_per_parameter(work.sequences)
