"""The proof of a table: diffusers and the table sample a nonlinear model in parallel."""

from __future__ import annotations

import copy
import math
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unetc.sampler.table import SchedulerTable, update

from .walk import asks_variance, is_flow, make_step, model_input, takes_noise

_SHAPE = (2, 1, 8, 8)


def replay(begun: Any, table: SchedulerTable, first: int = 0) -> float:
    """Sample a fake model with the scheduler and with the table; return the largest relative difference of a step.

    In float64, to compare coefficients and not rounding: some schedulers subtract large numbers.

    Args:
        begun: A scheduler that `begin` made; it is not changed.
        table: Its table.
        first: Step at which both begin.
    """
    fresh = copy.deepcopy(begun)
    if first:
        fresh.set_begin_index(first)
    expected = table.initial_scale * _normal(table.steps)
    actual, differences = expected.numpy(), []
    samples, predictions = (deque[NDArray[np.float64]](maxlen=table.window) for _ in range(2))
    for step, timestep in enumerate(fresh.timesteps[first:], start=first):
        expected = _advance(fresh, step, timestep, expected)
        samples.appendleft(actual)
        predictions.appendleft(_fake_model(table.input_scale[step] * actual, float(table.timesteps[step])))
        actual = update(table, step, samples, predictions, _noise(fresh, step).numpy(), _variance(step))
        differences.append(np.abs(actual - expected.numpy()).max() / expected.abs().max().item())
    return float(np.max(differences))


def stays_finite(begun: Any) -> bool:
    """Sample a fake model with the scheduler alone; check that no step gives NaN or infinity.

    Args:
        begun: A scheduler that `begin` made; it is not changed.
    """
    fresh = copy.deepcopy(begun)
    sample = _normal(len(fresh.timesteps)) * (1.0 if is_flow(begun) else float(begun.init_noise_sigma))
    for step, timestep in enumerate(fresh.timesteps):
        sample = _advance(fresh, step, timestep, sample)
        if not sample.isfinite().all():
            return False
    return True


def _advance(fresh: Any, step: int, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Make a step with the scheduler."""
    output = _fake_model(model_input(fresh, sample, timestep).numpy(), float(timestep))
    if asks_variance(fresh):
        output = np.concatenate([output, _variance(step)], axis=1)
    answer = make_step(fresh, torch.from_numpy(output), timestep, sample, _noise(fresh, step), seed=step)
    advanced: torch.Tensor = answer.prev_sample
    return advanced


def _noise(fresh: Any, step: int) -> torch.Tensor:
    """Draw the noise of a step; a scheduler that takes its noise rounds it to float32."""
    return _normal(step).to(torch.float32 if takes_noise(fresh) else torch.float64).double()


def _variance(step: int) -> NDArray[np.float64]:
    """Predict a variance that is sometimes beyond its bounds."""
    values: NDArray[np.float64] = 1.2 * np.cos(2.0 * np.arange(math.prod(_SHAPE)) + step)
    return values.reshape(_SHAPE)


def _normal(seed: int) -> torch.Tensor:
    """Draw the noise that a scheduler draws from a generator of this seed."""
    return torch.randn(_SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _fake_model(model_input: NDArray[np.float64], timestep: float) -> NDArray[np.float64]:
    """Be nonlinear, larger than usual clips, and smooth: a steep model would magnify rounding from step to step."""
    return 1.5 * np.cos(0.3 * model_input + 0.01 * timestep)
