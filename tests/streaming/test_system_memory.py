"""What the operating system says about memory, from made-up trees of both cgroup versions and from this process."""

from __future__ import annotations

import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.streaming import system_memory
from headrace.streaming.system_memory import (
    GroupMemory,
    cgroup_memory,
    default_budget_bytes,
    free_bytes,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
    total_bytes,
)

MIB = 1 << 20
GIB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712  # what the kernel writes: the largest multiple of a page in 63 bits


class Tree:
    """A made-up /proc/self/cgroup and /sys/fs/cgroup."""

    def __init__(self, path: Path) -> None:
        self.proc, self.root = path / "cgroup", path / "fs"
        self.root.mkdir()

    def v2(self, group: str, *, limit: int | str, used: int, cache: int = 0, mount: str = "") -> None:
        folder = self.root / mount / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\nactive_file 5\ninactive_file {cache}\nslab 3\n")

    def v1(self, group: str, *, limit: int, used: int, cache: int = 0) -> None:
        folder = self.root / "memory" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {cache}\n")

    def free(self, *lines: str) -> int | None:
        self.proc.write_text("".join(f"{line}\n" for line in lines))
        return min((group.free_bytes for group in cgroup_memory(self.proc, self.root)), default=None)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


# -- cgroup v2 ---------------------------------------------------------------------------------------------------------


def test_v2_limit_less_use(tree: Tree) -> None:
    tree.v2("app", limit=GIB, used=300 * MIB)
    assert tree.free("0::/app") == GIB - 300 * MIB


def test_v2_cache_that_can_be_dropped_counts_as_free(tree: Tree) -> None:
    tree.v2("app", limit=GIB, used=300 * MIB, cache=100 * MIB)
    assert tree.free("0::/app") == GIB - 200 * MIB


def test_v2_without_a_limit(tree: Tree) -> None:
    tree.v2("app", limit="max", used=300 * MIB)
    assert tree.free("0::/app") is None


@pytest.mark.parametrize(("outer", "inner"), [(GIB, 2 * GIB), (2 * GIB, GIB), (GIB, "max"), ("max", GIB)])
def test_v2_the_tightest_of_nested_limits_counts(tree: Tree, outer: int | str, inner: int | str) -> None:
    tree.v2("user.slice", limit=outer, used=100 * MIB)
    tree.v2("user.slice/session", limit="max", used=50 * MIB)
    tree.v2("user.slice/session/app", limit=inner, used=100 * MIB)
    assert tree.free("0::/user.slice/session/app") == GIB - 100 * MIB


def test_v2_what_siblings_use_counts_in_the_common_parent(tree: Tree) -> None:
    tree.v2("pod", limit=2 * GIB, used=2 * GIB - 10 * MIB)
    tree.v2("pod/app", limit=GIB, used=100 * MIB)
    assert tree.free("0::/pod/app") == 10 * MIB


def test_v2_inside_a_container_the_root_is_the_own_group(tree: Tree) -> None:
    tree.v2("", limit=GIB, used=100 * MIB)
    assert tree.free("0::/") == GIB - 100 * MIB
    assert tree.free("0::/not/visible/from/here") == GIB - 100 * MIB
    assert tree.free("0::/../elsewhere") == GIB - 100 * MIB


def test_v2_beside_v1(tree: Tree) -> None:
    tree.v2("app", limit=GIB, used=100 * MIB, mount="unified")
    assert tree.free("1:name=systemd:/app", "0::/app") == GIB - 100 * MIB


def test_a_group_that_uses_more_than_its_limit_has_nothing_left(tree: Tree) -> None:
    tree.v2("app", limit=100 * MIB, used=200 * MIB)
    assert tree.free("0::/app") == 0


# -- cgroup v1 ---------------------------------------------------------------------------------------------------------


def test_v1_limit_less_use(tree: Tree) -> None:
    tree.v1("app", limit=GIB, used=300 * MIB, cache=100 * MIB)
    assert tree.free("4:memory:/app", "3:cpuset:/elsewhere", "0::/") == GIB - 200 * MIB


def test_v1_without_a_limit(tree: Tree) -> None:
    tree.v1("app", limit=NO_LIMIT_V1, used=300 * MIB)
    assert tree.free("4:memory:/app") is None


def test_v1_the_tightest_of_nested_limits_counts(tree: Tree) -> None:
    tree.v1("", limit=NO_LIMIT_V1, used=9 * GIB)
    tree.v1("docker", limit=GIB, used=200 * MIB)
    tree.v1("docker/app", limit=3 * GIB, used=100 * MIB)
    assert tree.free("4:memory:/docker/app") == GIB - 200 * MIB


def test_v1_inside_a_container_the_root_is_the_own_group(tree: Tree) -> None:
    tree.v1("", limit=GIB, used=100 * MIB)
    assert tree.free("4:memory:/docker/0123456789") == GIB - 100 * MIB


def test_v1_of_other_controllers_is_no_limit(tree: Tree) -> None:
    tree.v1("app", limit=GIB, used=100 * MIB)
    assert tree.free("4:cpu,cpuacct:/app", "5:memory_not:/app") is None


