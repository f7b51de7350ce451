"""A config.json read field by field, each checked before it is believed; and what fields are that it leaves out."""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Container, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from headrace.errors import CheckpointError

_LARGEST = 2**40
_LARGEST_FILE_BYTES = 16 << 20
_NESTED = ("text_config", "language_config", "llm_config", "thinker_config")
"""where models of several kinds of input keep the config of their text model"""


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


def text_config(raw: Mapping[str, Any], known: Container[object]) -> Mapping[str, Any]:
    """Return the part that describes the text model: `raw` itself where its model_type is known, else what it nests.

    The model_type, where that part has none, is the one that transformers takes; dtype and tied embeddings are those of
    the whole where the part leaves them out.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type in known:
        return raw
    within = _defaults()["text_model"].get(model_type)
    nested = next((raw[name] for name in _NESTED if isinstance(raw.get(name), Mapping)), None)
    if nested is not None:
        shared = {name: raw[name] for name in ("torch_dtype", "dtype", "tie_word_embeddings") if name in raw}
        named = nested.get("model_type") or within or model_type
        return text_config({**shared, **nested, "model_type": named}, known)
    return raw if within is None else {**raw, "model_type": within}  # older ones have all fields side by side


def class_defaults(model_type: str) -> Mapping[str, Any]:
    """The values that fields have in transformers' class of this type where a config leaves them out."""
    found: Mapping[str, Any] = _defaults()["of_class"].get(model_type, {})
    return found


@functools.cache
def _defaults() -> dict[str, Any]:
    return tomllib.loads(resources.files("headrace.model").joinpath("class_defaults.toml").read_text(encoding="utf-8"))


class Fields:
    """A config read field by field; whatever is missing or makes no sense raises CheckpointError naming it."""

    def __init__(self, raw: Mapping[str, Any], origin: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.raw, self.origin, self._defaults = raw, origin, defaults or {}
        self.assumed: list[str] = []
        """fields without which there is no size, and which the config leaves to the class"""

    def count(self, *names: str, default: int | None = None, zero: bool = False) -> int:
        """Return the first of these fields that is there: a whole number from 1 on (from 0 with `zero`).

        Where none is there, what the class has; where that is nothing either, or a field is null, `default`.
        """
        for name in names:
            value = self.raw.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not (0 if zero else 1) <= value < _LARGEST:
                kind = "a whole number from 0 on" if zero else "a positive whole number"
                raise CheckpointError(f"{self.origin}: {name} is {value!r}; {kind} is expected")
            return value
        own = next((name for name in names if name in self._defaults), None)
        if own is not None and not any(name in self.raw for name in names):
            if default is None:
                self.assumed.append(own)
            return int(self._defaults[own])
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

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Return a field that is true or false. Null is false; `default` serves where the class has nothing."""
        value = self.raw.get(name, self._defaults.get(name, default))
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{self.origin}: {name} is {value!r}; true or false is expected")
        return bool(value)

    def wrong(self, text: str) -> CheckpointError:
        """Return the error that says this config contradicts itself."""
        return CheckpointError(f"{self.origin}: {text}")
