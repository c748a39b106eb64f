"""Tune the rows of a scheduler table to a plan.

The predictions of a plan differ from the full model's, and much of the difference is the same for all samples: it is a
combination of the samples and predictions that the trajectory has at hand anyway. So every row after the first treated
step gets further weights for them, found by least squares. They bring the next samples as close to the full model's as
they can. Rows are tuned in the order of sampling, each on the trajectory that the rows before it have made.

Sampling with a tuned table costs as much as with the plain one: it has more weights, and no more calls.

Source:
    The idea of fitting such weights: Liu et al. 2026, "L2P", arXiv:2604.26365, for forecasts of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from unetc.artifacts.profile import STEP
from unetc.conditions import Conditions
from unetc.device import Array
from unetc.runtime.rollout import FULL_ENGINE, Rollout
from unetc.runtime.session import Session
from unetc.sampler.noise import step_noise
from unetc.sampler.table import MAX_WINDOW, SchedulerTable, needed_window, update

PREDICTIONS = 4
"""Number of computed predictions that a tuned row combines, the newest first."""
SAMPLES = 4
"""Number of samples that it combines."""
RIDGE = 1e-6
"""Penalty on the weights, as a share of the mean square of their tensors; keeps undetermined weights small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Trajectories of the full model that start a batch of samples."""

    seed: int
    indices: range
    """Index of every sample within the seed."""
    conditions: Conditions
    start: Array
    """Samples that enter the first step, [batch, channel, height, width]."""
    samples: tuple[Array, ...]
    """Samples after every step, in the same shape."""


def record(session: Session, indices: range, *, seed: int, steps: int) -> Recording:
    """Record trajectories of the full model.

    Args:
        session: Has the full model.
        indices: Index of every sample within the seed.
        seed: Seed of the noise.
        steps: Number of steps.
    """
    after: list[Array] = []
    start = session.start(len(indices), seed=seed, steps=steps, first_index=indices.start, full_model=True)
    session.sample(
        len(indices),
        seed=seed,
        steps=steps,
        first_index=indices.start,
        full_model=True,
        latents=True,
        on_step=lambda step: after.append(step.sample),
    )
    return Recording(
        seed=seed,
        indices=indices,
        conditions=start.conditions,
        start=start.noise * np.float32(start.table.initial_scale),
        samples=tuple(after),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A tuned table, and the samples that it has made."""

    table: SchedulerTable
    samples: Array
    """The plan's last samples for all recordings, [batch, channel, height, width], not decoded."""


def tune(session: Session, table: SchedulerTable, recordings: Sequence[Recording]) -> Tuned:
    """Tune the rows of a table to the plan of a session.

    Rows before the first treated step stay as they are.

    Args:
        session: The engines and their plan.
        table: A plain table of the session's scheduler.
        recordings: The full model's trajectories in as many steps.
    """
    with session.device.stream():
        return _tune(session, table, recordings)


def _tune(session: Session, table: SchedulerTable, recordings: Sequence[Recording]) -> Tuned:
    schedule = session.schedule(table.count)
    whole = [engine for engine, own in enumerate(session.plan.engines) if STEP in own.treatments]
    trajectories = [_Trajectory(session, recording, table) for recording in recordings]
    weights = np.zeros((2, table.steps, MAX_WINDOW))
    weights[:, :, : table.window] = table.sample_coefficients, table.prediction_coefficients
    treated = False
    for step, engine in enumerate(schedule):
        treated = treated or engine != FULL_ENGINE
        for trajectory in trajectories:
            trajectory.call(step)
        added = np.zeros((2, MAX_WINDOW))
        if treated:
            computed = [lag for lag in range(min(step + 1, MAX_WINDOW)) if schedule[step - lag] not in whole]
            lags = range(min(step + 1, SAMPLES)), computed[:PREDICTIONS]
            for kind, own in enumerate(_solve([trajectory.sums(step, *lags) for trajectory in trajectories], *lags)):
                added[kind, list(lags[kind])] = own
            weights[:, step] += added
        for trajectory in trajectories:
            trajectory.advance(added)
    window = max(table.window, needed_window(*weights))
    tuned = replace(table, sample_coefficients=weights[0, :, :window], prediction_coefficients=weights[1, :, :window])
    return Tuned(table=tuned, samples=np.concatenate([trajectory.samples[0] for trajectory in trajectories]))


def _solve(
    sums: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], samples: Sequence[int], predictions: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Find the weights of samples and predictions, given sums over all elements of the trajectories."""
    squares, products = (np.sum(parts, axis=0) for parts in zip(*sums, strict=True))
    scale = np.sqrt(np.maximum(np.diag(squares), np.finfo(np.float64).tiny))
    scaled = squares / np.outer(scale, scale)
    solved = np.linalg.solve(scaled + RIDGE * np.eye(len(scale)), products / scale) / scale
    return solved[: len(samples)], solved[len(samples) :]


class _Trajectory:
    """The plan's trajectory of one recording, with its history."""

    def __init__(self, session: Session, recording: Recording, table: SchedulerTable) -> None:
        self._device = session.device
        self._rollout: Rollout = session.rollout()
        self._recording = recording
        self._conditions = recording.conditions.on(session.device)
        self._table = table
        self.samples: list[Array] = [recording.start]
        self._predictions: list[Array] = []
        self._following: Array

    def call(self, step: int) -> None:
        """Predict, and make the plain step."""
        table, recording, sample = self._table, self._recording, self.samples[0]
        seen = self._device.put(sample * np.float32(table.input_scale[step]))
        predicted = self._device.to_array(
            self._rollout.predict(seen, table.timesteps.item(step), table.log_snr.item(step), self._conditions)
        )
        channels = sample.shape[1]
        variance = predicted[:, channels:] if predicted.shape[1] > channels else None
        self._predictions = [predicted[:, :channels], *self._predictions][:MAX_WINDOW]
        noisy = table.noise_coefficient[step]
        noise = step_noise(recording.seed, recording.indices, step, sample.shape[1:]) if noisy else None
        window = table.window
        self._following = update(table, step, self.samples[:window], self._predictions[:window], noise, variance)

    def sums(
        self, step: int, samples: Sequence[int], predictions: Sequence[int]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sum products over all elements: of the combined tensors with each other, and with the difference to correct.

        Args:
            step: The step that was called last.
            samples: Lags of the samples that are combined.
            predictions: Lags of the predictions that are combined.
        """
        tensors = [*(self.samples[lag] for lag in samples), *(self._predictions[lag] for lag in predictions)]
        combined = np.stack([tensor.ravel() for tensor in tensors]).astype(np.float64)
        difference = (self._recording.samples[step] - self._following).ravel().astype(np.float64)
        return combined @ combined.T, combined @ difference

    def advance(self, added: NDArray[np.float64]) -> None:
        """Finish the step with the added weights, [samples or predictions, lag]."""
        following = self._following
        for weights, tensors in zip(added.tolist(), (self.samples, self._predictions), strict=True):
            for weight, tensor in zip(weights, tensors, strict=False):
                if weight:
                    following = following + weight * tensor
        self.samples = [following, *self.samples][:MAX_WINDOW]
