"""Errors of the shipped published rows with their whole source left out of the fit of the engines.

`bench/fit_engines.py` writes `cross_validated.toml`; it holds for one file of measurements, which its digest names.
"""

from __future__ import annotations

import hashlib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from headrace.accuracy.published_metrics import FamilyAccuracy


class CrossValidated(NamedTuple):
    """By family, and apart where another source knows the engine and where none does."""

    families: dict[str, FamilyAccuracy]
    groups: dict[str, FamilyAccuracy]


def cross_validated(measurements: Path) -> CrossValidated | None:
    """Return the errors on sources left out; None for another file than the one they were computed on."""
    text = resources.files("headrace.accuracy").joinpath("cross_validated.toml").read_text(encoding="utf-8")
    raw = tomllib.loads(text)
    if hashlib.sha256(measurements.read_bytes()).hexdigest() != raw["measurements_sha256"]:
        return None
    return CrossValidated(_named(raw["family"]), _named(raw["group"]))


def _named(tables: list[dict[str, Any]]) -> dict[str, FamilyAccuracy]:
    return {table["family"]: FamilyAccuracy(**table) for table in tables}
