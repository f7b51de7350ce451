"""How much of a device's and of the host's memory may be taken: defaults, and budgets that cannot be kept."""

from __future__ import annotations

from headrace.errors import BudgetError
from headrace.planning.budgets import beyond_memory, device_reserve_bytes, host_reserve_bytes
from headrace.streaming.device import Device
from headrace.streaming.system_memory import default_budget_bytes, free_bytes, total_bytes
from headrace.units import format_bytes


def device_budget_bytes(device: Device) -> int:
    """What headrace takes of the computing device when no budget is given: what is free now, less a reserve."""
    memory = device.memory()
    if memory is None:
        return default_budget_bytes()
    return max(0, memory.free_bytes - device_reserve_bytes(memory.free_bytes))


def host_budget_bytes() -> int:
    """What headrace takes of the host's memory beside an accelerator when no budget is given."""
    free = free_bytes()
    return max(0, free - host_reserve_bytes(free))


def refuse_what_is_not_free(device: Device, budget_bytes: int, host_bytes: int) -> None:
    """Raise BudgetError where an accelerator, or the host beside it, has less free than its budget.

    A budget of the CPU's own memory is a promise not to exceed it, and may be generous; an accelerator's memory
    is taken at once, and what others hold of it does not come back.
    """
    memory = device.memory()
    if memory is None:
        return
    if budget_bytes > memory.free_bytes:
        held = memory.total_bytes - memory.free_bytes
        raise BudgetError(
            f"--memory {format_bytes(budget_bytes)} was asked for on {device.name}, but only "
            f"{format_bytes(memory.free_bytes)} of its {format_bytes(memory.total_bytes)} are free "
            f"({format_bytes(held)} are held by this and other processes); give at most "
            f"{memory.free_bytes >> 20}MiB, or end what else runs on it (nvidia-smi lists it)"
        )
    free = free_bytes()
    if host_bytes > free:
        raise BudgetError(
            f"--host-memory {format_bytes(host_bytes)} was asked for, but only {format_bytes(free)} are free; give at "
            f"most {free >> 20}MiB"
        )


def note_what_there_is_not(device: Device, budget_bytes: int) -> tuple[str, ...]:
    """A note where the CPU's budget is more than there is, and what is free now."""
    if not device.uses_host_memory:
        return ()
    free = free_bytes()
    done = f"planned as if it had so much, but {format_bytes(free)} are free; give --memory {free >> 20}MiB"
    return beyond_memory("--memory", budget_bytes, total_bytes(), "this machine", done)
