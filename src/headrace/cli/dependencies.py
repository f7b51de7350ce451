"""The libraries of the `run` extra: there, or one message that says how to get them."""

from __future__ import annotations

import importlib
import importlib.util

from headrace.errors import DependencyError

RUN_LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "numpy")
HOW_TO_INSTALL = "pip install 'headrace[run]'"


def require_run_libraries(purpose: str) -> None:
    """Raise DependencyError, with the command that installs them, unless the libraries of the `run` extra are there."""
    missing = [name for name in RUN_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"{purpose} needs {', '.join(missing)}, not installed here; install with {HOW_TO_INSTALL}"
        )
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise DependencyError(f"torch is installed but does not load ({error}); try {HOW_TO_INSTALL}") from error
