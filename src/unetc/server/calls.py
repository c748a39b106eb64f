"""Single calls of the denoiser: accepted, counted and given up as requests for images are."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

from unetc.device import Array
from unetc.errors import QueueFull, UnetcError

from .served import Served

_MOST_CALLS = 8
"""Most calls of one model that are not finished: each delays all sampling, as it runs between two calls of it."""


class Calls:
    """Calls that are accepted and not finished. For the thread of the event loop."""

    def __init__(self) -> None:
        """Begin without calls."""
        self._ahead: Counter[str] = Counter()
        self._unfinished: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        """Count the unfinished calls."""
        return len(self._unfinished)

    async def run(self, served: Served, inputs: Mapping[str, Array]) -> Array:
        """Call the full model once.

        Returns:
            The prediction, [row, channel, height, width].

        Raises:
            QueueFull: If too many calls of the model are unfinished.
            UnetcError: If the call fails or is given up.
        """
        if (ahead := self._ahead[served.name]) >= _MOST_CALLS:
            raise QueueFull(
                f"{ahead} calls of the denoiser of {served.name} are unfinished. Expected fewer than {_MOST_CALLS}. "
                "Try again later.",
                1.0,
            )
        given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        work = asyncio.wrap_future(served.batcher.call(inputs))
        self._ahead[served.name] += 1
        self._unfinished.add(given_up)
        try:
            waited: set[asyncio.Future[Any]] = {work, given_up}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                given_up.result()
            return await work
        finally:
            work.cancel()
            given_up.cancel()
            self._unfinished.discard(given_up)
            self._ahead[served.name] -= 1

    def give_up(self, error: UnetcError) -> int:
        """Fail all unfinished calls with an error, and count them."""
        waiting = [one for one in self._unfinished if not one.done()]
        for one in waiting:
            one.set_exception(error)
        return len(waiting)
