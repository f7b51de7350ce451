"""A table of a TOML file, read field by field: a missing or wrong field raises MachineError that names it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

from headrace.errors import MachineError


@dataclass(frozen=True)
class TomlTable:
    """A table and where it stands in its file (`path`, such as `disk.` or `accelerators[0].`)."""

    raw: Mapping[str, object]
    path: str = ""

    def table(self, key: str, default: object = None) -> TomlTable:
        """The table below `key`."""
        value = self.raw.get(key, default)
        if not isinstance(value, dict):
            raise self._wrong(key, "a table")
        return TomlTable(value, f"{self.path}{key}.")

    def tables(self, key: str) -> list[TomlTable]:
        """All tables of the array below `key`."""
        value = self.raw.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._wrong(key, "an array of tables")
        return [TomlTable(item, f"{self.path}{key}[{number}].") for number, item in enumerate(value)]

    def text(self, key: str) -> str:
        """The text below `key`."""
        value = self.raw.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def texts(self, key: str) -> dict[str, str]:
        """The table below `key`, all of whose values are texts; empty where it is missing."""
        table = self.table(key, {})
        return {name: table.text(name) for name in table.raw}

    def whole(self, key: str) -> int:
        """The whole number below `key`."""
        value = self.raw.get(key)
        if type(value) is not int:
            raise self._wrong(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The finite number below `key`, whole or not."""
        value = self.raw.get(key, default)
        if not is_number(value):
            raise self._wrong(key, "a number")
        return float(value)

    def array(self, key: str) -> list[object]:
        """The array below `key`."""
        value = self.raw.get(key)
        if not isinstance(value, list):
            raise self._wrong(key, "an array")
        return value

    def _wrong(self, key: str, expected: str) -> MachineError:
        if key not in self.raw:
            return MachineError(f"the field {self.path}{key} is missing")
        return MachineError(f"{self.path}{key} is {self.raw[key]!r} where {expected} is expected")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of the file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
