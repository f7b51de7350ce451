"""Published measurements as a table: one row each, read strictly.

The columns are those of the project's collection of measurements (658 rows, each with its source); a file of the same
form with other rows is read the same way. What is no measurement of time, rate or size is passed on to be excluded.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import InvalidRequestError, near_names

NEEDED = ("id", "model", "hardware", "n_devices", "strategy", "metric", "value", "unit")
_MOST_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure. Numbers that a source does not give are None; texts stay as they are."""

    id: str
    model: str
    params_total: float | None
    weight_dtype: str
    hardware: str
    num_devices: int | None
    parallelism: str
    strategy: str
    weight_tier: str
    batch: int | None
    batch_text: str
    prompt_tokens: int | None
    generate_tokens: int | None
    metric: str
    value: float
    unit: str
    per_device: bool
    engine: str
    source: str
    notes: str


def read_rows(path: Path) -> list[Row]:
    """Read a file. Raises InvalidRequestError naming the line and the field that is invalid."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InvalidRequestError(f"{path} has {path.stat().st_size} bytes; a table of measurements is smaller")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path} cannot be read: {error}") from error
    try:
        reader = csv.DictReader(text.splitlines(), strict=True)
        columns = reader.fieldnames or ()
        _check_columns(columns, path)
        rows = []
        for raw in reader:
            where = f"{path}, line {reader.line_num}"
            if None in raw or None in raw.values():
                raise InvalidRequestError(f"{where} has another number of fields than the first line")
            rows.append(_row({name: (value or "").strip() for name, value in raw.items()}, where))
    except csv.Error as error:
        raise InvalidRequestError(f"{path} is no table of comma-separated values: {error}") from error
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        if row.id in seen:
            raise InvalidRequestError(f"{path}: the id {row.id!r} stands in rows {seen[row.id] + 1} and {number + 1}")
        seen[row.id] = number
    return rows


def _check_columns(columns: Sequence[str], path: Path) -> None:
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        raise InvalidRequestError(
            f"{path}: the column {missing[0]!r} is missing; {near_names(missing[0], columns)}"
            f"a table of measurements has {', '.join(NEEDED)}"
        )


def _row(raw: dict[str, str], where: str) -> Row:
    value = _number(raw["value"], "value", where)
    if value is None:
        raise InvalidRequestError(f"{where}: value is empty")
    if not raw["id"]:
        raise InvalidRequestError(f"{where}: id is empty")
    total = _number(raw.get("params_total_b", ""), "params_total_b", where, loose=True)
    batch = _number(raw.get("batch_concurrent", ""), "batch_concurrent", where, loose=True)
    devices = _number(raw["n_devices"], "n_devices", where, loose=True)
    return Row(
        id=raw["id"],
        model=raw["model"],
        params_total=None if total is None else total * 1e9,
        weight_dtype=raw.get("weight_dtype", ""),
        hardware=raw["hardware"],
        num_devices=_whole(devices),
        parallelism=raw.get("parallelism", ""),
        strategy=raw["strategy"],
        weight_tier=raw.get("weight_tier", ""),
        batch=_whole(batch),
        batch_text=raw.get("batch_concurrent", ""),
        prompt_tokens=_length(raw.get("prompt_len", ""), where, "prompt_len"),
        generate_tokens=_length(raw.get("gen_len", ""), where, "gen_len"),
        metric=raw["metric"],
        value=value,
        unit=raw["unit"],
        per_device=raw.get("per_device", "").lower() in {"yes", "true", "1"},
        engine=raw.get("engine", ""),
        source=raw.get("source", ""),
        notes=raw.get("notes", ""),
    )


def _whole(value: float | None) -> int | None:
    return None if value is None or value < 1 or value > 1e9 else int(value)


def _number(text: str, name: str, where: str, *, loose: bool = False) -> float | None:
    """Read a number; with `loose`, texts such as `?` or `max (offline)` count as not given."""
    if not text:
        return None
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        if loose:
            return None
        raise InvalidRequestError(f"{where}: {name} is {text!r}, which is no number") from None
    if not math.isfinite(value) or value < 0:
        raise InvalidRequestError(f"{where}: {name} is {text!r}; a finite number from 0 on is expected")
    return value


def _length(text: str, where: str, name: str) -> int | None:
    """Read a number of tokens: `512`, `~500`, `short (~10)`; other texts count as not given."""
    match = re.search(r"\d[\d,]*", text)
    if match is None or re.fullmatch(r"[A-Za-z][^()]*", text):
        return None
    value = _number(match[0], name, where)
    return None if value is None or value > 1e9 else int(value)
