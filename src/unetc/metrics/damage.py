"""Damage: the change of the final output, with confidence intervals over samples."""

from __future__ import annotations

from unetc.artifacts.profile import Damage
from unetc.backend import Array

from .distances import psnr, relative_l2
from .interval import estimate
from .ssim import ssim


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
