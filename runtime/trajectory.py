"""Trajectories: samples on their way from noise to image, with the history that the scheduler needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from unetc.device import HOST, Array, Device, Tensor
from unetc.sampler.noise import step_noise
from unetc.sampler.table import SchedulerTable, update


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The state between two steps. Advancing returns a new state, so several trajectories can share a prefix."""

    samples: tuple[Tensor, ...]
    """Samples, newest first, each [batch, channel, height, width]; at most the scheduler's window."""
    predictions: tuple[Tensor, ...]
    """Predictions of earlier steps, newest first."""
    device: Device = HOST
    """Device of all these tensors."""

    @classmethod
    def start(
        cls, table: SchedulerTable, noise: Array, device: Device = HOST, *, image: Array | None = None, first: int = 0
    ) -> Trajectory:
        """Begin on a device.

        Args:
            table: Table of the scheduler.
            noise: Unit normal noise, [batch, channel, height, width].
            device: Where the trajectory is.
            image: Samples that get the noise of the first step, in the same shape; None begins with noise alone.
            first: Index of the first step.
        """
        drawn = device.put(np.ascontiguousarray(noise, dtype=np.float32))
        if image is None:
            begun = drawn * table.initial_scale
        else:
            clean = device.put(np.ascontiguousarray(image, dtype=np.float32))
            begun = clean * table.signal.item(first) + drawn * table.noise_of(first)
        return cls(samples=(begun,), predictions=(), device=device)

    @property
    def sample(self) -> Tensor:
        """The current samples, [batch, channel, height, width]."""
        return self.samples[0]

    def seen(self, table: SchedulerTable, step: int) -> Tensor:
        """Scale the current samples to the denoiser's input at a step."""
        scale = table.input_scale.item(step)
        return self.sample if scale == 1.0 else self.sample * scale

    def advance(
        self, table: SchedulerTable, step: int, prediction: Tensor, *, seed: int, indices: Sequence[int]
    ) -> Trajectory:
        """Compute the state after one step.

        Args:
            table: Table of the scheduler.
            step: Step index.
            prediction: Output of the denoiser at this step, same shape as the samples. It may have twice the channels;
                the second half is then the predicted variance of a stochastic scheduler's noise.
            seed: Seed of the noise that a stochastic scheduler adds.
            indices: Index of every sample within the seed.
        """
        shape = self.sample.shape[1:]
        channels = shape[0]
        variance = prediction[:, channels:] if prediction.shape[1] > channels else None
        predictions = (prediction[:, :channels], *self.predictions)[: table.window]
        noisy = table.noise_coefficient.item(step)
        noise = self.device.put(step_noise(seed, indices, step, shape)) if noisy else None
        following = update(table, step, self.samples, predictions, noise, variance, self.device)
        samples = (following, *self.samples)[: table.window]
        return Trajectory(samples=samples, predictions=predictions, device=self.device)

    def repeat(self, times: int) -> Trajectory:
        """Repeat the whole batch `times` times."""
        join = self.device.concatenate
        return replace(
            self,
            samples=tuple(join([tensor] * times) for tensor in self.samples),
            predictions=tuple(join([tensor] * times) for tensor in self.predictions),
        )
