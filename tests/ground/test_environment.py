"""Facts about the machine are read correctly from files in Linux's formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from unetc.environment import free_memory

MIB = 2**20


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, proc__meminfo=f"MemTotal: 99 kB\nMemAvailable:   {800 * 1024} kB\n")
    return tmp_path


def test_this_machine_reports_free_memory() -> None:
    free = free_memory()
    assert free is not None
    assert free > MIB


def test_without_a_limit_only_the_machine_limits_free_memory(root: Path) -> None:
    assert free_memory(root) == 800 * MIB
    write(root, sys__fs__cgroup__memory_dot_max="max\n", sys__fs__cgroup__memory_dot_current="5\n")
    write(root, sys__fs__cgroup__memory_dot_stat="inactive_file 1\n")
    assert free_memory(root) == 800 * MIB
    assert free_memory(root / "nowhere") is None


def test_a_container_has_the_memory_left_below_its_limit(root: Path) -> None:
    write(root, sys__fs__cgroup__memory_dot_max=f"{500 * MIB}\n", sys__fs__cgroup__memory_dot_current=f"{300 * MIB}\n")
    write(root, sys__fs__cgroup__memory_dot_stat=f"anon 1\ninactive_file {50 * MIB}\n")
    assert free_memory(root) == 250 * MIB


def test_version_1_control_groups_work_the_same(root: Path) -> None:
    group = root / "sys/fs/cgroup/memory"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{500 * MIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{600 * MIB}\n")
    (group / "memory.stat").write_text("cache 1\n")
    assert free_memory(root) == 0
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # the kernel's value for no limit
    assert free_memory(root) == 800 * MIB
