"""A lock between processes, and between threads, that the system lets go when its holder dies."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

_EVERY_S = 0.2
"""How often one who waits says so."""


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock that a file is, once nobody else does; where files cannot be locked, go on without.

    Args:
        path: The file, which stays there.
        on_wait: Called now and then while somebody else holds the lock. If it raises, the wait is over.
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
                logger.info("going on without a lock, as %s cannot be one: %s", path, error)
            break
        yield
