"""A trajectory: the samples on their way from noise to image, with the history the solver needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unetc.solver.noise import step_noise
from unetc.solver.table import SolverTable, update

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The state between two steps; advancing makes a new one, so a prefix can be shared."""

    samples: tuple[Array, ...]
    """Newest first, each [batch, channel, height, width]; at most the solver's window."""
    predictions: tuple[Array, ...]
    """Newest first, of the steps already made."""

    @classmethod
    def start(cls, table: SolverTable, noise: Array) -> Trajectory:
        """Begin at unit normal noise [batch, channel, height, width]."""
        first = np.ascontiguousarray(noise, dtype=np.float32) * np.float32(table.initial_scale)
        return cls(samples=(first,), predictions=())

    @property
    def sample(self) -> Array:
        """The current samples, [batch, channel, height, width]."""
        return self.samples[0]

    def advance(
        self, table: SolverTable, step: int, predict: Callable[[Array], Array], *, seed: int, indices: Sequence[int]
    ) -> Trajectory:
        """Make one step.

        Args:
            table: The solver.
            step: Step index.
            predict: The denoiser at this step's timestep: maps scaled samples to predictions of the same shape, or of
                twice the channels, of which the second half tells the variance of a stochastic solver's noise.
            seed: Seed of the noise a stochastic solver adds.
            indices: Index of every sample within the seed.
        """
        scale = table.input_scale.item(step)
        prediction = predict(self.sample if scale == 1.0 else self.sample * np.float32(scale))
        shape = self.sample.shape[1:]
        channels = shape[0]
        variance = prediction[:, channels:] if prediction.shape[1] > channels else None
        predictions = (prediction[:, :channels], *self.predictions)[: table.window]
        noise = step_noise(seed, indices, step, shape) if table.noise_coefficient.item(step) else None
        following = update(table, step, self.samples, predictions, noise, variance)
        return Trajectory(samples=(following, *self.samples)[: table.window], predictions=predictions)

    def repeat(self, times: int) -> Trajectory:
        """Copy every sample `times` times: the whole batch, then the whole batch again."""
        return Trajectory(
            samples=tuple(np.concatenate([array] * times) for array in self.samples),
            predictions=tuple(np.concatenate([array] * times) for array in self.predictions),
        )
