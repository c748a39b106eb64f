"""Experiments with a diffusers scheduler: its answers to samples and model outputs that hold one number each.

`scheduler.step` is a black box that is linear in the recent samples and model outputs, except that it may clip x0 and
add noise. One pass over the timesteps reads everything, because one tensor holds many experiments. Its element k is
zero in every sample and model output except x_k, so its later value is the coefficient of x_k. Element n + k does the
same for the model output e_k. Two more elements follow: one is large in every step, to run into the clip, and one is
zero in every step, to see the noise alone.

If the scheduler takes the variance of its noise from the model, the pass uses the lowest variance, and a second pass
with the highest variance reads the other bound.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .walk import asks_variance, make_step, model_input, takes_noise

SMALL = 2.0**-18
"""Size of a coordinate: 1 / alpha = 2e4 times as much is not clipped; a power of two, so that it is exact."""
LARGE = 2.0**20
"""Size of the element that runs into the clip."""
LEAST, MOST = -1.0, 1.0
"""Prediction of a model for the lowest and the highest variance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Answers of a scheduler, row per call, column per experiment: n for x, n for e, then large, then zero."""

    input_scale: NDArray[np.float64]
    """[n]"""
    next_samples: NDArray[np.float64]
    """[n, 2n + 2], without noise."""
    denoised: NDArray[np.float64]
    """[n, 2n + 2], x0 after clipping; zero if the scheduler does not return it."""
    noise_coefficient: NDArray[np.float64]
    """[n], weight of the noise."""


def probe(begun: Any, variance: float = LEAST) -> Probe:
    """Make a pass over the timesteps.

    Args:
        begun: A scheduler that `begin` made; it is not changed.
        variance: Constant prediction of a model that is asked for a variance.
    """
    if not takes_noise(begun):
        noise = torch.randn(_shape(begun), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return _without(_pass(begun, noise, variance), noise)
    # such a scheduler computes in float32, where the noise would hide small numbers
    silent, noisy = (_pass(begun, torch.full(_shape(begun), size, dtype=torch.float64), variance) for size in (0, 1))
    return replace(silent, noise_coefficient=noisy.next_samples[:, -1])


def _shape(begun: Any) -> tuple[int, int, int, int]:
    return 1, 1, 1, 2 * len(begun.timesteps) + 2


def _pass(begun: Any, noise: torch.Tensor, variance: float) -> Probe:
    """Make all steps with the same noise."""
    fresh, calls = copy.deepcopy(begun), len(begun.timesteps)
    samples, predictions = torch.zeros(2, calls, 2 * calls + 2, dtype=torch.float64)
    samples[:, :calls].fill_diagonal_(SMALL)
    predictions[:, calls:-2].fill_diagonal_(SMALL)
    samples[:, -2], predictions[:, -2] = LARGE, -LARGE
    input_scale, next_samples, denoised = np.zeros(calls), np.zeros(samples.shape), np.zeros(samples.shape)
    asked = asks_variance(begun)
    for call, timestep in enumerate(fresh.timesteps):
        sample, prediction = samples[call].view(1, 1, 1, -1), predictions[call].view(1, 1, 1, -1)
        input_scale[call] = model_input(fresh, sample, timestep)[..., call].item() / SMALL
        if asked:
            prediction = torch.cat([prediction, torch.full_like(prediction, variance)], dim=1)
        answer = make_step(fresh, prediction, timestep, sample, noise, seed=0)
        next_samples[call] = answer.prev_sample.flatten()
        if hasattr(answer, "pred_original_sample"):
            denoised[call] = answer.pred_original_sample.flatten()
    return Probe(
        input_scale=input_scale, next_samples=next_samples, denoised=denoised, noise_coefficient=np.zeros(calls)
    )


def _without(answers: Probe, noise: torch.Tensor) -> Probe:
    """Separate the noise from the answers."""
    drawn = noise.flatten().numpy()
    coefficient = answers.next_samples[:, -1] / drawn[-1]
    return replace(
        answers,
        next_samples=answers.next_samples - np.outer(coefficient, drawn),
        noise_coefficient=coefficient,
    )
