"""Run processes under a limit on all of their memory: anonymous memory and page cache together.

    with MemoryCgroup(2 << 30) as group:
        process = group.popen(["python", "script.py"])
        process.wait()
        print(group.peak_bytes(), group.oom_kills())

A limit of the page cache is the point: without it, a system that maps its weights seems to need little memory while the
kernel keeps all of the file in memory for it. This is done with a memory control group, of version 1 or 2, which needs
the right to make one (usually root).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

# The shell joins the group before it becomes the command, so that not even the interpreter's start escapes the limit.
_JOIN_AND_EXEC = 'echo $$ > "$0" || exit 125; exec "$@"'


class MemoryCgroupError(Exception):
    """No memory control group can be made here; the text says why."""


class _Parent(NamedTuple):
    """A directory under which groups can be made."""

    directory: Path
    version: int


class MemoryCgroup:
    """A memory control group, made on entering the `with` block; on leaving it, what still runs inside is killed."""

    def __init__(self, limit_bytes: int, *, name: str = "headrace") -> None:
        if limit_bytes < 1 << 20:
            raise ValueError(f"a limit of {limit_bytes} bytes leaves no process room to start")
        self.limit_bytes = limit_bytes
        self._name = f"{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._directory: Path | None = None
        self._version = 0

    def __enter__(self) -> MemoryCgroup:
        """Make the group and set its limit."""
        failures: list[str] = []
        for parent in _possible_parents():
            directory = parent.directory / self._name
            try:
                if parent.version == 2:
                    _delegate_memory(parent.directory)
                directory.mkdir()
            except OSError as error:
                failures.append(f"{directory}: {error.strerror}")
                continue
            self._directory, self._version = directory, parent.version
            try:
                self._set_limit()
            except OSError as error:
                failures.append(f"{error.filename}: {error.strerror}")
                self._remove()
                continue
            return self
        reasons = "; ".join(failures) or "no memory controller is mounted"
        raise MemoryCgroupError(f"cannot make a memory control group (usually only root can): {reasons}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what is left in the group and remove it."""
        self._remove()

    @property
    def directory(self) -> Path:
        """The group's directory in the control group file system."""
        if self._directory is None:
            raise MemoryCgroupError("the group exists only inside its `with` block")
        return self._directory

    def popen(self, command: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[Any]:
        """Start a command inside the group; `options` are those of subprocess.Popen.

        Exit status 125 with nothing run means that the group could not be joined.
        """
        procs = self.directory / "cgroup.procs"
        return subprocess.Popen(
            ["/bin/sh", "-c", _JOIN_AND_EXEC, str(procs), *(str(word) for word in command)], **options
        )

    def current_bytes(self) -> int:
        """Memory charged to the group now, page cache included."""
        return int(self._read("memory.usage_in_bytes" if self._version == 1 else "memory.current"))

    def anonymous_bytes(self) -> int:
        """Memory charged to the group now that is not page cache and thus cannot be given up without swap."""
        return dict(self._pairs("memory.stat"))["rss" if self._version == 1 else "anon"]

    def peak_bytes(self) -> int:
        """Return the most memory ever charged to the group, page cache included."""
        if self._version == 1:
            return int(self._read("memory.max_usage_in_bytes"))
        try:
            return int(self._read("memory.peak"))
        except FileNotFoundError:
            raise MemoryCgroupError("this kernel does not record a group's peak (Linux 5.19 or later does)") from None

    def oom_kills(self) -> int:
        """How many of the group's processes the kernel has killed for the limit."""
        return dict(self._pairs("memory.oom_control" if self._version == 1 else "memory.events")).get("oom_kill", 0)

    def kill(self) -> None:
        """Kill every process in the group and wait until they are gone."""
        for _ in range(200):
            members = self._read("cgroup.procs").split()
            if not members:
                return
            for member in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(member), signal.SIGKILL)
            time.sleep(0.05)

    def _set_limit(self) -> None:
        """Set the limit, with no swap beyond it."""
        if self._version == 1:
            self._write("memory.limit_in_bytes", self.limit_bytes)
            # Absent where the kernel counts no swap; there, at least ask it to prefer page cache.
            with contextlib.suppress(OSError):
                self._write("memory.swappiness", 0)
            with contextlib.suppress(OSError):
                self._write("memory.memsw.limit_in_bytes", self.limit_bytes)
        else:
            self._write("memory.max", self.limit_bytes)
            with contextlib.suppress(OSError):
                self._write("memory.swap.max", 0)

    def _remove(self) -> None:
        """Kill the members and remove the directory; a group left behind would keep its page cache charged."""
        if self._directory is None:
            return
        for _ in range(100):  # the kernel lets go of the last members a moment after their end
            self.kill()  # again each time, since a process just started may join only now
            if self._version == 1:
                with contextlib.suppress(OSError):
                    self._write("memory.force_empty", 0)
            try:
                self._directory.rmdir()
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.05)
            else:
                break
        self._directory = None

    def _read(self, file_name: str) -> str:
        return (self.directory / file_name).read_text()

    def _write(self, file_name: str, value: int) -> None:
        # "r+" never creates: a control file that the kernel lacks is to be an error.
        with open(self.directory / file_name, "r+") as file:
            file.write(str(value))

    def _pairs(self, file_name: str) -> Iterator[tuple[str, int]]:
        """Yield the `name number` lines of a control file."""
        for line in self._read(file_name).splitlines():
            name, _, value = line.partition(" ")
            yield name, int(value)


def why_unavailable() -> str | None:
    """None if memory control groups can be made here, else the reason: for tests to skip with."""
    try:
        with MemoryCgroup(64 << 20):
            return None
    except MemoryCgroupError as error:
        return str(error)


def _delegate_memory(directory: Path) -> None:
    """Let the children of a version 2 group have memory limits; OSError where this is not allowed."""
    control = directory / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        control.write_text("+memory")


def _possible_parents() -> Iterator[_Parent]:
    """Directories to try, the nearest to this process's own group first.

    Version 1 lets a group with processes have child groups. Version 2 does not (but for its root), so there the
    ancestors are tried as well.
    """
    own = _own_groups()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, mount_point = before.split()[3:5]
        kind, _, super_options = after.split(maxsplit=2)
        mount = Path(mount_point)
        if kind == "cgroup" and "memory" in super_options.split(","):
            group = _visible_group(mount, root, own.get("memory", "/"))
            yield _Parent(group, 1)
            if group != mount:
                yield _Parent(mount, 1)
        elif kind == "cgroup2" and "memory" in _words(mount / "cgroup.controllers"):
            group = _visible_group(mount, root, own.get("", "/"))
            for directory in (group, *group.parents):
                yield _Parent(directory, 2)
                if directory == mount:
                    break


def _own_groups() -> dict[str, str]:
    """Find the own group of each version 1 controller; that of version 2 has an empty name."""
    groups: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = path
    return groups


def _visible_group(mount: Path, root: str, path: str) -> Path:
    """Return the directory of a group; the mount itself if the group lies outside what this container sees."""
    relative = os.path.relpath(path, root)
    directory = mount / relative
    return directory if not relative.startswith("..") and directory.is_dir() else mount


def _words(path: Path) -> list[str]:
    """Return the words of a file that may not exist."""
    try:
        return path.read_text().split()
    except OSError:
        return []
