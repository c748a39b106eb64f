"""Lack of memory, which every library reports in another way."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import OutOfMemory, UnetcError, brief

SIGNS = (
    "out of memory",
    "outofmemory",
    "bad_alloc",
    "bad allocation",
    "failed to allocate memory",
    "failed_allocation",
    "can't allocate memory",
    "cannot allocate memory",
    "can't start new thread",
    "failed to map segment",
    "error return without exception set",
    "without setting an exception",
)
"""Parts of the messages of libraries, in lower case.

A thread that cannot start has no room for its stack, and a segment that cannot be mapped none for a library. Where
CPython finds no room for a MemoryError, the last two messages are all that it says.
"""


def lacks_memory(error: BaseException) -> bool:
    """Find out whether an error, or one that it follows from, is a lack of memory."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, MemoryError) or (isinstance(reason, OSError) and reason.errno == errno.ENOMEM):
            return True
        if any(sign in str(reason).lower() for sign in SIGNS):
            return True
        reason = reason.__cause__ or reason.__context__
    return False


@contextmanager
def taking_memory() -> Iterator[None]:
    """Turn a lack of memory in the enclosed code into an error of unetc.

    Raises:
        OutOfMemory: In place of an error that follows from it; one of unetc that speaks of memory stays.
    """
    try:
        yield
    except Exception as error:
        if not lacks_memory(error) or (isinstance(error, UnetcError) and "memory" in str(error).lower()):
            raise
        raise out_of_memory(error) from error


def out_of_memory(error: Exception) -> OutOfMemory:
    """Describe a lack of memory."""
    return OutOfMemory(
        f"the memory is used up ({brief(error)}). Take fewer or smaller samples, or a machine with more memory."
    )
