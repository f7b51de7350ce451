"""Paths as people write them, and the user's own directories, on systems too where nobody has a home."""

from __future__ import annotations

import os
from pathlib import Path

from headrace.errors import InvalidRequestError


def user_path(text: str | Path) -> Path:
    """`text` with a ~ at its beginning resolved; raises InvalidRequestError where that home is not known."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InvalidRequestError(
            f"{text} begins with a home directory that is not known here; write the whole path, or set HOME"
        ) from error


def user_directory(variable: str, default: str) -> Path:
    """headrace's part of a directory of the XDG standard: what `variable` names, else `default` (under ~)."""
    named = os.environ.get(variable)
    return (Path(named) if named else user_path(default)) / "headrace"


def chosen_path(variable: str, standard: str, default: str, name: str) -> Path | None:
    """What `variable` names, else `name` in headrace's part of a directory of the XDG standard.

    None where `variable` is set to nothing, or there is no home to look in.
    """
    named = os.environ.get(variable)
    if named is not None:
        return user_path(named) if named else None
    try:
        return user_directory(standard, default) / name
    except InvalidRequestError:
        return None


def is_given(path: Path) -> bool:
    """Whether there is something to read: a file, or a pipe from another program."""
    return path.exists() and not path.is_dir()
