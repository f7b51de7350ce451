"""headrace: run transformer models bigger than the memory they may use, and know beforehand how fast that will be.

The three verbs are imported on first use, so that `import headrace` stays fast and needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "plan", "probe"]

if TYPE_CHECKING:
    from headrace.inference.api import load as load
    from headrace.inference.api import plan as plan
    from headrace.inference.api import probe as probe


def __getattr__(name: str) -> Any:
    """Import `load`, `plan` and `probe` from the inference floor when they are first asked for."""
    if name in {"load", "plan", "probe"}:
        from headrace.inference import api

        return getattr(api, name)
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")
