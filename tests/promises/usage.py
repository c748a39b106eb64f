"""Memory, files, threads and shared memory of a process."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Self

import msgspec

_SHARED = "/dev/shm", "/SYSV"
"""Beginnings of the names of shared memory in the maps of a process."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Usage at one moment."""

    resident: int
    """Kilobytes of resident memory."""
    files: int
    """Open file descriptors."""
    threads: int
    shared: int
    """Mappings of shared memory."""

    @classmethod
    def of(cls, process: int | str = "self") -> Self:
        """Look at a process."""
        folder = Path(f"/proc/{process}")
        if process == "self":
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # the allocator keeps some of the memory that was freed
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        maps = (folder / "maps").read_text().splitlines()
        return cls(
            resident=int(status["VmRSS"].split()[0]),
            files=len(list((folder / "fd").iterdir())),
            threads=int(status["Threads"]),
            shared=sum(line.split(maxsplit=5)[5].startswith(_SHARED) for line in maps if line.count("/")),
        )

    def left_since(self, before: Usage) -> tuple[str, ...]:
        """Name the things of which there are more than before; memory is not one of them."""
        return tuple(
            f"{name}: {getattr(self, name)}, {getattr(before, name)} before"
            for name in ("files", "threads", "shared")
            if getattr(self, name) > getattr(before, name)
        )


def growth(resident: Sequence[int]) -> float:
    """Compute by how many per cent memory grew, from the second tenth of the values to the last tenth.

    The first tenth is the warm-up.
    """
    tenth = len(resident) // 10
    before, after = fmean(resident[tenth : 2 * tenth]), fmean(resident[-tenth:])
    return 100 * (after / before - 1)