def test_v1_mounted_together_with_others(tree: Tree) -> None:
    tree.v1("app", limit=GIB, used=100 * MIB)
    assert tree.free("4:hugetlb,memory:/app") == GIB - 100 * MIB


# -- trees that are not there ------------------------------------------------------------------------------------------


def test_no_cgroups_no_limit(tree: Tree, tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path / "missing", tree.root) == []
    assert tree.free() is None
    assert tree.free("0::/app") is None
    assert tree.free("4:memory:/app", "0::/app") is None


def test_files_without_sense_are_no_limit(tree: Tree) -> None:
    tree.v2("app", limit="much", used=0)
    assert tree.free("0::/app") is None
    tree.v2("app", limit=GIB, used=100 * MIB)
    (tree.root / "app" / "memory.stat").write_text("nothing known\n")
    assert tree.free("0::/app") == GIB - 100 * MIB


@given(limits=st.lists(st.integers(0, 1 << 59) | st.just("max"), min_size=1, max_size=5), used=st.integers(0, 1 << 40))
def test_nested_groups_allow_what_the_tightest_does(
    tmp_path_factory: pytest.TempPathFactory, limits: list[int | str], used: int
) -> None:
    tree = Tree(tmp_path_factory.mktemp("tree"))
    for depth, limit in enumerate(limits):
        tree.v2("/".join(["g"] * (depth + 1)), limit=limit, used=used)
    numbers = [limit for limit in limits if isinstance(limit, int)]
    expected = max(0, min(numbers) - used) if numbers else None
    assert tree.free("0::/" + "/".join(["g"] * len(limits))) == expected


# -- this process ------------------------------------------------------------------------------------------------------


def test_the_status_file_is_read_in_kilobytes(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmPeak:\t   99 kB\nVmHWM:\t     200 kB\nVmRSS:\t     100 kB\n")
    assert resident_bytes(status) == 100 * 1024
    assert peak_resident_bytes(status) == 200 * 1024
    status.write_text("Name:\tVmRSS: 5 kB\n")
    with pytest.raises(OSError, match="has no VmRSS"):
        resident_bytes(status)


@pytest.mark.alone
def test_the_peak_moves_with_what_is_taken() -> None:
    size_bytes = 100 * MIB
    restarted = reset_peak()
    before, peak_before = resident_bytes(), peak_resident_bytes()
    assert peak_before >= before - MIB
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        assert resident_bytes() < before + size_bytes // 2, "memory that was never touched is not held"
        for page in range(0, size_bytes, mmap.PAGESIZE):
            memory[page] = 1
        assert resident_bytes() >= before + 0.95 * size_bytes
    assert resident_bytes() < before + size_bytes // 2
    assert peak_resident_bytes() >= before + 0.95 * size_bytes
    if restarted:
        assert reset_peak()
        assert peak_resident_bytes() < before + size_bytes // 2


# -- the budget that nobody named --------------------------------------------------------------------------------------


def test_free_memory_is_the_tighter_of_machine_and_group(monkeypatch: pytest.MonkeyPatch) -> None:
    available = free_bytes()
    assert available > 0
    groups = [GroupMemory(9 * MIB, 8 * MIB), GroupMemory(10 * MIB, 5 * MIB)]
    monkeypatch.setattr(system_memory, "cgroup_memory", lambda: groups)
    assert (free_bytes(), total_bytes()) == (5 * MIB, 9 * MIB)
    for none_that_counts in ([GroupMemory(1 << 60, 1 << 60)], []):
        monkeypatch.setattr(system_memory, "cgroup_memory", lambda groups=none_that_counts: groups)
        assert GIB // 64 < free_bytes() <= total_bytes() < 1 << 50


@pytest.mark.parametrize(
    ("free", "budget"),
    [(20 * GIB, 19 * GIB), (GIB, 864 * MIB), (160 * MIB, 0), (0, 0)],
)
def test_a_twentieth_is_kept_free_and_160_mib_at_least(monkeypatch: pytest.MonkeyPatch, free: int, budget: int) -> None:
    monkeypatch.setattr(system_memory, "free_bytes", lambda: free)
    assert default_budget_bytes() == budget


# -- the C allocator ---------------------------------------------------------------------------------------------------

FREED_WITH_A_HOLE = """
import sys
from headrace.streaming.system_memory import keep_heap_small, resident_bytes, return_free_memory
if "keep" in sys.argv:
    keep_heap_small()
first = b"x" * (30 << 20)
del first  # from now on glibc keeps what is smaller than this in its heap
held = []
large = []
for _ in range(10):
    large.append(b"x" * (6 << 20))
    held.append(b"x" * (100 << 10))
before = resident_bytes()
del large
if "trim" in sys.argv:
    return_free_memory()
print((before - resident_bytes()) >> 20)
"""


@pytest.mark.parametrize("way", ["keep", "trim"])
def test_freed_memory_goes_back_to_the_system(way: str) -> None:
    if "glibc" not in platform.libc_ver():
        pytest.skip("the allocator of another C library than glibc has no such settings")
    told = subprocess.run(
        [sys.executable, "-c", FREED_WITH_A_HOLE, way], check=True, capture_output=True, text=True, timeout=60
    )
    assert int(told.stdout) >= 50, "sixty mebibytes were freed between blocks that are still held"
