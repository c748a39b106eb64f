"""Metrics of the server."""

from __future__ import annotations

from .service import Running, Served


class Metrics:
    """Counts requests and engine calls."""

    def observe(self, served: Served) -> None:
        """Count the engine calls of a model from now on."""

    def accepted(self, running: Running) -> None:
        """Count a request, now and when it is finished."""
