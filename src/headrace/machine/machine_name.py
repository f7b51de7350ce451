"""What people write for a machine: `h100`, `8xh100`, `4x8xh100`, `4xv100-32@dgx-2`; counts, name, system."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from headrace.errors import MachineError

MOST_DEVICES = 1_000_000
_COUNT = re.compile(r"\s*([+-]?[0-9]+(?:\.[0-9]+)?)\s*[x*×]\s*", re.IGNORECASE)  # noqa: RUF001 - people paste it
_MAKERS = (
    "nvidia-geforce-",
    "nvidia-",
    "amd-instinct-",
    "amd-radeon-",
    "amd-",
    "intel-",
    "google-",
    "geforce-",
    "tesla-",
    "instinct-",
)

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class MachineName:
    """The parts of what was written."""

    text: str
    nodes: int | None
    """computers; None where only devices are counted"""
    count: int | None
    """devices, in each of `nodes` where these are given"""
    name: str
    system: str | None


def parse_machine_name(text: str) -> MachineName:
    """Split `4x8xh100@system`; raises MachineError for invalid counts and unknown names."""
    body, at, system = text.partition("@")
    numbers: list[int] = []
    rest = body
    while match := _COUNT.match(rest):
        if not re.fullmatch(r"[0-9]{1,12}", match[1]) or not 1 <= int(match[1]) <= MOST_DEVICES:
            raise MachineError(f"{text!r}: {match[1]} is no number of devices; 1 to {MOST_DEVICES:,} are")
        numbers.append(int(match[1]))
        rest = rest[match.end() :]
    if not rest.strip():
        raise MachineError(f"{text!r} names no machine; write for instance h100, 8xh100 or 2x8xh100")
    if at and not system.strip():
        raise MachineError(f"{text!r} names no computer behind the @; write for instance {body.strip()}@dgx-2")
    if len(numbers) > 2:
        raise MachineError(f"{text!r} has {len(numbers)} counts; computers and devices in each are what is counted")
    if len(numbers) == 2 and numbers[0] * numbers[1] > MOST_DEVICES:
        raise MachineError(f"{text!r} has more than {MOST_DEVICES:,} devices")
    nodes, count = (numbers[0], numbers[1]) if len(numbers) == 2 else (None, numbers[0] if numbers else None)
    return MachineName(text, nodes, count, rest.strip(), system.strip() or None)


def name_key(name: str) -> str:
    """Bring a name into the form that aliases have: lower case, dashes, no maker."""
    key = re.sub(r"[\s_/]+", "-", name.strip().lower())
    for maker in _MAKERS:
        key = key.removeprefix(maker)
    return re.sub(r"^(rtx|rx|gtx|a|v|h|b)-?([0-9]{3,4})(?=-|$)", _hyphenated, key)


def entry_named(name: str, entries: Mapping[str, Entry]) -> Entry | None:
    """Look a name up among entries by key, first as written, then without its dashes; None where there is none."""
    key = name_key(name)
    if key in entries:
        return entries[key]
    compact = key.replace("-", "")
    return next((entry for known, entry in entries.items() if known.replace("-", "") == compact), None)


def _hyphenated(match: re.Match[str]) -> str:
    return f"{match[1]}-{match[2]}" if match[1] in {"rtx", "rx", "gtx"} else f"{match[1]}{match[2]}"
