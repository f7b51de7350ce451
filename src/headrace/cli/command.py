"""What the app needs to know of a command: its name, its function, its examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


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
