"""Take memory, room on the disk or rights away from the process that calls."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

_MAKE = {"os.link": 1, "os.mkdir": 0, "os.symlink": 1}
"""Events of Python that make something on a disk, with the place of the path in their arguments."""
_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE = 24, 1


class Limits(TypedDict, total=False):
    """Arguments of `limit`."""

    memory: int
    file: int
    deadly: bool
    full: str
    after: int


def limit(
    *, memory: int | None = None, file: int | None = None, deadly: bool = False, full: str = "", after: int = 0
) -> None:
    """Apply limits, from here on.

    Args:
        memory: Bytes that the process may take in addition to those that it has.
        file: Most bytes of a file.
        deadly: Whether the process dies while it writes a longer one, in place of an error.
        full: Folder on a disk that is full: nothing can be made there, nor opened to write.
        after: Number of things that can still be made in this folder.
    """
    if memory is not None:
        most = held() + memory
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    if file is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))
        if deadly:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, so that writing fails
    if full:
        _fill(full, after)


def held(process: int | str = "self") -> int:
    """Count the bytes of a process that the limit of memory counts."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData:")) * 1024


def obey_rights() -> None:
    """Let the rights of folders hold for root's programs too, once they are started by this process."""
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot give up the right to write everywhere")


def _fill(folder: str, left: int) -> None:
    def refuse(event: str, arguments: Sequence[object]) -> None:
        nonlocal left
        if event == "open":
            path, _, flags = arguments
            makes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        elif makes := event in _MAKE:
            path = arguments[_MAKE[event]]
        if not makes or not isinstance(path, str | os.PathLike) or not os.path.abspath(path).startswith(folder):
            return
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))

    sys.addaudithook(refuse)
