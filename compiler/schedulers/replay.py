"""The proof of a table: diffusers and the table sample a nonlinear model in parallel."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unetc.sampler.table import SchedulerTable, update

from .walk import asks_variance, make_step, model_input, takes_noise

_SHAPE = (2, 1, 8, 8)


def replay(begun: Any, table: SchedulerTable, first: int = 0) -> float:
    """Sample a fake model with the scheduler and with the table; return the largest relative difference of a step.

    In float64, to compare coefficients and not rounding: some schedulers subtract large numbers.

    Args:
        begun: A scheduler that `begin` made; it is not changed.
        table: Its table.
        first: Step at which both begin.
    """
    fresh, asked = copy.deepcopy(begun), asks_variance(begun)
    if first:
        fresh.set_begin_index(first)
    # a scheduler that takes its noise rounds it to float32
    kind = torch.float32 if takes_noise(begun) else torch.float64
    expected = table.initial_scale * _normal(table.steps)
    actual, differences = expected.numpy(), []
    samples, predictions = (deque[NDArray[np.float64]](maxlen=table.window) for _ in range(2))
    for step, timestep in enumerate(fresh.timesteps[first:], start=first):
        prediction = _fake_model(model_input(fresh, expected, timestep).numpy(), float(timestep))
        variance = 1.2 * np.cos(2.0 * np.arange(prediction.size) + step).reshape(prediction.shape)
        output = np.concatenate([prediction, variance], axis=1) if asked else prediction
        noise = _normal(step).to(kind).double()
        expected = make_step(fresh, torch.from_numpy(output), timestep, expected, noise, seed=step).prev_sample
        samples.appendleft(actual)
        predictions.appendleft(_fake_model(table.input_scale[step] * actual, float(table.timesteps[step])))
        actual = update(table, step, samples, predictions, noise.numpy(), variance)
        differences.append(np.abs(actual - expected.numpy()).max() / expected.abs().max().item())
    return float(np.max(differences))


def _normal(seed: int) -> torch.Tensor:
    """Draw the noise that a scheduler draws from a generator of this seed."""
    return torch.randn(_SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _fake_model(model_input: NDArray[np.float64], timestep: float) -> NDArray[np.float64]:
    """Be nonlinear, larger than usual clips, and smooth: a steep model would magnify rounding from step to step."""
    return 1.5 * np.cos(0.3 * model_input + 0.01 * timestep)
