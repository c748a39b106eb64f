"""Damage: the change of the final output, with confidence intervals over samples."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import stats

from unetc.artifacts.profile import Damage, Estimate
from unetc.backend import Array

from .distances import psnr, relative_l2, ssim


def estimate(values: Iterable[float]) -> Estimate:
    """Summarise independent values by their mean and its 95 % Student-t interval."""
    array = np.asarray(list(values), dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Estimate(mean=mean, low=mean, high=mean)
    half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return Estimate(mean=mean, low=mean - half, high=mean + half)


def measure_damage(reference: Array, candidate: Array) -> Damage:
    """Compare final outputs that start from the same noise.

    Args:
        reference: Samples of the full model, [batch, channel, height, width].
        candidate: Samples of the changed model, same shape.

    Returns:
        Relative L2, PSNR and SSIM: means over the batch with 95 % intervals.

    Raises:
        ShapeMismatch: If the shapes differ.
    """
    return Damage(
        relative_l2=estimate(relative_l2(reference, candidate)),
        psnr=estimate(psnr(reference, candidate)),
        ssim=estimate(ssim(reference, candidate)),
    )
