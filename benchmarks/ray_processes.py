"""Processes of a Ray that another process has started, for benchmarks and tests that kill one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

WORKER, RUNNING = "ray::_Worker", "ray::_Worker.run"
"""Titles that Ray gives to the workers of an analysis, and while they run a job."""
REPLICA = "ray::ServeReplica"
"""Title of a replica of Ray Serve."""


def processes(title: str, *, of: int | None = None) -> list[int]:
    """List processes in the Ray that a process has started.

    Args:
        title: Beginning of their titles.
        of: The process that started Ray; this one when not given.
    """
    starter = os.getpid() if of is None else of
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(title.encode()) and starter in _ancestors(folder):
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended
    return found


def _ancestors(folder: Path) -> Iterator[int]:
    while (parent := int((folder / "stat").read_text().rpartition(")")[2].split()[1])) > 1:
        yield parent
        folder = folder.parent / str(parent)
