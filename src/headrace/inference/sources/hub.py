"""A checkpoint from the hub: which files of a repository are needed, whether there is room for them, what goes wrong.

huggingface_hub does the transport: files that were fetched whole stay in its cache, and the next attempt goes on with
the others. It is imported only when something is to be fetched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from headrace.errors import CheckpointError
from headrace.units import format_bytes

_NEEDED = re.compile(r"[^/]+\.(?:safetensors|json|jinja|txt|py|model)|additional_chat_templates/[^/]+\.jinja")
_TWICE = re.compile(r"consolidated.*\.safetensors")
"""the same weights once more, in their authors' own format"""
_SECONDS_APART = 0.5

Heard = Callable[[int, int], None]
"""is told the bytes that are here of those that were to be fetched, now and then, from another thread"""


class Fetched(NamedTuple):
    """A checkpoint that is on this disk now."""

    directory: Path
    num_files: int
    size_bytes: int
    fetched_bytes: int
    """of them those that were not here before"""
    remark: str = ""
    """what the user should know of it"""


class _Repository(NamedTuple):
    hub_id: str
    revision: str | None
    directory: Path | None
    """where the files are to lie; None: in the hub's cache"""


def fetch(
    hub_id: str, *, revision: str | None = None, directory: Path | None = None, heard: Heard | None = None
) -> Fetched:
    """Bring what is needed of a repository onto this disk, unless it is there.

    Raises CheckpointError that says what to do: where there is no such model or no leave to read it, for one without
    safetensors, for want of room, and where the hub does not answer and not all is here from before.
    """
    wanted = _Repository(hub_id, revision, directory)
    try:
        return _fetch(wanted, heard)
    except CheckpointError:
        raise
    except Exception as error:
        here = _all_here(wanted) if _is_out_of_reach(error) else None
        if here is None:
            raise _explained(wanted, error) from error
        return here._replace(remark=f"the hub does not answer ({_short(error)}); this was fetched before")


def needed_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files those that running its model takes: config, tokenizer, safetensors, code of its own."""
    found = [name for name in names if _NEEDED.fullmatch(name)]
    weights = [name for name in found if name.endswith(".safetensors")]
    others = [name for name in weights if not _TWICE.fullmatch(name)]
    return [name for name in found if name not in weights or name in (others or weights)]


def remove_unfinished() -> None:
    """Remove the files that this process is still writing, for when it ends at once: nobody would finish them."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = link.readlink()
            if target.suffix == ".incomplete":
                target.unlink()


