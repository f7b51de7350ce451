"""Dataclasses and named tuples as JSON holds them, and back again, exactly.

A record becomes an object of its fields, a mapping a list of pairs, a tuple a list; JSON's numbers hold every float to
the last bit, and infinity.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar, Union

Value = TypeVar("Value")


def to_plain(value: Any) -> Any:
    """What JSON can hold of `value`; raises TypeError for what `from_plain` could not make again."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    names = _fields(type(value))
    if names is not None:
        return {name: to_plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return [[to_plain(key), to_plain(held)] for key, held in value.items()]
    if isinstance(value, tuple):
        return [to_plain(held) for held in value]
    raise TypeError(f"{type(value).__name__} has no plain form")


def from_plain(kind: type[Value], plain: Any) -> Value:
    """The value of type `kind` that `plain` was made of; raises ValueError where it is of another form."""
    found: Value = _read(kind, plain)
    return found


def _read(kind: Any, plain: Any) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_one_of(inner, plain)
    if origin is tuple and isinstance(plain, list):
        kinds = inner[:1] * len(plain) if inner[1:] == (...,) else inner
        return tuple(_read(each, held) for each, held in zip(kinds, plain, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(plain, list):
        return {_read(inner[0], key): _read(inner[1], held) for key, held in plain}
    if kind is float and type(plain) in (int, float):
        return float(plain)
    if kind in (bool, int, str, types.NoneType) and type(plain) is kind:
        return plain
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(plain)
    names = _fields(kind)
    if names is None or not isinstance(plain, dict) or set(plain) != set(names):
        raise ValueError(f"no {kind}: {plain!r:.80}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _read(hints[name], plain[name]) for name in names})


def _read_one_of(kinds: tuple[Any, ...], plain: Any) -> Any:
    for kind in kinds:
        try:
            return _read(kind, plain)
        except ValueError:
            continue
    raise ValueError(f"none of {kinds}: {plain!r:.80}")


def _fields(kind: Any) -> tuple[str, ...] | None:
    """The names of a record's fields; None for what is no record."""
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind) if field.init)
    return getattr(kind, "_fields", None)
