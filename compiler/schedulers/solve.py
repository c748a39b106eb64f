"""Coefficients of the steps from the answers of a diffusers scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unetc.errors import ModelError
from unetc.sampler.table import MAX_WINDOW, SchedulerTable, needed_window

from .probe import LARGE, SMALL, Probe
from .recurrence import recurrence
from .walk import calls_of, is_flow, log_snr, prediction_type, rising, signal

_NEGLIGIBLE = 1e-9
"""Relative size of rounding errors where the exact coefficient is zero; 60 times below float32 rounding."""
_LONG = 4
"""Longest history of schedulers whose coefficients are known in advance; a method of order 4 needs it."""


def solve(
    begun: Any, answers: Probe, widest: Probe | None, steps: int, *, first: Probe | None = None
) -> SchedulerTable:
    """Turn the answers of a scheduler into coefficients.

    Args:
        begun: The scheduler, as `begin` made it.
        answers: Its answers, to the lowest variance where it asks for one.
        widest: Its answers to the highest variance, where it asks for one.
        steps: Number of steps that it was set to.
        first: Answers of the same scheduler at first order, which its first step has; None if its first step has no
            simpler form.

    Raises:
        ModelError: If a step looks further back than a table can.
    """
    calls, several = len(answers.input_scale), calls_of(begun, steps) != steps
    noise = answers.noise_coefficient
    sample_weights = _clean(answers.next_samples[:, :calls] / SMALL, noise[:, None])
    prediction_weights = _clean(answers.next_samples[:, calls:-2] / SMALL, noise[:, None])
    missing = LARGE * (sample_weights - prediction_weights).sum(axis=1) - answers.next_samples[:, -2]
    path = _clipped_path(answers.denoised, missing)

    samples, predictions = _by_lag(sample_weights), _by_lag(prediction_weights)
    window = needed_window(samples, predictions)
    if window > _LONG and not noise.any() and not several:
        # an inner state depends on the whole past, but may follow from few samples
        samples, predictions = recurrence(begun)
        window = needed_window(samples, predictions)
    if window > MAX_WINDOW:
        raise ModelError(
            f"{type(begun).__name__} looks {window} calls back, more than {MAX_WINDOW}. Choose another, such as ddim."
        )
    samples[:, 0] = _clean(samples[:, 0] - path.weight * path.sample, samples[:, 0])
    predictions[:, 0] = _clean(predictions[:, 0] - path.weight * path.prediction, predictions[:, 0])
    weight, low, high = _variance(noise, None if widest is None else widest.noise_coefficient)
    levels = log_snr(begun)
    start_sample, start_prediction = np.zeros(calls), np.zeros(calls)
    if first is not None and window == 2:
        start_sample = _clean(first.next_samples[:, :calls].diagonal() / SMALL, np.ones(calls))
        start_prediction = _clean(first.next_samples[:, calls:-2].diagonal() / SMALL, np.ones(calls))
    levels = rising(levels) if several else levels
    return SchedulerTable(
        asked=steps if several else None,
        prediction_type=prediction_type(begun),
        timesteps=begun.timesteps.numpy().astype(np.float32),
        log_snr=levels,
        signal=signal(begun, levels),
        input_scale=answers.input_scale,
        initial_scale=1.0 if is_flow(begun) else float(begun.init_noise_sigma),
        denoised_sample=path.sample,
        denoised_prediction=path.prediction,
        denoised_coefficient=path.weight,
        clip=path.clip,
        sample_coefficients=samples[:, :window],
        prediction_coefficients=predictions[:, :window],
        noise_coefficient=_clean(weight, np.ones(calls)),
        variance_low=low,
        variance_high=high,
        start_sample=start_sample,
        start_prediction=start_prediction,
    )


def _variance(
    least: NDArray[np.float64], most: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Separate noise coefficients [n] at the lowest and the highest variance into a weight and the logs of both."""
    if most is None:
        return least, np.zeros(len(least)), np.zeros(len(least))
    noisy = most != 0
    low, high = (2 * np.log(np.where(noisy, bound, 1.0)) for bound in (least, most))
    return noisy.astype(np.float64), low, high


def _clean(values: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Set values to zero that are only rounding errors of numbers of that size."""
    return np.where(np.abs(values) > _NEGLIGIBLE * np.abs(size), values, 0.0)


def _by_lag(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn weights [step, step of origin] into [step, lag]."""
    step, lag = np.ogrid[: len(weights), : len(weights)]
    return np.where(lag <= step, weights[step, step - lag], 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ClippedPath:
    """The part of the update that goes through the clipped x0; zero weights if there is none. Each [n]."""

    sample: NDArray[np.float64]
    prediction: NDArray[np.float64]
    weight: NDArray[np.float64]
    clip: float


def _clipped_path(denoised: NDArray[np.float64], missing: NDArray[np.float64]) -> _ClippedPath:
    """Separate the path through x0 from the direct one.

    Args:
        denoised: [n, 2n + 2], from the probe.
        missing: [n], shortfall of the large answers from a linear update: weight of x0 * the clipped part.
    """
    steps = len(denoised)
    sample = denoised[:, :steps].diagonal() / SMALL
    prediction = denoised[:, steps:-2].diagonal() / SMALL
    unclipped, clipped = LARGE * (sample - prediction), denoised[:, -2]
    if np.any(np.abs(clipped) >= np.abs(unclipped) / 2):
        none = np.zeros(steps)
        return _ClippedPath(sample=none, prediction=none, weight=none, clip=math.inf)
    return _ClippedPath(
        sample=sample,
        prediction=prediction,
        weight=missing / (unclipped - clipped),
        clip=float(np.abs(clipped[0])),
    )