def _fetch(wanted: _Repository, heard: Heard | None) -> Fetched:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(wanted.hub_id, revision=wanted.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    names = needed_files(sizes)
    if not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{wanted.hub_id} on the hub {_what_is_there(sizes)}")
    missing_bytes = sum(sizes[name] for name in names if not _is_here(wanted, name, sizes[name], info.sha))
    _refuse_a_full_disk(wanted, missing_bytes)
    with _counted(wanted, missing_bytes, heard):
        path = snapshot_download(
            wanted.hub_id, revision=wanted.revision, local_dir=wanted.directory, allow_patterns=names
        )
    return Fetched(Path(path), len(names), sum(sizes[name] for name in names), missing_bytes)


def _what_is_there(names: Iterable[str]) -> str:
    endings = {name.rsplit(".", 1)[-1] for name in names}
    if "gguf" in endings:
        return "has GGUF files and no safetensors; headrace plans those (headrace plan FILE.gguf) and does not run them"
    if endings & {"bin", "pt", "pth"}:
        return (
            "has its weights as pickled PyTorch files and no safetensors; load it with transformers once and "
            "save_pretrained(DIRECTORY), then give that directory"
        )
    return "has no safetensors files; give a model that has"


def _is_here(wanted: _Repository, name: str, size_bytes: int, sha: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if wanted.directory is not None:
        path = wanted.directory / name
        return path.is_file() and path.stat().st_size == size_bytes
    return isinstance(try_to_load_from_cache(wanted.hub_id, name, revision=sha), str)


def _all_here(wanted: _Repository) -> Fetched | None:
    """What an earlier attempt left, where that was the whole."""
    from huggingface_hub import snapshot_download

    from headrace.model.safetensors_index import TensorIndex

    try:
        found = snapshot_download(
            wanted.hub_id, revision=wanted.revision, local_dir=wanted.directory, local_files_only=True
        )
        TensorIndex.from_directory(Path(found))
    except Exception:
        return None
    files = [path for path in Path(found).iterdir() if path.is_file()]
    return Fetched(Path(found), len(files), sum(path.stat().st_size for path in files), 0)


def _refuse_a_full_disk(wanted: _Repository, missing_bytes: int) -> None:
    place = folder = _folder(wanted)
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if missing_bytes > free_bytes:
        raise CheckpointError(
            f"{wanted.hub_id} needs {format_bytes(missing_bytes)} more in {folder}, where {format_bytes(free_bytes)} "
            "are free; make room, or name another place: --dir DIR, or HF_HOME for the hub's cache"
        )


def _folder(wanted: _Repository) -> Path:
    from huggingface_hub import constants

    if wanted.directory is not None:
        return wanted.directory
    return Path(constants.HF_HUB_CACHE) / f"models--{wanted.hub_id.replace('/', '--')}"


@contextmanager
def _counted(wanted: _Repository, missing_bytes: int, heard: Heard | None) -> Iterator[None]:
    """Tell `heard` how much of the missing bytes is on the disk, while files grow there."""
    if heard is None or not missing_bytes:
        yield
        return
    folder, ended = _folder(wanted), threading.Event()
    before_bytes = _bytes_in(folder)

    def watch() -> None:
        while not ended.wait(_SECONDS_APART):
            heard(min(max(0, _bytes_in(folder) - before_bytes), missing_bytes), missing_bytes)

    watcher = threading.Thread(target=watch, name="headrace-pull", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _bytes_in(folder: Path) -> int:
    """Bytes of a folder's files as they take up the disk: those of files that are still growing count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(root, name))
            except OSError:  # moved to its place in between
                continue
            total += found.st_blocks * 512
    return total


# -- what goes wrong ----------------------------------------------------------------------------------------------


def _is_out_of_reach(error: BaseException) -> bool:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return True
    if isinstance(error, errors.HfHubHTTPError):
        response = getattr(error, "response", None)
        return response is None or response.status_code >= 500
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(("httpx", "requests"))


def _explained(wanted: _Repository, error: BaseException) -> CheckpointError:
    from huggingface_hub import constants, errors

    hub_id, hub = wanted.hub_id, constants.ENDPOINT
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        text = f"{hub_id} is not whole on this disk, and HF_HUB_OFFLINE keeps the hub from being asked; unset it"
    elif isinstance(error, errors.GatedRepoError):
        text = (
            f"{hub_id} is given only to those who accept its terms: do so at {hub}/{hub_id}, then log in (hf auth "
            "login, or HF_TOKEN=TOKEN)"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"{hub_id} has no revision {wanted.revision!r}; see {hub}/{hub_id}/commits/main for those it has"
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = (
            f"there is no model {hub_id} at {hub}, or it is private: check its name, or log in (hf auth login, or "
            "HF_TOKEN=TOKEN)"
        )
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text = f"the disk of {_folder(wanted)} is full; make room, or name another place: --dir DIR or HF_HOME"
    elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        text = f"{_folder(wanted)} cannot be written: {error.strerror}; name another place: --dir DIR or HF_HOME"
    elif _is_out_of_reach(error):
        text = f"{hub} does not answer ({_short(error)}), and {hub_id} is not whole on this disk; try again later"
    else:
        text = f"{hub_id} could not be fetched from {hub}: {_short(error)}"
    return CheckpointError(text)


def _short(error: BaseException) -> str:
    """The first line of its message, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
