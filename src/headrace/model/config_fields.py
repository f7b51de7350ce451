"""A config.json read field by field, each checked before it is believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.errors import CheckpointError

_LARGEST = 2**40


class Fields:
    """A config read field by field; whatever is missing or makes no sense raises CheckpointError naming it."""

    def __init__(self, raw: Mapping[str, Any], origin: str) -> None:
        self.raw, self.origin = raw, origin

    def count(self, *names: str, default: int | None = None, zero: bool = False) -> int:
        """Return the first of these fields that is there: a whole number from 1 on (from 0 with `zero`)."""
        for name in names:
            value = self.raw.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not (0 if zero else 1) <= value < _LARGEST:
                kind = "a whole number from 0 on" if zero else "a positive whole number"
                raise CheckpointError(f"{self.origin}: {name} is {value!r}; {kind} is expected")
            return value
        if default is None:
            raise CheckpointError(f"{self.origin}: {names[0]} is missing; a positive whole number is expected")
        return default

    def flag(self, name: str, *, default: bool) -> bool:
        """Return a field that is true or false."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.origin}: {name} is {value!r}; true or false is expected")
        return value

    def wrong(self, text: str) -> CheckpointError:
        """Return the error that says this config contradicts itself."""
        return CheckpointError(f"{self.origin}: {text}")
