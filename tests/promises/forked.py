"""A process that has imported everything, and forks one for each command, so that a command takes little time.

It reads a JSON line for each command from stdin, and writes the number of its process and its exit code to stdout. In
between it reads an empty line, so that no other process gets the number before somebody holds this one.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
from pathlib import Path

import msgspec

from tests.promises.changes import count_changes
from tests.promises.clock import set_clock
from tests.promises.forking import HEAVY, become
from unetc.cli import main

IMPORTED = (*HEAVY, "unetc.server.app", "unetc.server.process")
"""Modules that commands import, or that import most of them."""
READY = "ready"


class Asked(msgspec.Struct, kw_only=True):
    """A command of unetc, and the process that it runs in."""

    arguments: tuple[str, ...]
    folder: str
    """Folder that it runs in, with tmp/ for temporary files."""
    out: str
    err: str
    """Named pipes for its output."""
    clock: str
    """File of the readings of its clock."""
    changes: str
    """File that counts the changes that it makes in the folder."""
    last: int | None
    """Number of changes after which the next one kills it."""
    longest: int | None
    """Bytes of the longest file; it dies while it writes a longer one."""


def serve() -> tuple[str, ...]:
    """Fork for each line, and wait for the end of each process.

    Returns:
        The arguments of the command, in its process alone.
    """
    for line in sys.stdin:
        asked = msgspec.json.decode(line, type=Asked)
        if not (child := os.fork()):
            return _become(asked)
        print(child, flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)


def _become(asked: Asked) -> tuple[str, ...]:
    """Turn a forked process into the process of a command."""
    become(asked.folder, {"TMPDIR": os.path.join(asked.folder, "tmp")}, asked.out, asked.err)
    set_clock(Path(asked.clock))
    count_changes(asked.folder, Path(asked.changes), last=asked.last)
    if asked.longest is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked.longest, asked.longest))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, so that writing fails
    return asked.arguments


if __name__ == "__main__":
    for module in IMPORTED:
        importlib.import_module(module)
    print(READY, flush=True)
    sys.argv = ["unetc", *serve()]
    main()
