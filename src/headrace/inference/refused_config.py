"""Why transformers does not take a config.json: its own words, and the field without which it would."""

from __future__ import annotations

import codecs
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from headrace.errors import CheckpointError
from headrace.model.config_fields import read_config

_KIND = ("model_type", "architectures")
"""fields that say what the others mean"""


def refused_config(path: Path, error: Exception, attempt: Callable[[dict[str, Any]], object]) -> CheckpointError:
    """The error that names the file and, where leaving out one field makes `attempt` succeed, that field."""
    words = " ".join(str(error).split()).rstrip(".")
    reason = f"{path} is not accepted by transformers: {type(error).__name__}: {words}"
    try:
        raw = read_config(path)
        marked = path.read_bytes().startswith(codecs.BOM_UTF8)
    except CheckpointError as unreadable:
        return unreadable
    if marked:
        return CheckpointError(
            f"{path} begins with a byte order mark, which transformers does not read; save it without"
        )
    if _succeeds(attempt, raw):
        return CheckpointError(reason)
    for name, value, rest in _without_one(raw):
        if _succeeds(attempt, rest):
            return CheckpointError(
                f"{reason}. It is accepted without {name}, which is {reprlib.repr(value)}; correct that field"
            )
    return CheckpointError(reason)


def _without_one(raw: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each field's name and value, and the config without it; fields of the text model within a larger one as well."""
    for name, value in raw.items():
        if name in _KIND:
            continue
        if name.endswith("_config") and isinstance(value, dict):
            for inner, inner_value, rest in _without_one(value):
                yield f"{name}.{inner}", inner_value, {**raw, name: rest}
        yield name, value, {key: other for key, other in raw.items() if key != name}


def _succeeds(attempt: Callable[[dict[str, Any]], object], raw: dict[str, Any]) -> bool:
    try:
        attempt(raw)
    except Exception:  # whatever a config or a model class raises, it did not work
        return False
    return True
