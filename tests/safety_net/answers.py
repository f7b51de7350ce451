"""What a command answers, made comparable: numbers and choices as they are, prose by its presence alone."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from headrace.cli.main import main
from safety_net.cases import CASES
from safety_net.checkpoints import CHECKPOINTS, write_checkpoint

HERE = Path(__file__).parent
RECORDED = HERE / "recorded"
RELATIVE_TOLERANCE = 1e-9
PROSE = "..."
PROSE_KEYS = {"advice", "arithmetic", "claim", "headrace_version", "how", "notes", "source", "why_not"}
CHOICE_KEYS = {"binds"}
"""whose values are choices although they may be several words"""
ENVIRONMENT = {"HEADRACE_HISTORY": "", "HEADRACE_DEVICE": "cpu"}
"""no history, so that no run has taught anything"""


def write_checkpoints(directory: Path) -> None:
    """Write all that the cases name."""
    for name in CHECKPOINTS:
        write_checkpoint(directory, name)


def answer(case: str, checkpoints: Path) -> dict[str, Any]:
    """Run a case's command in this process; its exit code, its JSON, and whether it complained."""
    arguments = [
        word.format(checkpoints=checkpoints, machines=HERE / "machines", data=HERE.parent / "data")
        for word in shlex.split(CASES[case])
    ]
    out, complaint = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, ENVIRONMENT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(complaint),
    ):
        code = main([*arguments, "--json"])
    report = json.loads(out.getvalue()) if out.getvalue() else None
    refusal = PROSE if code and complaint.getvalue() else None
    return {"exit_code": code, "refusal": refusal, "report": comparable(report)}


def comparable(value: Any, key: str = "") -> Any:
    """Round numbers to twelve digits and replace prose: a list of sentences by one, or by none."""
    if isinstance(value, dict):
        return {name: comparable(item, name) for name, item in value.items()}
    if isinstance(value, list):
        if value and all(isinstance(item, str) and _is_prose(item, key) for item in value):
            return [PROSE]
        return [comparable(item, key) for item in value]
    if isinstance(value, str):
        if key == "verdict":  # holds, false, half, above: the rest says why
            return re.findall(r"\w+", value)[0] if value[:1].isalpha() else PROSE
        return PROSE if _is_prose(value, key) else value
    if isinstance(value, float):
        return float(f"{value:.12g}")
    return value


def _is_prose(text: str, key: str) -> bool:
    return key in PROSE_KEYS or (" " in text and key not in CHOICE_KEYS)


def differences(before: Any, now: Any, path: str = "$") -> Iterator[str]:
    """Name every place where two answers differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            if key not in now:
                yield f"{path}.{key}: was {_short(before[key])}, is gone"
            elif key not in before:
                yield f"{path}.{key}: is new, {_short(now[key])}"
            else:
                yield from differences(before[key], now[key], f"{path}.{key}")
    elif isinstance(before, list) and isinstance(now, list):
        if len(before) != len(now):
            yield f"{path}: had {len(before)} entries, has {len(now)}"
        for number, (old, new) in enumerate(zip(before, now, strict=False)):
            name = f"{number}:{old['name']}" if isinstance(old, dict) and "name" in old else str(number)
            yield from differences(old, new, f"{path}[{name}]")
    elif not _same(before, now):
        yield f"{path}: was {_short(before)}, is {_short(now)}"


def _same(before: Any, now: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (before, now))
    if numbers:
        return math.isclose(before, now, rel_tol=RELATIVE_TOLERANCE)
    return type(before) is type(now) and bool(before == now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def recorded(case: str) -> dict[str, Any]:
    """Read what a case answered when it was recorded."""
    made: dict[str, Any] = json.loads((RECORDED / f"{case}.json").read_text(encoding="utf-8"))
    return made


def record(case: str, checkpoints: Path) -> list[str]:
    """Write down what a case answers now; return what that changes."""
    path, now = RECORDED / f"{case}.json", answer(case, checkpoints)
    changed = list(differences(recorded(case), now)) if path.exists() else [f"$: is new, {_short(now)}"]
    if changed:
        path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    return changed
