"""A claim, the assumptions that its arithmetic uses, and what came out.

Every number that a claim rests on is a named assumption with a source: a constant, or one that is looked up or
computed from the catalogues when it is first used. Any of them can be set to another value, and the verdict follows.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import NamedTuple

from headrace.errors import InvalidRequestError, near_names

_MOST = 1e30


class Assumption(NamedTuple):
    """A number and where it comes from."""

    value: float
    source: str


Default = Assumption | Callable[["Ledger"], Assumption]
"""a constant, or what finds it, perhaps from other assumptions"""


class Outcome(NamedTuple):
    """What a claim's arithmetic gives."""

    verdict: str
    arithmetic: str
    values: Mapping[str, float]


class Ledger:
    """The assumptions by name; writes down which ones a claim has used."""

    def __init__(self, defaults: Mapping[str, Default], overrides: Mapping[str, float]) -> None:
        for name, value in overrides.items():
            if name not in defaults:
                raise InvalidRequestError(
                    f"no claim rests on {name!r}; {near_names(name, defaults)}`headrace claims` lists every assumption"
                )
            if not 0 < value <= _MOST:
                raise InvalidRequestError(f"{name}={value}: an assumption must be a number above 0")
        self._defaults = defaults
        self._overrides = overrides
        self._used: dict[str, Assumption] = {}

    def __call__(self, name: str) -> float:
        """The value of an assumption."""
        if name not in self._used:
            self._used[name] = self._look_up(name)
        return self._used[name].value

    @property
    def used(self) -> dict[str, Assumption]:
        """Those asked for so far, in that order."""
        return dict(self._used)

    def _look_up(self, name: str) -> Assumption:
        default = self._defaults[name]
        if name in self._overrides:
            return Assumption(float(self._overrides[name]), "set by you")
        return default if isinstance(default, Assumption) else default(self)


Check = Callable[[Ledger], Outcome]
_CHECKS: dict[str, Check] = {}


def checks(name: str) -> Callable[[Check], Check]:
    """Say which claim the function below recomputes."""

    def named(check: Check) -> Check:
        _CHECKS[name] = check
        return check

    return named


class Claim(NamedTuple):
    """One thing that was said, and how it is checked."""

    name: str
    says: str
    check: Check


def told() -> tuple[dict[str, Claim], dict[str, Assumption]]:
    """The claims, whose checks must have been imported, and the assumptions of `claims.toml`."""
    text = resources.files("headrace.economics.claims").joinpath("claims.toml").read_text(encoding="utf-8")
    raw = tomllib.loads(text)
    claims = {name: Claim(name, says, _CHECKS[name]) for name, says in raw["claims"].items()}
    return claims, {name: Assumption(**table) for name, table in raw["assumptions"].items()}


def whole(number: float) -> int:
    """Devices are not divided: round up, a rounding error of the division forgiven."""
    return math.ceil(number * (1 - 1e-12))
