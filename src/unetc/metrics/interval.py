"""Confidence intervals of means."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import stats

from unetc.artifacts.profile import Estimate


def estimate(values: Iterable[float]) -> Estimate:
    """Summarise independent values by their mean and its 95 % Student-t interval."""
    array = np.asarray(list(values), dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Estimate(mean=mean, low=mean, high=mean)
    half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return Estimate(mean=mean, low=mean - half, high=mean + half)
