"""A config.json read field by field, each checked before it is believed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.errors import CheckpointError

_LARGEST = 2**40
_LARGEST_FILE_BYTES = 16 << 20


def read_config(path: Path) -> dict[str, Any]:
    """Return what a config.json holds; raises CheckpointError where it is missing or no JSON object."""
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; a config.json has a few thousand")
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; a Hugging Face checkpoint directory holds one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds {type(raw).__name__} where an object is expected")
    return raw


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

    def number(self, name: str, *, default: float) -> float:
        """Return a field that is a number above 0."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _LARGEST:
            raise CheckpointError(f"{self.origin}: {name} is {value!r}; a number above 0 is expected")
        return float(value)

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
