"""Coefficients of a scheduler whose inner state depends on the whole past.

UniPC corrects a sample before it predicts the next one, and corrects from the last corrected sample. So a step depends
on all samples before it. But the last corrected sample follows from the last prediction, which is the current sample.
So few samples and model outputs determine the next sample after all, on the trajectories that the scheduler makes.

Those are sampled here: one experiment for the first sample and one for every model output. The coefficients solve a
linear system over all experiments.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unetc.errors import ModelError
from unetc.sampler.table import MAX_WINDOW

from .walk import make_step, model_input

_EXACT = 1e-8
"""Largest error of a step, relative to its largest number, at which the window is long enough."""


def recurrence(begun: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Find weights [n, lags] of the samples and of the model outputs, for the shortest possible window.

    Args:
        begun: A scheduler that `begin` made; it is not changed.

    Raises:
        ModelError: If no window that a table can hold is long enough.
    """
    samples = _sample(begun)
    calls = len(samples) - 1
    outputs = np.eye(calls, calls + 1, 1)
    for window in range(1, MAX_WINDOW + 1):
        found = [_weights(samples, outputs, call, min(window, call + 1)) for call in range(calls)]
        if all(error <= _EXACT for _, error in found):
            weights = np.zeros((2, calls, window))
            for call, (solution, _) in enumerate(found):
                lags = len(solution) // 2
                weights[:, call, :lags] = solution.reshape(2, lags)
            return weights[0], weights[1]
    raise ModelError(
        f"{type(begun).__name__} looks more than {MAX_WINDOW} calls back. Choose another one, such as dpmsolver++."
    )


def _sample(begun: Any) -> NDArray[np.float64]:
    """Sample; row k holds the sample that enters call k, as weights of the first sample and of every model output."""
    fresh, calls = copy.deepcopy(begun), len(begun.timesteps)
    sample = torch.zeros(1, 1, 1, calls + 1, dtype=torch.float64)
    sample[..., 0] = 1
    nothing, rows = torch.zeros_like(sample), [sample]
    for call, timestep in enumerate(fresh.timesteps):
        output = nothing.clone()
        output[..., call + 1] = 1
        model_input(fresh, sample, timestep)
        sample = make_step(fresh, output, timestep, sample, nothing, seed=0).prev_sample
        rows.append(sample)
    return torch.cat(rows).view(calls + 1, calls + 1).numpy()


def _weights(
    samples: NDArray[np.float64], outputs: NDArray[np.float64], call: int, lags: int
) -> tuple[NDArray[np.float64], float]:
    """Solve for one call; return the weights [2 * lags] and the error."""
    recent = slice(call, None if call + 1 == lags else call - lags, -1)
    known = np.concatenate([samples[recent], outputs[recent]])
    wanted = samples[call + 1]
    solution, *_ = np.linalg.lstsq(known[:, : call + 2].T, wanted[: call + 2])
    error = np.abs(solution @ known - wanted).max() / np.abs(wanted).max()
    return solution, float(error)
