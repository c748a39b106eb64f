"""Whole trajectories of a nonlinear model: sampled by diffusers, as its pipelines do, and by a scheduler table."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from unetc.sampler.table import SchedulerTable, update

diffusers: Any = untyped_diffusers

SHAPE = (2, 3, 4, 4)
TOLERANCE = 1e-5
"""Largest accepted difference, relative to the largest element of a step."""


def model(model_input: NDArray[Any], timestep: float) -> Any:
    """Predict nonlinearly in both arguments; `extract` checks itself with a different model."""
    return 2 * np.tanh(0.2 * model_input - 0.4) + np.sin(0.003 * timestep).astype(model_input.dtype)


def noise_of(step: int, *, kind: torch.dtype = torch.float64) -> torch.Tensor:
    """Draw the noise of a step, in the type in which the scheduler draws it."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(step + 10), dtype=kind).double()


def noise_type(scheduler: Any) -> torch.dtype:
    """Return the type in which a scheduler draws noise."""
    return torch.float32 if type(scheduler).__name__ == "DPMSolverMultistepScheduler" else torch.float64


def by_diffusers(scheduler: Any, steps: int, **begin: Any) -> list[NDArray[Any]]:
    """Sample as the pipelines of diffusers do, in float64: where float32 subtracts large numbers, it shows rounding."""
    scheduler.set_timesteps(steps, **begin)
    sample, samples = noise_of(-1) * float(getattr(scheduler, "init_noise_sigma", 1.0)), []
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    for call, timestep in enumerate(scheduler.timesteps):
        prediction = torch.from_numpy(model(scale(sample, timestep).numpy(), float(timestep)))
        options: dict[str, Any] = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = torch.Generator().manual_seed(call + 10)
        if "eta" in inspect.signature(scheduler.step).parameters:
            options["eta"] = 0.0  # as pipelines pass it
        sample = scheduler.step(prediction, timestep, sample, **options).prev_sample
        samples.append(sample.numpy())
    return samples


def by_table(table: SchedulerTable, kind: torch.dtype, element: Any = np.float64) -> list[NDArray[Any]]:
    """Sample with a table, as a session does."""
    samples = [(table.initial_scale * noise_of(-1)).numpy().astype(element)]
    predictions: list[NDArray[Any]] = []
    for call, timestep in enumerate(table.timesteps):
        predictions.insert(0, model(float(table.input_scale[call]) * samples[0], float(timestep)))
        noise = noise_of(call, kind=kind).numpy().astype(element) if table.noise_coefficient[call] else None
        samples.insert(0, update(table, call, samples[: table.window], predictions[: table.window], noise))
    return samples[-2::-1]


def difference(actual: list[NDArray[Any]], expected: list[NDArray[Any]]) -> float:
    """Compute the largest difference over a trajectory, relative to the largest element of its step."""
    assert len(actual) == len(expected)
    return max(float(abs(a - e).max() / abs(e).max()) for a, e in zip(actual, expected, strict=True))
