"""Count the changes that a process makes to files, and kill it before one of them."""

from __future__ import annotations

import mmap
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_CHANGES = {
    "os.chmod": 0,
    "os.link": 1,
    "os.mkdir": 0,
    "os.remove": 0,
    "os.rename": 1,
    "os.rmdir": 0,
    "os.symlink": 1,
}
"""Events of Python, with the place of the path in their arguments."""
_SIZE = 8


def count_changes(folder: str, counter: Path, *, last: int | None = None) -> None:
    """Count the changes that this process makes in a folder, from here on.

    Args:
        folder: The folder; relative paths count too, as whole folders are deleted by them.
        counter: File that holds the number of changes at any time; `changes_in` reads it.
        last: Number of changes after which the next one kills the process.
    """
    counter.write_bytes(bytes(_SIZE))
    with counter.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), _SIZE)
    made = 0

    def change(event: str, arguments: Sequence[object]) -> None:
        nonlocal made
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        elif changes := event in _CHANGES:
            path = arguments[_CHANGES[event]]
        if not changes or not isinstance(path, str | os.PathLike):
            return
        if os.path.isabs(path) and not os.fspath(path).startswith(folder):
            return
        if made == last:
            os.kill(os.getpid(), signal.SIGKILL)
        made += 1
        memory[:] = made.to_bytes(_SIZE, "little")

    sys.addaudithook(change)


def changes_in(counter: Path) -> int:
    """Read the number of changes so far."""
    return int.from_bytes(counter.read_bytes(), "little")
