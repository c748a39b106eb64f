"""A backend that predicts zeros: tests schedules and buffers without an engine."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from unetc.backend import Array, Program

from ..backend import Memory


class NullBackend:
    """Load anything, compute nothing."""

    def load(self, graph: bytes, weights: Mapping[str, NDArray[np.generic]]) -> Program:
        """Ignore the graph."""
        return _predict_zeros


def _predict_zeros(inputs: Mapping[str, Array], output: Array) -> None:
    output.fill(0.0)


def open_backend(*, threads: int, memory: Memory) -> NullBackend:
    """Open the backend; it has no threads and no memory."""
    return NullBackend()
