"""A backend that predicts zeros, for tests of schedules and buffers without an engine."""

from __future__ import annotations

from collections.abc import Mapping

from unetc.backend import Array, Loader, Program, SerialisedGraph
from unetc.device import HOST, Device

from .registry import InPrecision, Memory


class NullBackend(InPrecision):
    """Load anything, compute nothing."""

    device: Device = HOST

    def open_weights(self, weights: bytes) -> Loader:
        """Ignore the weights."""
        return self

    def load(self, graph: SerialisedGraph) -> Program:
        """Ignore the graph."""
        return _predict_zeros


def _predict_zeros(inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
    output.fill(0.0)
    return {}


def open_backend(target: str, *, threads: int, memory: Memory) -> NullBackend:
    """Open the backend; it ignores its arguments."""
    return NullBackend()
