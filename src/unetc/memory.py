"""Lack of memory, which every library reports in another way."""

from __future__ import annotations

import errno
import mmap

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
)
"""Parts of the messages of libraries, in lower case.

A thread that cannot start has no room for its stack, and a segment that cannot be mapped none for a library.
"""
_ROOM_BYTES = 2**24
"""A process that cannot take as much is short of memory."""


def lacks_memory(error: BaseException) -> bool:
    """Find out whether an error, or one that it follows from, is a lack of memory."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, MemoryError) or (isinstance(reason, OSError) and reason.errno == errno.ENOMEM):
            return True
        if any(sign in str(reason).lower() for sign in SIGNS):
            return True
        reason = reason.__cause__ or reason.__context__
    return not isinstance(error, UnetcError) and _is_short()


def _is_short() -> bool:
    """Find out whether the process can take no more memory.

    Without room for a MemoryError, CPython raises whatever comes: a SystemError, or a ValueError from its compiler.
    """
    try:
        mmap.mmap(-1, _ROOM_BYTES, flags=mmap.MAP_PRIVATE).close()
    except OSError:
        return True
    return False


class taking_memory:  # noqa: N801 (used as a function; a generator would cost engine threads twice the time)
    """Turn a lack of memory in the enclosed code into an error of unetc.

    Raises:
        OutOfMemory: In place of an error that follows from it; one of unetc that speaks of memory stays.
    """

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Raise the error of unetc, if one is due."""
        if not isinstance(error, Exception) or not lacks_memory(error):
            return
        if not (isinstance(error, UnetcError) and "memory" in str(error).lower()):
            raise out_of_memory(error) from error


def out_of_memory(error: Exception) -> OutOfMemory:
    """Describe a lack of memory."""
    return OutOfMemory(
        f"the memory is used up ({brief(error)}). Take fewer or smaller samples, or a machine with more memory."
    )
