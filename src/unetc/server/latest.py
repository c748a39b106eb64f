"""Results that several clients share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """Makes one result at a time: clients that ask meanwhile, or shortly afterwards, get the same one."""

    def __init__(self, make: Callable[[], Awaitable[T]], seconds: float) -> None:
        """Begin without a result.

        Args:
            make: Makes a result.
            seconds: Time for which it is given out.
        """
        self._make = make
        self._seconds = seconds
        self._task: asyncio.Task[T] | None = None
        self._made = 0.0

    async def get(self) -> T:
        """Return the latest result, or make one."""
        now = asyncio.get_running_loop().time()
        if self._task is None or (self._task.done() and now - self._made >= self._seconds):
            self._task = asyncio.create_task(self._run())
        return await asyncio.shield(self._task)

    async def _run(self) -> T:
        try:
            return await self._make()
        finally:
            self._made = asyncio.get_running_loop().time()
