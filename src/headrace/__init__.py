"""headrace: run transformer models bigger than the memory they may use, and know beforehand how fast that will be.

The three verbs are imported on first use, so that `import headrace` stays fast and needs no torch. `plan` needs torch
only to measure this machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace.errors import (
    BudgetError,
    CheckpointChangedError,
    CheckpointCorruptError,
    CheckpointError,
    DependencyError,
    HeadraceError,
    InvalidRequestError,
    MachineError,
    StreamError,
    UnsupportedModelError,
)

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "CheckpointChangedError",
    "CheckpointCorruptError",
    "CheckpointError",
    "DependencyError",
    "HeadraceError",
    "InvalidRequestError",
    "MachineError",
    "StreamError",
    "UnsupportedModelError",
    "__version__",
    "load",
    "plan",
    "probe",
]

if TYPE_CHECKING:
    from headrace.inference.api import load as load
    from headrace.inference.api import probe as probe
    from headrace.inference.plan_api import plan as plan


def __getattr__(name: str) -> Any:
    """Import `load`, `plan` and `probe` from where they are when they are first asked for."""
    if name == "plan":
        from headrace.inference.plan_api import plan

        return plan
    if name in {"load", "probe"}:
        from headrace.inference import api

        return getattr(api, name)
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")
