"""Sampling around the engines: the inputs of every call, and the scheduler step after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from unetc.conditions import Conditions
from unetc.device import Array, Device, Tensor
from unetc.sampler.table import SchedulerTable

from .trajectory import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Start of a trajectory, in the memory of the process."""

    table: SchedulerTable
    noise: Array
    """Unit normal noise, [batch, channel, height, width]."""
    conditions: Conditions
    """One row per sample."""
    seed: int
    """Seed of the noise that a stochastic scheduler adds."""
    indices: Sequence[int]
    """Index of every sample within the seed."""
    predicted_channels: int
    """Channels of an engine's prediction."""
    image: Array | None = None
    """Samples without noise to start from, in the shape of the noise; None starts from noise alone."""
    first: int = 0
    """Step at which sampling begins."""

    @property
    def rows(self) -> int:
        """Rows of a call: twice the batch with guidance."""
        return len(self.noise) * self.conditions.rows_per_sample

    @property
    def units(self) -> float:
        """Rows of a call times the area of a sample: a measure of its cost."""
        _, _, height, width = self.noise.shape
        return float(self.rows * height * width)

    @property
    def calls(self) -> int:
        """Number of calls of an engine."""
        return self.table.steps - self.first


class Loop(Protocol):
    """A trajectory on a device; the session calls engines between its steps."""

    @property
    def sample(self) -> Tensor:
        """The current samples, [batch, channel, height, width]; no later step writes into them."""
        ...

    def call(self, step: int) -> tuple[Mapping[str, Tensor], Tensor]:
        """Return the engine's inputs at a step, and the tensor [row, channel, height, width] for its prediction."""
        ...

    def advance(self, step: int) -> None:
        """Make the step from the prediction; the caller repeats a step whose prediction was not finite."""
        ...

    def is_finite(self, step: int) -> bool:
        """Check that the last prediction has no NaN and no infinity; waits for it."""
        ...

    @property
    def runs_ahead(self) -> bool:
        """Whether the next engine may be called before `is_finite`, so that the device need not wait."""
        ...


@runtime_checkable
class FusedLoopDevice(Protocol):
    """A device that may fuse the operations of a step."""

    def fused_loop(self, start: Start) -> Loop | None:
        """Begin a trajectory; None if the device cannot fuse it."""
        ...


def begin(start: Start, device: Device, *, halves: bool = False) -> Loop:
    """Begin a trajectory in the fastest way that a device has.

    Args:
        start: The start.
        device: The device.
        halves: Whether some engines compute half of the rows, which a fused loop cannot.
    """
    varies = start.conditions.control is not None  # a ControlNet computes inputs of every call
    fits = not varies and not (halves and start.conditions.paired)
    fused = device.fused_loop(start) if isinstance(device, FusedLoopDevice) and fits else None
    return PlainLoop(start, device) if fused is None else fused


class PlainLoop:
    """A loop of operations that every device has."""

    runs_ahead = False

    def __init__(self, start: Start, device: Device) -> None:
        batch, _, height, width = start.noise.shape
        self._start = start
        self._device = device
        self._trajectory = Trajectory.start(start.table, start.noise, device, image=start.image, first=start.first)
        self._conditions = start.conditions.on(device)
        self._constant = self._conditions.constant(batch, height, width)

    @property
    def sample(self) -> Tensor:
        """The current samples, [batch, channel, height, width]."""
        return self._trajectory.sample

    def call(self, step: int) -> tuple[Mapping[str, Tensor], Tensor]:
        """Return the engine's inputs at a step, and the tensor for its prediction."""
        start = self._start
        seen = self._trajectory.seen(start.table, step)
        inputs = self._conditions.varying(seen, start.table.timesteps.item(step)) | self._constant
        self._prediction = self._device.empty((start.rows, start.predicted_channels, *seen.shape[2:]))
        return inputs, self._prediction

    def advance(self, step: int) -> None:
        """Make the step, unless the prediction has NaN or infinity."""
        self._finite = self._device.is_finite(self._prediction)
        if not self._finite:
            return
        start = self._start
        guided = self._conditions.guide(self._prediction, start.noise.shape[1])
        self._trajectory = self._trajectory.advance(start.table, step, guided, seed=start.seed, indices=start.indices)

    def is_finite(self, step: int) -> bool:
        """Check that the last prediction has no NaN and no infinity."""
        return self._finite
