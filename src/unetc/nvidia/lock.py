"""A lock between processes, and between threads, that the system lets go when its holder dies."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_EVERY_S = 0.2
"""How often one who waits tries again."""


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock that a file is, once nobody else does; the file is there only as long.

    Where files cannot be locked, it goes on without.

    Args:
        path: The file.
        on_wait: Called now and then while somebody else holds the lock. If it raises, the wait is over.
    """
    handle = _acquire(path, on_wait)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                path.unlink()  # before the lock is let go, so it is never another's file
            os.close(handle)


def _acquire(path: Path, on_wait: Callable[[], None]) -> int | None:
    """Open and lock a file; None where that cannot be done."""
    if fcntl is None:
        return None
    while True:
        try:
            handle = _try(path)
        except OSError as error:
            logger.info("going on without a lock, as %s cannot be one: %s", path, error.strerror)
            return None
        if handle is not None:
            return handle
        on_wait()
        time.sleep(_EVERY_S)


def _try(path: Path) -> int | None:
    """Open and lock a file; None if somebody holds it, or has let go of it, and so deleted it, just now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # no process that is started inherits it
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(handle), os.stat(path)):
                return None
        except (BlockingIOError, FileNotFoundError):
            return None
        undo.pop_all()
    return handle
