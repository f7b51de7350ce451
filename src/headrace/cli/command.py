"""What the app needs to know of a command: name, function, examples; and what a command needs to be installed."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import NamedTuple

from headrace.errors import DependencyError

RUN_LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "numpy")
INTERRUPTED = 130
"""exit code of a command that Ctrl-C ended"""
HOW_TO_INSTALL = "pip install 'headrace[run]'"


class Command(NamedTuple):
    """One command of the command line."""

    name: str
    function: Callable[..., None]
    examples: tuple[str, ...]

    @property
    def epilog(self) -> str:
        """The end of the command's help: its examples, one to a line."""
        return epilog(self.examples)


def epilog(examples: tuple[str, ...]) -> str:
    """Lay examples out so that the help keeps their lines as they are."""
    return "Examples:\n\n\b\n" + "\n".join(f"  {line}" for line in examples)


def require_run_libraries(purpose: str) -> None:
    """Raise DependencyError, with the command that installs them, unless the libraries of the `run` extra are there."""
    missing = [name for name in RUN_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"{purpose} needs {', '.join(missing)}, not installed here; install with {HOW_TO_INSTALL}"
        )


def load_torch() -> None:
    """Import torch; raises DependencyError where it does not load."""
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise DependencyError(f"torch is installed but does not load ({error}); try {HOW_TO_INSTALL}") from error


def load_run_libraries(*, compiles: bool = False) -> None:
    """Import what runs models, which takes seconds, without what only compiling needs unless this run `compiles`.

    Next to nothing of it becomes garbage: the collector looks neither while it is imported nor, for good, at what came
    of it.
    """
    if "transformers" in sys.modules:
        return
    gc.disable()
    try:
        load_torch()
        if not compiles:
            from headrace.inference.lean_imports import leave_out_compiler_and_groups

            leave_out_compiler_and_groups()
        importlib.import_module("headrace.inference.api")
        gc.freeze()
    finally:
        gc.enable()
