"""A lock between processes, and between threads, which the system releases when its holder dies."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .progress import OnProgress, Progress

logger = logging.getLogger(__name__)

_EVERY_S = 0.2
"""Interval between two calls of `on_wait`."""


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file, after waiting for other holders; where files cannot be locked, continue without.

    Args:
        path: The file, which is not deleted.
        on_wait: Called repeatedly while another process or thread holds the lock. If it raises, the wait is over.
    """
    lock = FileLock(path)
    with contextlib.ExitStack() as held:
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock.acquire(timeout=_EVERY_S))
            except Timeout:
                on_wait()
                continue
            except (OSError, NotImplementedError) as error:
                logger.info("continuing without a lock, because %s cannot be locked: %s", path, error)
            break
        yield


@contextlib.contextmanager
def locked_with_note(path: Path, what: str, on_progress: OnProgress) -> Iterator[None]:
    """Hold the lock of a file, as `locked` does; who has to wait is told why, once.

    Args:
        path: The file.
        what: What the other process does, in words that follow "another process".
        on_progress: Told of the wait.
    """
    told = False

    def tell() -> None:
        nonlocal told
        if not told:
            note = f"another process {what}; waiting for its results"
            on_progress(Progress(stage="waiting", done=0, total=1, note=note))
        told = True

    with locked(path, tell):
        yield
