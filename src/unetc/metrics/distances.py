"""Distances between two batches of samples, per sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unetc.backend import Array
from unetc.errors import ShapeMismatch

VALUE_RANGE = 2.0
"""Width of the interval [-1, 1] in which samples lie."""

PSNR_CAP_DB = 100.0
"""PSNR reported for equal images, because a mean over infinity would be useless."""


def relative_l2(reference: Array, candidate: Array) -> NDArray[np.float64]:
    """Measure the norm of the difference, divided by the norm of the reference.

    Args:
        reference: Samples of the full model, [batch, channel, height, width].
        candidate: Samples to compare, same shape.

    Returns:
        [batch], dimensionless, >= 0; zero means identical.

    Raises:
        ShapeMismatch: If the shapes differ.
    """
    difference = np.linalg.norm(_flat(candidate, reference), axis=1)
    norm = np.linalg.norm(_flat(reference), axis=1)
    result: NDArray[np.float64] = difference / np.maximum(norm, 1e-12)
    return result


def psnr(reference: Array, candidate: Array) -> NDArray[np.float64]:
    """Measure the peak signal-to-noise ratio over a value range of 2.

    Args:
        reference: Samples of the full model, [batch, channel, height, width].
        candidate: Samples to compare, same shape.

    Returns:
        [batch], in dB, capped at 100 dB.

    Raises:
        ShapeMismatch: If the shapes differ.
    """
    error = np.mean(_flat(candidate, reference) ** 2, axis=1)
    floor = VALUE_RANGE**2 / 10 ** (PSNR_CAP_DB / 10)
    result: NDArray[np.float64] = 10 * np.log10(VALUE_RANGE**2 / np.maximum(error, floor))
    return result


def require_equal(reference: Array, candidate: Array) -> None:
    """Refuse to compare samples of different shapes.

    Raises:
        ShapeMismatch: If the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ShapeMismatch(
            f"cannot compare samples of shape {candidate.shape} with {reference.shape}. Expected equal shapes."
        )


def _flat(samples: Array, minus: Array | None = None) -> NDArray[np.float64]:
    if minus is not None:
        require_equal(minus, samples)
    flat = samples.reshape(len(samples), -1).astype(np.float64)
    return flat if minus is None else flat - minus.reshape(len(minus), -1)
