"""The loop on a GPU: one kernel a step, over memory that is laid out before the first step.

Samples, their history, the engines' inputs and predictions, and the timesteps are parts of one arena. Conditions, the
scheduler's coefficients and the keys of the noise are also put on the device. Between the first step and the last,
nothing is copied from the host. Each step returns one number to the host: whether the prediction was finite.

The kernel is written in Triton, which torch brings along where it is built for CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version

from unetc.device import Device
from unetc.runtime.loop import PlainLoop, Start
from unetc.runtime.trajectory import Trajectory
from unetc.sampler.noise import require_words
from unetc.sampler.table import SchedulerTable

from .step_kernel import BLOCK, SCALARS, make_step

_ALIGNMENT = 64
"""Elements of 4 bytes; engines need the addresses of their inputs at multiples of 256 bytes."""
_ROUNDING = 1e-3
"""Relative to the largest number of a step. Rounding errors are about 1e-6; a wrong kernel is further off."""


class FusedLoop:
    """A trajectory in an arena."""

    runs_ahead = True

    def __init__(self, start: Start, device: Device, place: torch.device) -> None:
        """Lay out the arena and begin.

        Args:
            start: A start that `can_fuse` accepts.
            device: Copies arrays to the place.
            place: Device of the arena.

        Raises:
            SessionError: If seed or an index is out of range.
        """
        table, (batch, *shape) = start.table, start.noise.shape
        require_words(start.seed, *start.indices)
        lags, rows, steps = table.window, start.rows, table.steps
        arena = _carve(
            place,
            {
                "samples": (lags + 1, batch, *shape),
                "predictions": (lags, batch, *shape),
                "even": (rows, *shape),
                "odd": (rows, *shape),
                "prediction": (rows, start.predicted_channels, *shape[1:]),
                "non_finite": (steps,),
                "timesteps": (steps, _aligned(rows)),
            },
        )
        self._samples, self._predictions = arena["samples"], arena["predictions"]
        self._seen = arena["even"], arena["odd"]
        self._prediction, self._non_finite = arena["prediction"], arena["non_finite"]
        on_gpu = place.type == "cuda"
        self._said = torch.zeros((), pin_memory=on_gpu)
        """Result of the last step's check, in the memory of the process."""
        self._there = torch.cuda.Event(blocking=True) if on_gpu else None  # type: ignore[no-untyped-call]
        """Recorded when the result has arrived, so that `is_finite` does not wait for an engine called since then."""
        self._kernel = make_step[triton.cdiv(math.prod(shape), BLOCK), batch]
        self._settings = settings(start)
        self.made = start.first
        """Number of steps before the next one, including those that an image leaves out."""
        self._timesteps = arena["timesteps"][:, :rows]
        self._timesteps.copy_(device.put(table.timesteps)[:, None])
        self._coefficients = device.put(coefficients(table))
        self._keys = device.put(np.array([start.seed, *start.indices], np.uint64).view(np.int64))
        self._constant = start.conditions.on(device).constant(batch, *shape[1:])
        begun = Trajectory.start(table, start.noise, device, image=start.image, first=start.first)
        self._samples[start.first % len(self._samples)] = begun.sample
        self._seen[start.first % 2].view(-1, batch, *shape)[:] = begun.seen(table, start.first)

    @property
    def form(self) -> tuple[object, ...]:
        """Constants that the kernel is compiled with."""
        return tuple(value for name, value in self._settings.items() if name.isupper())

    @property
    def sample(self) -> Tensor:
        """A copy of the current samples, [batch, channel, height, width]."""
        return self._samples[self.made % len(self._samples)].clone()

    def call(self, step: int) -> tuple[Mapping[str, Tensor], Tensor]:
        """Return the inputs of the engine at a step, and the tensor for its prediction; both are in the arena."""
        inputs = {"sample": self._seen[step % 2], "timestep": self._timesteps[step], **self._constant}
        return inputs, self._prediction

    def advance(self, step: int) -> None:
        """Advance the samples by one step."""
        self.launch(step)
        self._said.copy_(self._non_finite[step], non_blocking=True)
        if self._there is not None:
            self._there.record()
        self.made = step + 1

    def is_finite(self, step: int) -> bool:
        """Check whether the last step's prediction has no NaN and no infinity; waits for that step alone."""
        if self._there is not None:
            self._there.synchronize()
        finite = math.isfinite(self._said.item())
        if not finite:
            self._non_finite[step].zero_()
        return finite

    def launch(self, step: int) -> None:
        """Launch the kernel; it writes nothing that the step itself reads, so it can be launched again."""
        ahead = self._seen[(step + 1) % 2]
        self._kernel(
            self._prediction,
            self._samples,
            self._predictions,
            ahead,
            self._non_finite,
            self._coefficients,
            self._keys,
            step,
            **self._settings,
        )
        if not ahead.is_inference():
            increment_version(ahead)  # torch does not notice the writes of a kernel


