"""Leave out of a process what transformers imports and no run uses: torch's compiler and its distributed tensors.

Behind them stands sympy; together they are a third of the bytes that importing takes, and of its time. This is for the
process of a command alone: a program that calls `headrace.load` may want either.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COMPILER = "torch._dynamo"
_WITHOUT_IT = f"{_COMPILER}._trace_wrapped_higher_order_op"
"""the module of it that transformers' masks take a class from, and that needs nothing else of it"""
_MARKS = ("allow_in_graph", "assume_constant_result", "disable")
"""what other modules do to their functions when they are imported: they mark them for a compiler"""


def leave_out_compiler_and_groups() -> None:
    """Let transformers, when it is imported, find no group of processes, and a compiler that is not loaded yet.

    The compiler is loaded when it is asked for more than marks. Nothing happens where either is loaded already.
    """
    if "transformers" in sys.modules or _COMPILER in sys.modules:
        return
    _defer_compiler()
    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        import transformers

        transformers.utils.is_torch_distributed_available()  # asks once, and remembers
    finally:
        torch.distributed.is_available = is_available


def _defer_compiler() -> None:
    spec = importlib.util.find_spec(_COMPILER)
    assert spec is not None
    sys.modules[_COMPILER] = package = _Unloaded(spec)
    package.__path__ = spec.submodule_search_locations or []
    with contextlib.suppress(ImportError):
        importlib.import_module(_WITHOUT_IT)
    del package.__path__


class _Unloaded(ModuleType):
    """A package that is loaded when anything of it is used, or any other module of it imported."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__ = spec
        for mark in _MARKS:
            setattr(self, mark, _unmarked)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # what is asked of any module
            raise AttributeError(name)
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        for mark in _MARKS:
            delattr(self, mark)
        self.__path__ = spec.submodule_search_locations or []
        spec.loader.exec_module(self)
        return getattr(self, name)


def _unmarked(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """The function as it is, or a decorator that leaves one so."""
    return _unmarked if function is None else function
