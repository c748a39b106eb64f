"""Processes of replicas, for benchmarks and tests that kill one."""

from __future__ import annotations

import contextlib
from pathlib import Path


def replicas_of(parent: int) -> list[int]:
    """List the processes of replicas in the Ray that a process has started."""
    below: dict[int, list[int]] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            pid = int(folder.name)
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            below.setdefault(above, []).append(pid)
            titles[pid] = (folder / "cmdline").read_text()
    family, found = [parent], []
    for pid in family:  # it grows
        family += below.get(pid, [])
        if titles.get(pid, "").startswith("ray::ServeReplica"):
            found.append(pid)
    return found
