"""A backend that predicts zeros: tests schedules and buffers without an engine."""

from __future__ import annotations

from collections.abc import Mapping

from unetc.backend import Array, Loader, Program, SerialisedGraph
from unetc.errors import SessionError

from ..backend import Memory


class NullBackend:
    """Load anything, compute nothing."""

    def open_weights(self, weights: bytes) -> Loader:
        """Ignore the weights."""
        return self

    def load(self, graph: SerialisedGraph) -> Program:
        """Ignore the graph."""
        return _predict_zeros

    def to_array(self, emitted: object) -> Array:
        """Never called: nothing is emitted.

        Raises:
            SessionError: Always.
        """
        raise SessionError("the null backend emits nothing. Use another target.")


def _predict_zeros(inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
    output.fill(0.0)
    return {}


def open_backend(*, threads: int, memory: Memory) -> NullBackend:
    """Open the backend; it has no threads and no memory."""
    return NullBackend()
