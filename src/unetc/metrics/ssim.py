"""Structural similarity of two batches of samples, per sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from unetc.backend import Array
from unetc.errors import ShapeMismatch

from .distances import VALUE_RANGE, require_equal

RADIUS = 5
"""Pixels of the window on each side of its centre; images must be at least as large as the window."""
SIGMA = 1.5
"""Standard deviation of the Gaussian window, in pixels."""
C1, C2 = (0.01 * VALUE_RANGE) ** 2, (0.03 * VALUE_RANGE) ** 2
"""Constants of the definition, for dark and for flat windows."""


def ssim(reference: Array, candidate: Array) -> NDArray[np.float64]:
    """Measure the structural similarity.

    Args:
        reference: Samples of the full model, [batch, channel, height, width].
        candidate: Samples to compare, same shape.

    Returns:
        [batch], dimensionless, at most 1; 1 means identical.

    Raises:
        ShapeMismatch: If the shapes differ, or the images are smaller than the window.

    Source:
        Wang et al. 2004, eq. (13), with a Gaussian window of 11 pixels.
    """
    require_equal(reference, candidate)
    least = 2 * RADIUS + 1
    if min(reference.shape[2:]) < least:
        raise ShapeMismatch(
            f"cannot compare samples of shape {reference.shape} by SSIM. Expected at least {least}x{least} pixels."
        )
    x, y = reference.astype(np.float64), candidate.astype(np.float64)
    mean_x, mean_y = _average(x), _average(y)
    variances = np.maximum(_average(x**2) - mean_x**2, 0) + np.maximum(_average(y**2) - mean_y**2, 0)
    covariance = _average(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    similarities = luminance * (2 * covariance + C2) / (variances + C2)
    result: NDArray[np.float64] = similarities.mean(axis=(1, 2, 3))
    return result


def _average(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average over the window around every pixel; images go on as their reflection."""
    averages: NDArray[np.float64] = gaussian_filter(values, SIGMA, radius=RADIUS, axes=(2, 3), mode="mirror")
    return averages