def can_fuse(start: Start) -> bool:
    """Check whether the kernel can make these steps; otherwise the plain loop makes them, or names the error."""
    table, (batch, channels, height, width) = start.table, start.noise.shape
    lags = np.arange(table.window) > np.arange(table.steps)[:, None]
    before_the_first = table.sample_coefficients[lags].any() or table.prediction_coefficients[lags].any()
    learned = start.predicted_channels == 2 * channels
    asks = table.variance_low.any() or table.variance_high.any()
    return (
        not before_the_first
        and start.conditions.rows_per_sample <= 2  # the kernel knows no middle conditions
        and (learned or (start.predicted_channels == channels and not asks))
        and channels * height * width < 2**30  # the kernel counts them in 32 bits
        and batch < 2**16  # CUDA's limit of the second axis
    )


def agrees(fused: FusedLoop, plain: PlainLoop) -> bool:
    """Compile the kernel for a trajectory, and check whether its first step equals the plain loop's."""
    first = fused.made
    (_, own), (_, prediction) = fused.call(first), plain.call(first)
    own.view(-1)[:] = torch.linspace(-1, 1, own.numel(), device=own.device)
    prediction.copy_(own)
    fused.advance(first)
    plain.advance(first)
    expected = plain.sample
    return bool((fused.sample - expected).abs().max() <= _ROUNDING * expected.abs().max())


def settings(start: Start) -> dict[str, object]:
    """Collect the kernel arguments that are the same in every step."""
    batch, *shape = start.noise.shape
    return {
        "guidance": float(start.conditions.scale),
        "batch": batch,
        "elements": math.prod(shape),
        "LAGS": start.table.window,
        "GUIDED": start.conditions.guided,
        "LEARNED": start.predicted_channels > shape[0],
        "NOISY": bool(start.table.noise_coefficient.any()),
        "BLOCK": BLOCK,
    }


def coefficients(table: SchedulerTable) -> NDArray[np.float32]:
    """Arrange the coefficients of every step in the kernel's order, [step, SCALARS + 2 * window]."""
    columns: Sequence[NDArray[np.float64]] = (
        np.append(table.input_scale[1:], 1.0),
        table.denoised_sample,
        table.denoised_prediction,
        table.denoised_coefficient,
        np.full(table.steps, table.clip),
        table.noise_coefficient,
        table.variance_low,
        table.variance_high,
    )
    assert len(columns) == SCALARS.value
    whole = np.column_stack([*columns, table.sample_coefficients, table.prediction_coefficients])
    return whole.astype(np.float32)


def _carve(place: torch.device, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Allocate memory once, and cut it into tensors of zeros that begin at aligned addresses."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    arena = torch.zeros(sum(map(_aligned, sizes)), device=place)
    parts, begin = {}, 0
    for (name, shape), size in zip(shapes.items(), sizes, strict=True):
        parts[name] = arena[begin : begin + size].view(*shape)
        begin += _aligned(size)
    return parts


def _aligned(elements: int) -> int:
    """Round up to where the next tensor may begin."""
    return -(-elements // _ALIGNMENT) * _ALIGNMENT
