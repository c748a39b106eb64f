"""How a model's prediction and the denoised sample follow from each other, at a noise level.

The denoised sample x0 is the image that a model sees in a noisy sample. For an input y and a prediction e it is
x0 = p y + q e, with weights that depend on the noise level alone. Here y is the sample as the model receives it, after
`input_scale`. So the weights are the same for all schedulers of a model.
"""

from __future__ import annotations

import math
from enum import StrEnum


class PredictionType(StrEnum):
    """Quantity that a model was trained to predict; the denoised sample itself has no type here."""

    EPSILON = "epsilon"
    """The noise n in y = alpha x0 + sigma n, with alpha^2 + sigma^2 = 1."""
    V = "v_prediction"
    """alpha n - sigma x0, with the same alpha and sigma."""
    FLOW = "flow"
    """n - x0, where y = (1 - sigma) x0 + sigma n."""

    def denoised_weights(self, log_snr: float) -> tuple[float, float]:
        """Compute the weights p and q in x0 = p y + q e.

        Args:
            log_snr: Natural log of alpha^2 / sigma^2, or of (1 - sigma)^2 / sigma^2 for a flow.

        Returns:
            p and q; q is never zero.

        Source:
            Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", arXiv:2202.00512,
            appendix D, for v.
        """
        if self is PredictionType.FLOW:
            return 1.0, -1 / (1 + math.exp(log_snr / 2))
        alpha, sigma = (1 / math.sqrt(1 + math.exp(sign * log_snr)) for sign in (-1, 1))
        return (1 / alpha, -sigma / alpha) if self is PredictionType.EPSILON else (alpha, -sigma)
