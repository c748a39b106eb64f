"""Structural similarity of two batches of samples, per sample; it needs torch, which the distances do not."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import structural_similarity_index_measure

from unetc.backend import Array
from unetc.errors import ShapeMismatch

from .distances import VALUE_RANGE, require_equal

WINDOW = 11
"""Height and width of the SSIM window, in pixels; images must be at least this large."""


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
        Wang et al. 2004, eq. (13), as computed by torchmetrics with a Gaussian window of 11 pixels.
    """
    require_equal(reference, candidate)
    if min(reference.shape[2:]) < WINDOW:
        raise ShapeMismatch(
            f"cannot compare samples of shape {reference.shape} by SSIM. Expected at least {WINDOW}x{WINDOW} pixels."
        )
    values = structural_similarity_index_measure(
        torch.from_numpy(np.ascontiguousarray(candidate)),
        torch.from_numpy(np.ascontiguousarray(reference)),
        reduction="none",
        data_range=VALUE_RANGE,
    )
    assert isinstance(values, torch.Tensor)
    return values.double().reshape(len(reference)).numpy()
