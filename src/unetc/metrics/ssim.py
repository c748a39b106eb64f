"""Structural similarity of two batches of samples, per sample."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from unetc.backend import Array

from .distances import VALUE_RANGE, require_equal

RADIUS = 5
"""Most pixels of the window on each side of its centre."""
SIGMA = 1.5
"""Standard deviation of the Gaussian window, in pixels."""
C1, C2 = (0.01 * VALUE_RANGE) ** 2, (0.03 * VALUE_RANGE) ** 2
"""Constants of the definition, for dark and for flat windows."""


def ssim(reference: Array, candidate: Array) -> NDArray[np.float64]:
    """Measure the structural similarity.

    Images below 11x11 have the largest window of an odd size that fits. Such a similarity cannot be compared with one
    of larger images. The limit is a window of one pixel, for a side of 1 or 2 pixels: it sees no structure, and
    compares luminance alone.

    Args:
        reference: Samples of the full model, [batch, channel, height, width].
        candidate: Samples to compare, same shape.

    Returns:
        [batch], dimensionless, at most 1; 1 means identical.

    Raises:
        ShapeMismatch: If the shapes differ.

    Source:
        Wang et al. 2004, eq. (13), with a Gaussian window of 11 pixels.
    """
    require_equal(reference, candidate)
    average = partial(_average, radius=min(RADIUS, (min(reference.shape[2:]) - 1) // 2))
    x, y = reference.astype(np.float64), candidate.astype(np.float64)
    mean_x, mean_y = average(x), average(y)
    variances = np.maximum(average(x**2) - mean_x**2, 0) + np.maximum(average(y**2) - mean_y**2, 0)
    covariance = average(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    similarities = luminance * (2 * covariance + C2) / (variances + C2)
    result: NDArray[np.float64] = similarities.mean(axis=(1, 2, 3))
    return result


def _average(values: NDArray[np.float64], *, radius: int) -> NDArray[np.float64]:
    """Average over the window around every pixel; images go on as their reflection."""
    averages: NDArray[np.float64] = gaussian_filter(values, SIGMA, radius=radius, axes=(2, 3), mode="mirror")
    return averages
