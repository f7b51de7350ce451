"""A table of a TOML file, read field by field: a missing or wrong field raises MachineError that names it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from headrace.errors import MachineError, near_names
from headrace.machine.quantity import Quantity
from headrace.machine.unit_text import read_number, read_quantity

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class TomlTable:
    """A table, where it stands in its file (`path`, such as `disk.` or `others[0].`), and its constants' source."""

    raw: Mapping[str, object]
    path: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if "source" in self.raw:
            object.__setattr__(self, "source", self.text("source"))

    def __contains__(self, key: str) -> bool:
        return key in self.raw

    def only(self, known: Collection[str]) -> TomlTable:
        """The same table; refused where it has other fields than these and `source`."""
        for name in self.raw:
            if name not in known and name != "source":
                raise MachineError(
                    f"{self.path}{name} is no field of a machine; {near_names(name, known)}"
                    f"known: {', '.join(sorted({*known, 'source'}))}"
                )
        return self

    def table(self, key: str, default: object = None) -> TomlTable:
        """The table below `key`."""
        return TomlTable(self._typed(key, dict, "a table", default), f"{self.path}{key}.", self.source)

    def tables(self, key: str) -> list[TomlTable]:
        """All tables of the array below `key`; none where it is missing."""
        items = self._items(key, dict, "an array of tables")
        return [TomlTable(item, f"{self.path}{key}[{number}].", self.source) for number, item in enumerate(items)]

    def text(self, key: str) -> str:
        """The text below `key`."""
        value = self._typed(key, str, "a text")
        if not value:
            raise self._wrong(key, "a text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """The array of texts below `key`; empty where it is missing."""
        return tuple(self._items(key, str, "an array of texts"))

    def flag(self, key: str) -> bool:
        """The true or false below `key`."""
        return self._typed(key, bool, "true or false")

    def whole(self, key: str, default: int | None = None, *, most: int) -> int:
        """The whole number from 1 to `most` below `key`."""
        value = self.raw.get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self._wrong(key, f"a whole number from 1 to {most:,}")
        return value

    def array(self, key: str) -> list[object]:
        """The array below `key`."""
        return self._typed(key, list, "an array")

    def size(self, key: str) -> float:
        """The bytes below `key`, more than 0."""
        found = read_number(self._given(key), "size", field=f"{self.path}{key}")
        if found <= 0:
            raise MachineError(f"{self.path}{key} is zero; it must be more")
        return found

    def rate(self, key: str, kind: str = "rate") -> Quantity:
        """The quantity below `key`, more than 0."""
        found = read_quantity(self._given(key), kind, field=f"{self.path}{key}", source=self.source)
        if found.low <= 0:
            raise MachineError(f"{self.path}{key} is zero; it must be more, or left out with what needs it")
        return found

    def quantity(self, key: str, kind: str, default: Quantity) -> Quantity:
        """The quantity below `key`, or `default`."""
        return self.optional(key, kind) or default

    def optional(self, key: str, kind: str) -> Quantity | None:
        """The quantity below `key`; None where it is missing."""
        if key not in self.raw:
            return None
        return read_quantity(self.raw[key], kind, field=f"{self.path}{key}", source=self.source)

    def _typed(self, key: str, kind: type[Kind], expected: str, default: object = None) -> Kind:
        value = self.raw.get(key, default)
        if not isinstance(value, kind):
            raise self._wrong(key, expected)
        return value

    def _items(self, key: str, kind: type[Kind], expected: str) -> list[Kind]:
        items = self._typed(key, list, expected, [])
        if not all(isinstance(item, kind) for item in items):
            raise self._wrong(key, expected)
        return items

    def _given(self, key: str) -> object:
        if key not in self.raw:
            raise self._wrong(key, "")
        return self.raw[key]

    def _wrong(self, key: str, expected: str) -> MachineError:
        if key not in self.raw:
            return MachineError(f"the field {self.path}{key} is missing")
        return MachineError(f"{self.path}{key} is {self.raw[key]!r} where {expected} is expected")
