"""The one way to write numpy arrays as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save


def save_tensors(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Encode arrays as safetensors, whatever their layout in memory.

    safetensors 0.8.0 itself writes the memory of an array under its shape. A transposed array would be scrambled.
    """
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})
