"""The claims of a widely read post of 2021 on the cost of inference, recomputed from models, machines and prices.

Some rows are added: what was left open then, or what its figures are to be held against.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from headrace.economics.claims import latency, memory, money, stock
from headrace.economics.claims.ledger import Assumption, Claim, Default, Ledger, Outcome, told
from headrace.errors import InvalidRequestError, near_names

CLAIMS, _CONSTANTS = told()
ASSUMPTIONS: Mapping[str, Default] = {
    **_CONSTANTS,
    **money.ASSUMPTIONS,
    **memory.ASSUMPTIONS,
    **latency.ASSUMPTIONS,
    **stock.ASSUMPTIONS,
}


class Checked(NamedTuple):
    """A claim with its outcome and what it rests on."""

    claim: Claim
    outcome: Outcome
    assumptions: Mapping[str, Assumption]


def check_claims(name: str | None = None, *, overrides: Mapping[str, float] | None = None) -> list[Checked]:
    """Recompute all claims, or one. Raises InvalidRequestError for unknown names and values without sense."""
    if name is not None and name not in CLAIMS:
        raise InvalidRequestError(f"there is no claim {name!r}; {near_names(name, CLAIMS)}known: {', '.join(CLAIMS)}")
    checked = []
    for claim in CLAIMS.values() if name is None else (CLAIMS[name],):
        ledger = Ledger(ASSUMPTIONS, overrides or {})
        outcome = claim.check(ledger)
        checked.append(Checked(claim, outcome, ledger.used))
    _refuse_idle(name, overrides or {}, checked)
    return checked


def _refuse_idle(name: str | None, overrides: Mapping[str, float], checked: list[Checked]) -> None:
    """An assumption that was set and that the claim asked for does not use is a mistake."""
    idle = [each for each in overrides if not any(each in row.assumptions for row in checked)]
    if idle:
        used = ", ".join(checked[0].assumptions) if name is not None else ""
        raise InvalidRequestError(
            f"{name or 'no claim'} does not use {', '.join(idle)}" + (f"; it uses: {used}" if used else "")
        )
