"""The contract between engines and whoever runs them; implemented in `unetc.runtime.backends`.

The analyzer is handed a backend too, so costs and damages are measured by the code that ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Program(Protocol):
    """One loaded graph."""

    def __call__(self, inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
        """Run the graph and write its first output into `output`, which has the right shape.

        Args:
            inputs: C-contiguous arrays, or tensors that programs of this backend have emitted. What the graph does not
                read is ignored.
            output: Where to write.

        Returns:
            The graph's further outputs by name, as tensors on the device.
        """
        ...


class Backend(Protocol):
    """Loads graphs on one device."""

    def load(self, graph: bytes, weights: Mapping[str, NDArray[np.generic]]) -> Program:
        """Load an ONNX graph; `weights` holds exactly its external initializers, by name."""
        ...

    def to_array(self, emitted: object) -> Array:
        """Copy what a program has emitted into an array."""
        ...
